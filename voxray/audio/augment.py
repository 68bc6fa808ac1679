"""Augmentation: fixed variants of a clip's samples, and random masks on its features (SpecAugment).

A variant depends only on the clip, its key, the variant's number and the settings, not on the worker, the order or the
process. It can therefore be cached; ``fingerprint`` is the cache key. Masks are drawn anew at every use.

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

from voxray.audio.decode import AUDIO_SUFFIXES, WHOLE, Part, decode, header_seconds
from voxray.core.errors import RunError

VERSION = 1  # increase whenever the same settings would give different samples
SLOWEST, FASTEST = 0.5, 2.0  # beyond these speech is not natural, and clips could become empty
SILENT_RMS = 1e-8  # -160 dB of full scale, as in quality.py; a signal below it has no level to scale noise to
MAX_CACHED_RECORDINGS = 32  # of 60 s at 16 kHz: at most 32 x 60 x 16,000 x 4 B = 117 MiB per process
RECORDING_SEC = 60.0  # only the first 60 s of a noise or room file are used
BLOCK_RESPONSES = 4  # FFT blocks of 4 impulse responses: 1.5 to 3 times as fast as one FFT over the whole clip


@dataclass(frozen=True)
class WaveformAugmentation:
    """How the variants of a clip differ. By default the only variant is the clip itself.

    Attributes:
        num_variants: Variants of each clip. Variant 0 is the unchanged clip.
        speeds: Factors of both tempo and pitch; 1.0 leaves them unchanged. Variants from 1 on cycle through them, 1.0
            last, since variant 0 has that speed. So (0.9, 1.0, 1.1) with three variants is Kaldi's threefold data.
        noise_snr_db: Lowest and highest signal-to-noise ratio in dB, drawn uniformly; None adds no noise.
        noise_paths: Noise files; without any the noise is white.
        room_paths: Files with a room's impulse response.
        noise_share: Probability that a variant has noise.
        room_share: Probability that a variant has reverberation. A variant with neither differs only in speed.
        seed: Seed of all random draws.
    Raises:
        ValueError: A value is out of range, or settings have no effect: files that no variant would use, or more
            variants than can differ.
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
        """SHA-256 of this module's version, all settings, and the content of the noise and room files.

        It is computed once: workers unpickle the value that the driver computed. "" for one variant, since the clips
        are then unchanged, whatever the other settings are.

        Raises:
            RunError: A file cannot be read.
        """
        if self.num_variants == 1:
            return ""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("noise_paths", "room_paths"):
            values[name] = [_hash_content(path) for path in values[name]]
        for name in ("speeds", "noise_snr_db", "noise_share", "room_share"):  # 1 and 1.0 are the same setting
            values[name] = np.asarray(values[name], dtype=float).tolist() if values[name] is not None else None
        return hashlib.sha256(json.dumps([VERSION, values], sort_keys=True).encode()).hexdigest()

    def speed(self, variant: int) -> float:
        """Speed of a variant. ``augment`` does not apply it to a clip that it would make too long."""
        ordered_speeds = sorted(self.speeds, key=lambda speed: speed == 1)  # 1 last, since variant 0 has it already
        return ordered_speeds[(variant - 1) % len(ordered_speeds)] if variant else 1.0


NO_AUGMENTATION = WaveformAugmentation()


