"""Augmentation: fixed variants of a clip's samples, made once, and masks on its features, drawn at every use.

Nothing here remembers anything. A variant is a function of the clip, its key, the variant's number and the settings,
whatever worker, order or process asks for it, so that a cache may hold it; ``fingerprint`` is what keys that cache.

Shape letters: K valid frames, F mel bins, B blocks, S samples of a block, N samples of a Fourier transform.
"""

import hashlib
import json
import os
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import soxr

from voxray.audio.decode import FFMPEG_SUFFIXES, WHOLE, Part, decode, header_seconds
from voxray.core.errors import RunError

VERSION = 1  # goes up whenever the same settings would give other samples
SLOWEST, FASTEST = 0.5, 2.0  # beyond these nobody speaks, and clips could vanish
SILENT_RMS = 1e-8  # -160 dB of full scale, as in quality.py: there is no level to set noise against
RECORDINGS_KEPT = 32  # of 60 s at 16 kHz: 32 x 60 x 16,000 x 4 B = 117 MiB a process at most
RECORDING_SEC = 60.0  # what is used of a noise or room file, from its beginning
BLOCK_PER_RESPONSE = 4  # transforms of 4 responses' length: 1.5 to 3 times as fast as one over the whole clip
AUDIO_SUFFIXES = FFMPEG_SUFFIXES | {
    ".wav",
    ".flac",
    ".mp3",
    ".ogg",
    ".oga",
    ".aif",
    ".aiff",
    ".au",
    ".snd",
    ".caf",
    ".w64",
    ".sph",
    ".pcm",
}