def augment(
    samples: np.ndarray,
    rate_hz: int,
    variant: int,
    clip_key: str,
    config: WaveformAugmentation,
    *,
    max_sec: float = float("inf"),
) -> np.ndarray:
    """Make one variant of a clip: change its speed, add reverberation, add noise, and limit its peak to 1.

    Args:
        samples: float32, shape (num_samples,), at least one, finite. Not modified, but may be returned.
        rate_hz: Sample rate.
        variant: Number of the variant, from 0, below ``config.num_variants``. 0 returns the unchanged clip.
        clip_key: Identifies the clip (such as a hash of its bytes). Clips with different keys get different draws.
        config: The settings.
        max_sec: Longest clip allowed. If the new speed would make the clip longer, it keeps its own speed, so that no
            answer is cut off. Reverberation and noise are still added.
    Returns:
        float32, shape (round(num_samples / speed),), finite, at least one sample. Variants from 1 on are within
        [-1, 1].
    Raises:
        ValueError: There is no such variant.
        RunError: A noise or room file cannot be decoded.
    """
    if not 0 <= variant < config.num_variants:
        raise ValueError(f"variant is {variant}, not one of {config.num_variants}")
    if variant == 0:
        return samples
    key = hashlib.sha256(clip_key.encode("utf-8", "surrogatepass")).digest()
    sequence = np.random.SeedSequence([config.seed, variant, *np.frombuffer(key, "<u4").tolist()])
    # Separate random streams, so that adding rooms does not change the noise.
    room_rng, noise_rng = (np.random.Generator(np.random.PCG64(child)) for child in sequence.spawn(2))
    samples = _limit_peak(samples)
    samples = _change_speed(samples, config.speed(variant), max_sec * rate_hz)
    if config.room_paths and room_rng.random() < config.room_share:
        samples = _reverberate(samples, _load_recording(_draw_path(config.room_paths, room_rng), rate_hz))
    if config.noise_snr_db is not None and noise_rng.random() < config.noise_share:
        snr_db = noise_rng.uniform(*config.noise_snr_db)
        samples = _add_noise(samples, _draw_noise(len(samples), rate_hz, config.noise_paths, noise_rng), snr_db)
    return _limit_peak(samples)


def list_audio(folder: str) -> tuple[str, ...]:
    """List the audio files below a folder, except hidden ones.

    Returns:
        Absolute paths, sorted, so that draws do not change if the folder is moved.
    Raises:
        RunError: The folder does not exist, or has no audio file.
    """
    if not Path(folder).is_dir():
        raise RunError(f"{folder}: no such folder")
    absolute = Path(os.path.abspath(folder))
    paths = sorted(
        path
        for path in absolute.rglob("*")
        if path.suffix.lower() in AUDIO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(absolute).parts)
    )
    if not paths:
        raise RunError(f"{folder}: no audio file in this folder ({' '.join(sorted(AUDIO_SUFFIXES))})")
    return tuple(map(str, paths))


def _hash_content(path: str) -> str:
    """Hash of a file's content, and its suffix, which decides how the bytes are read (``.pcm`` has no header)."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() + Path(path).suffix.lower()
    except OSError as error:
        raise RunError(f"{path}: cannot read this noise or room file: {error.strerror}") from error


@lru_cache(maxsize=MAX_CACHED_RECORDINGS)
def _load_recording(path: str, rate_hz: int) -> np.ndarray:
    """Read a noise or room file. A damaged one is a ``RunError``: it is not the fault of the row it is drawn for."""
    try:
        part = Part(duration_sec=RECORDING_SEC) if header_seconds(path) > RECORDING_SEC else WHOLE
        samples = decode(path, rate_hz, part=part)
    except (ValueError, OSError) as error:  # BadRow is a ValueError
        raise RunError(f"{path}: cannot use this noise or room file: {error}") from error
    samples.flags.writeable = False
    return samples


def _draw_path(paths: tuple[str, ...], rng: np.random.Generator) -> str:
    return paths[int(rng.integers(len(paths)))]


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def _limit_peak(samples: np.ndarray) -> np.ndarray:
    """Scale the whole clip down to a peak of 1 if it exceeds that. Ratios of levels, such as the SNR, do not change."""
    peak = np.abs(samples).max()
    return samples / peak if peak > 1 else samples


def _change_speed(samples: np.ndarray, speed: float, max_samples: float) -> np.ndarray:
    """Play a clip faster or slower, which also changes its pitch, as ``sox speed`` does.

    Source: Ko et al. 2015, "Audio augmentation for speech recognition", who recommend 0.9, 1.0 and 1.1.
    """
    if speed == 1 or (speed < 1 and int(len(samples) / speed + 0.5) > max_samples):
        return samples
    return soxr.resample(samples, speed, 1.0, quality="HQ")


def _reverberate(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Convolve a clip with a room's impulse response.

    The loudest tap is taken as the direct path and moved to time 0, so words keep their times. Reverberation after the
    clip's end is cut off. The clip keeps its level (RMS), since the level of a response has no meaning.

    Source: as lhotse's ``ReverbWithImpulseResponse``.
    """
    direct, length = int(np.abs(response).argmax()), len(samples)
    first = max(0, direct - length + 1)  # skip taps that reach no sample of this clip
    taps = response[first : direct + length]
    loudest = np.abs(taps).max()
    if loudest == 0 or _rms(samples) < SILENT_RMS:
        return samples
    wet = _convolve(samples, taps / loudest)[direct - first :][:length]
    level = _rms(wet)
    return wet * np.float32(_rms(samples) / level) if level >= SILENT_RMS else samples