@dataclass(frozen=True)
class WaveformAugmentation:
    """How the variants of a clip differ. The default is none but the clip itself.

    Attributes:
        num_variants: Variants of each clip; variant 0 is the clip as it is.
        speeds: Factors of tempo and pitch alike, 1.0 as is. Variant v > 0 takes the v-th, and so on in a circle; 1.0
            goes last, since variant 0 has it. So (0.9, 1.0, 1.1) and three variants are Kaldi's threefold data.
        noise_snr_db: Lowest and highest level of the clip over its noise, dB, drawn evenly between; None for no noise.
        noise_paths: Files that noise is taken from; none makes it white.
        room_paths: Files with a room's impulse response.
        noise_share: Probability that a variant has noise.
        room_share: Probability that a variant has a room. One with neither is just the clip at the variant's speed.
        seed: Seed of all draws.
    Raises:
        ValueError: A value out of range, or settings without effect: files that no variant would use, or more variants
            than there are different ones.
    """

    num_variants: int = 1
    speeds: tuple[float, ...] = (1.0,)
    noise_snr_db: tuple[float, float] | None = None
    noise_paths: tuple[str, ...] = ()
    room_paths: tuple[str, ...] = ()
    noise_share: float = 0.5
    room_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = (0.0, 0.0) if self.noise_snr_db is None else self.noise_snr_db
        faults = (
            (self.num_variants < 1, f"num_variants is {self.num_variants}, under 1"),
            (not self.speeds, "speeds is empty; (1.0,) leaves the speed as it is"),
            (
                not all(SLOWEST <= speed <= FASTEST for speed in self.speeds),
                f"speeds are {self.speeds}, not all between {SLOWEST} and {FASTEST}",
            ),
            (len(set(self.speeds)) < len(self.speeds), f"speeds are {self.speeds}, some of them twice"),
            (not -100 <= low <= high <= 100, f"noise_snr_db is {self.noise_snr_db}, not (low, high) within +-100 dB"),
            (not 0 <= self.noise_share <= 1, f"noise_share is {self.noise_share}, not a probability"),
            (not 0 <= self.room_share <= 1, f"room_share is {self.room_share}, not a probability"),
            (self.seed < 0, f"seed is {self.seed}, under 0"),
            (
                bool(self.noise_paths) and self.noise_snr_db is None,
                "noise_paths without noise_snr_db: at what level is the noise to be mixed in?",
            ),
        )
        for fault, message in faults:
            if fault:
                raise ValueError(message)
        has_noise = self.noise_snr_db is not None and self.noise_share > 0
        has_room = bool(self.room_paths) and self.room_share > 0
        num_different = 1 + sum(speed != 1 for speed in self.speeds)
        if self.num_variants > num_different and not has_noise and not has_room:
            raise ValueError(
                f"num_variants is {self.num_variants}, but without noise or rooms the speeds {self.speeds} "
                f"make {num_different} different one(s)"
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the version of this module, all settings, and the noise and room files by what they hold.

        It is computed once, so what a pickled object brings to a worker is what the driver saw. "" for one variant,
        whatever else is set: nothing is done to the clips then.

        Raises:
            RunError: A file cannot be read.
        """
        if self.num_variants == 1:
            return ""
        seen = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("noise_paths", "room_paths"):
            seen[name] = [_content(path) for path in seen[name]]
        for name in ("speeds", "noise_snr_db", "noise_share", "room_share"):  # 1 and 1.0 are the same setting
            seen[name] = np.asarray(seen[name], dtype=float).tolist() if seen[name] is not None else None
        return hashlib.sha256(json.dumps([VERSION, seen], sort_keys=True).encode()).hexdigest()

    def speed(self, variant: int) -> float:
        """Speed of a variant, before ``augment`` looks at the clip's length."""
        others = sorted(self.speeds, key=lambda speed: speed == 1)
        return others[(variant - 1) % len(others)] if variant else 1.0


NONE = WaveformAugmentation()


def augment(
    samples: np.ndarray,
    rate_hz: int,
    variant: int,
    clip_key: str,
    how: WaveformAugmentation,
    *,
    max_sec: float = float("inf"),
) -> np.ndarray:
    """Make one variant of a clip: its speed, then a room, then noise, and at last a level that does not clip.

    Args:
        samples: float32, shape (num_samples,), at least one, finite. Not modified, but may be what is returned.
        rate_hz: Their rate.
        variant: Which one, from 0, under ``how.num_variants``. 0 returns the clip as it is.
        clip_key: What the clip is known by (a hash of its bytes, say); clips with other keys draw otherwise.
        how: The settings.
        max_sec: Longest clip wanted. A variant that its speed would make longer keeps the speed of the clip, so that
            no answer is cut off; it still gets its room and noise.
    Returns:
        float32, shape (round(num_samples / speed),), finite, at least one sample; and for variants from 1 on within
        [-1, 1].
    Raises:
        ValueError: There is no such variant.
        RunError: A noise or room file cannot be decoded.
    """
    if not 0 <= variant < how.num_variants:
        raise ValueError(f"variant is {variant}, not one of {how.num_variants}")
    if variant == 0:
        return samples
    key = hashlib.sha256(clip_key.encode("utf-8", "surrogatepass")).digest()
    sequence = np.random.SeedSequence([how.seed, variant, *np.frombuffer(key, "<u4").tolist()])
    # A stream for each, so that rooms can be added without a change of noise.
    for_room, for_noise = (np.random.Generator(np.random.PCG64(child)) for child in sequence.spawn(2))
    samples = _limited(samples)
    samples = _at_speed(samples, how.speed(variant), max_sec * rate_hz)
    if how.room_paths and for_room.random() < how.room_share:
        samples = _in_room(samples, _recording(_one_of(how.room_paths, for_room), rate_hz))
    if how.noise_snr_db is not None and for_noise.random() < how.noise_share:
        snr_db = for_noise.uniform(*how.noise_snr_db)
        samples = _with_noise(samples, _noise(len(samples), rate_hz, how.noise_paths, for_noise), snr_db)
    return _limited(samples)


def list_audio(folder: str) -> tuple[str, ...]:
    """Find the audio files below a folder, hidden ones aside.

    Returns:
        Absolute paths, sorted, so that the same files in another place are drawn alike.
    Raises:
        RunError: There is no such folder, or no audio in it.
    """
    if not Path(folder).is_dir():
        raise RunError(f"{folder}: no such folder")
    base = Path(os.path.abspath(folder))
    found = sorted(
        path
        for path in base.rglob("*")
        if path.suffix.lower() in AUDIO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(base).parts)
    )
    if not found:
        raise RunError(f"{folder}: no audio file in this folder ({' '.join(sorted(AUDIO_SUFFIXES))})")
    return tuple(map(str, found))


def _content(path: str) -> str:
    """Hash of a file. The suffix belongs to it: it says how the bytes are read (``.pcm`` has no header)."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() + Path(path).suffix.lower()
    except OSError as error:
        raise RunError(f"{path}: cannot read this noise or room file: {error.strerror}") from error


@lru_cache(maxsize=RECORDINGS_KEPT)
def _recording(path: str, rate_hz: int) -> np.ndarray:
    """A noise or room file; that it is damaged is no fault of the row that it is drawn for, so it is no ``BadRow``."""
    try:
        part = Part(duration_sec=RECORDING_SEC) if header_seconds(path) > RECORDING_SEC else WHOLE
        samples = decode(path, rate_hz, part=part)
    except (ValueError, OSError) as error:  # BadRow is a ValueError
        raise RunError(f"{path}: cannot use this noise or room file: {error}") from error
    samples.flags.writeable = False
    return samples


def _one_of(paths: tuple[str, ...], rng: np.random.Generator) -> str:
    return paths[int(rng.integers(len(paths)))]


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def _limited(samples: np.ndarray) -> np.ndarray:
    """Turn the whole clip down until its peak is 1, if it is above: ratios of levels, such as the SNR, stay."""
    peak = np.abs(samples).max()
    return samples / peak if peak > 1 else samples


def _at_speed(samples: np.ndarray, speed: float, max_samples: float) -> np.ndarray:
    """Play a clip faster or slower, which moves its pitch too, as ``sox speed`` does.

    Source: Ko et al. 2015, "Audio augmentation for speech recognition", who found 0.9, 1.0 and 1.1.
    """
    if speed == 1 or (speed < 1 and int(len(samples) / speed + 0.5) > max_samples):
        return samples
    return soxr.resample(samples, speed, 1.0, quality="HQ")


def _in_room(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Play a clip in a room.

    The loudest tap counts as the direct path and moves to time 0, so that words stay where they are; what rings on
    behind the clip's end is cut off. The level (RMS) stays the clip's, since that of a response means nothing.

    Source: as lhotse's ``ReverbWithImpulseResponse``.
    """
    direct, length = int(np.abs(response).argmax()), len(samples)
    first = max(0, direct - length + 1)  # taps that reach no sample of this clip are left out
    taps = response[first : direct + length]
    loudest = np.abs(taps).max()
    if loudest == 0 or _rms(samples) < SILENT_RMS:
        return samples
    wet = _convolve(samples, taps / loudest)[direct - first :][:length]
    level = _rms(wet)
    return wet * np.float32(_rms(samples) / level) if level >= SILENT_RMS else samples