def _convolve(samples: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Full convolution by overlap-add. All blocks are transformed in one call."""
    num_samples, overlap = len(samples), len(taps) - 1
    size = 1 << (min(BLOCK_RESPONSES * len(taps), num_samples + overlap) - 1).bit_length()
    step = size - overlap
    num_blocks = -(-num_samples // step)
    blocks_BS = np.zeros((num_blocks, step), np.float32)
    blocks_BS.reshape(-1)[:num_samples] = samples
    wet_BN = np.fft.irfft(np.fft.rfft(blocks_BS, size) * np.fft.rfft(taps, size), size)
    sums = np.zeros((num_blocks + -(-size // step)) * step, np.float32)
    for start in range(0, size, step):  # mostly two rounds: the block itself and its overlap with the next block
        part_BS = wet_BN[:, start : start + step]
        sums[start : start + num_blocks * step].reshape(num_blocks, step)[:, : part_BS.shape[1]] += part_BS
    return sums[: num_samples + overlap]


def _draw_noise(num_samples: int, rate_hz: int, paths: tuple[str, ...], rng: np.random.Generator) -> np.ndarray:
    """White noise, or a random excerpt of a random file. A file that is too short repeats from a random offset."""
    if not paths:
        return rng.standard_normal(num_samples, dtype=np.float32)
    recording = _load_recording(_draw_path(paths, rng), rate_hz)
    max_start = len(recording) - num_samples
    if max_start >= 0:
        start = int(rng.integers(max_start + 1))
        return recording[start : start + num_samples]
    return np.resize(np.roll(recording, -int(rng.integers(len(recording)))), num_samples)


def _add_noise(samples: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise at an SNR (RMS over the whole clip). If the clip or the noise is silent, the clip is unchanged."""
    level, noise_level = _rms(samples), _rms(noise)
    if level < SILENT_RMS or noise_level < SILENT_RMS:
        return samples
    return samples + noise * np.float32(level / noise_level * 10 ** (-snr_db / 20))


@dataclass(frozen=True)
class SpecAugment:
    """Masks on log-mel features. The default has none.

    Attributes:
        freq_masks: Number of frequency masks.
        freq_mask_bins: Largest width of a frequency mask, in mel bins.
        time_masks: Number of time masks.
        time_mask_frames: Largest width of a time mask, in frames of 10 ms.
        time_mask_share: Largest width of a time mask, as a share of the valid frames.
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


def spec_augment(mel_KF: np.ndarray, config: SpecAugment, rng: np.random.Generator) -> np.ndarray:
    """Replace random bands of bins and ranges of frames by the clip's mean.

    Widths are drawn uniformly from 0 to the largest, positions uniformly from those that fit. Masks may overlap. They
    are not filled with 0, since log-mel features are not centred: in Whisper's, 0 is a power of 1e-4, a normal level.

    Args:
        mel_KF: Valid frames only, float32 or float16; may have no frames.
        config: The masks.
        rng: Random generator.
    Returns:
        A new array of the same shape and type.
    Source: Park et al. 2019, "SpecAugment", without time warping, which they report to matter least.
    """
    masked_KF = mel_KF.copy()
    if masked_KF.size == 0:
        return masked_KF
    num_frames, num_bins = mel_KF.shape
    mean = mel_KF.mean(dtype=np.float32)
    for _ in range(config.freq_masks):
        start, end = _draw_mask(num_bins, config.freq_mask_bins, rng)
        masked_KF[:, start:end] = mean
    for _ in range(config.time_masks):
        start, end = _draw_mask(num_frames, min(config.time_mask_frames, int(config.time_mask_share * num_frames)), rng)
        masked_KF[start:end] = mean
    return masked_KF


def _draw_mask(size: int, max_width: int, rng: np.random.Generator) -> tuple[int, int]:
    width = int(rng.integers(min(max_width, size) + 1))
    start = int(rng.integers(size - width + 1))
    return start, start + width