def _convolve(samples: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Full convolution by overlapping blocks, all of which are transformed in one call."""
    num_samples, overlap = len(samples), len(taps) - 1
    size = 1 << (min(BLOCK_PER_RESPONSE * len(taps), num_samples + overlap) - 1).bit_length()
    step = size - overlap
    num_blocks = -(-num_samples // step)
    blocks_BS = np.zeros((num_blocks, step), np.float32)
    blocks_BS.reshape(-1)[:num_samples] = samples
    wet_BN = np.fft.irfft(np.fft.rfft(blocks_BS, size) * np.fft.rfft(taps, size), size)
    sums = np.zeros((num_blocks + -(-size // step)) * step, np.float32)
    for start in range(0, size, step):  # twice, mostly: a block and what overlaps the next one
        part_BS = wet_BN[:, start : start + step]
        sums[start : start + num_blocks * step].reshape(num_blocks, step)[:, : part_BS.shape[1]] += part_BS
    return sums[: num_samples + overlap]


def _noise(num_samples: int, rate_hz: int, paths: tuple[str, ...], rng: np.random.Generator) -> np.ndarray:
    """White noise, or a stretch of a random file; a file that is too short goes round from a random place."""
    if not paths:
        return rng.standard_normal(num_samples, dtype=np.float32)
    recording = _recording(_one_of(paths, rng), rate_hz)
    spare = len(recording) - num_samples
    if spare >= 0:
        start = int(rng.integers(spare + 1))
        return recording[start : start + num_samples]
    return np.resize(np.roll(recording, -int(rng.integers(len(recording)))), num_samples)


def _with_noise(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise so far under the clip's level (RMS over all of it); next to silence, of either, there is no such."""
    level, noise_level = _rms(samples), _rms(noise)
    if level < SILENT_RMS or noise_level < SILENT_RMS:
        return samples
    return samples + noise * np.float32(level / noise_level * 10 ** (-snr_db / 20))


@dataclass(frozen=True)
class SpecAugment:
    """Masks on log-mel features: none by default.

    Attributes:
        freq_masks: Bands of mel bins that are masked.
        freq_mask_bins: Most bins of a band.
        time_masks: Stretches of frames that are masked.
        time_mask_frames: Most frames of a stretch (10 ms each).
        time_mask_share: Largest share of the valid frames that one stretch covers.
    Raises:
        ValueError: A value is out of range.
    """

    freq_masks: int = 0
    freq_mask_bins: int = 27
    time_masks: int = 0
    time_mask_frames: int = 100
    time_mask_share: float = 0.05

    def __post_init__(self) -> None:
        for name in ("freq_masks", "freq_mask_bins", "time_masks", "time_mask_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, under 0")
        if not 0 <= self.time_mask_share <= 1:
            raise ValueError(f"time_mask_share is {self.time_mask_share}, not a share")

    def __bool__(self) -> bool:
        """Whether anything can be masked."""
        in_time = self.time_masks and self.time_mask_frames and self.time_mask_share
        return bool((self.freq_masks and self.freq_mask_bins) or in_time)


def spec_augment(mel_KF: np.ndarray, how: SpecAugment, rng: np.random.Generator) -> np.ndarray:
    """Mask bands of bins and stretches of frames with the clip's mean.

    Widths are drawn evenly from 0 to the largest, places evenly from where they fit; masks may overlap. They are not
    filled with 0, since log-mel features are not centred: in Whisper's, 0 is a power of 1e-4, a level like any other.

    Args:
        mel_KF: Valid frames only, float32 or float16; no frames at all are fine.
        how: The masks.
        rng: Where the draws come from.
    Returns:
        A new array of the same shape and type.
    Source: Park et al. 2019, "SpecAugment", without time warping, which they found to matter least.
    """
    masked_KF = mel_KF.copy()
    if masked_KF.size == 0:
        return masked_KF
    num_frames, num_bins = mel_KF.shape
    mean = mel_KF.mean(dtype=np.float32)
    for _ in range(how.freq_masks):
        start, end = _mask(num_bins, how.freq_mask_bins, rng)
        masked_KF[:, start:end] = mean
    for _ in range(how.time_masks):
        start, end = _mask(num_frames, min(how.time_mask_frames, int(how.time_mask_share * num_frames)), rng)
        masked_KF[start:end] = mean
    return masked_KF


def _mask(size: int, widest: int, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(min(widest, size) + 1))
    start = int(rng.integers(size - width + 1))
    return start, start + width
