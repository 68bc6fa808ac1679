"""Any audio file -> mono float32 samples at the model's rate.

libsndfile (soundfile) reads what it can: wav, flac, mp3, ogg, opus, aiff and more. What it cannot, FFmpeg (PyAV) does:
m4a, aac, webm, mp4. Resampling is soxr's HQ setting everywhere, whose filter passes 7 kHz untouched and leaves no
alias.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from voxray.manifest import BadRow

FFMPEG_SUFFIXES = {".m4a", ".aac", ".mp4", ".webm", ".wma", ".mov", ".3gp", ".mka", ".opus"}
"""Read by FFmpeg first: libsndfile cannot, except Opus, which FFmpeg decodes twice as fast."""
PCM_RATE_HZ = 16_000


@dataclass(frozen=True)
class Part:
    """The part of a file that is wanted.

    Attributes:
        start_sec: Where it begins.
        duration_sec: How long it is; 0 takes all that follows.
        channel: Channel to take, from 0; -1 averages all.
    """

    start_sec: float = 0.0
    duration_sec: float = 0.0
    channel: int = -1


WHOLE = Part()


def decode(
    path: str,
    sample_rate_hz: int,
    raw: bytes | None = None,
    *,
    part: Part = WHOLE,
    max_sec: float = float("inf"),
) -> np.ndarray:
    """Decode a clip, average its channels and resample it.

    Args:
        path, raw, part, max_sec: See ``decode_native``.
        sample_rate_hz: Rate to return.
    Returns:
        Samples, float32, shape (num_samples,).
    Raises:
        BadRow: As ``decode_native``; or the clip is shorter than one sample at that rate (``audio_empty``).
    """
    samples, rate_hz = decode_native(path, raw, part=part, max_sec=max_sec)
    if rate_hz != sample_rate_hz:
        samples = soxr.resample(samples, rate_hz, sample_rate_hz, quality="HQ")
    if len(samples) == 0:
        raise BadRow("audio_empty", f"{path} is shorter than one sample at {sample_rate_hz} Hz")
    return np.ascontiguousarray(samples, dtype=np.float32)


def resampled_length(num_samples: int, rate_hz: int, sample_rate_hz: int) -> int:
    """Samples that ``decode`` returns of a clip with so many at ``rate_hz``: soxr rounds to the nearest, halves up.

    Raises:
        BadRow: That is none (``audio_empty``), as in ``decode``.
    """
    length = int(num_samples * sample_rate_hz / rate_hz + 0.5)
    if length == 0:
        raise BadRow("audio_empty", f"the clip is shorter than one sample at {sample_rate_hz} Hz")
    return length


def decode_native(
    path: str, raw: bytes | None = None, *, part: Part = WHOLE, max_sec: float = float("inf")
) -> tuple[np.ndarray, int]:
    """Decode a clip at its own rate and average its channels.

    Args:
        path: The file; its suffix decides which decoder is tried first. ``.pcm`` is headerless 16-bit mono at 16 kHz.
        raw: The file's bytes if they are at hand already; else only what ``part`` needs is read from the file.
        part: What to take of the file.
        max_sec: Longest clip accepted; checked before resampling, since a header may claim a rate of 1 Hz.
    Returns:
        Samples, float32, shape (num_samples,), and their rate in Hz.
    Raises:
        BadRow: The file cannot be decoded (``audio_unreadable``), holds no sample in that part (``audio_empty``), is
            too long (``audio_too_long``), lacks the channel (``audio_channel``) or holds NaN or infinite samples
            (``audio_not_finite``).
        OSError: The file is missing.
    """
    if raw is None:
        Path(path).stat()  # that a file is missing is for the caller to say
    faults = []
    for decoder in _decoders(path):
        try:
            samples_NC, rate_hz = decoder(path if raw is None else io.BytesIO(raw), part, max_sec)
            break
        # MemoryError: a damaged header can promise terabytes
        except (soundfile.LibsndfileError, OSError, ValueError, RuntimeError, MemoryError) as error:
            faults.append(" ".join(str(error).split()) or type(error).__name__)
    else:
        raise BadRow("audio_unreadable", f"cannot decode {path}: {faults[0]}")
    if len(samples_NC) == 0:
        raise BadRow("audio_empty", f"{path} holds no sample" + (" in this segment" if part != WHOLE else ""))
    if len(samples_NC) / rate_hz > max_sec:
        raise BadRow("audio_too_long", f"{path} lasts {len(samples_NC) / rate_hz:.1f} s; the limit is {max_sec:g} s")
    samples = _one_channel(samples_NC, part.channel, path)
    if not np.isfinite(samples).all():
        raise BadRow("audio_not_finite", f"{path} holds NaN or infinite samples")
    return samples, rate_hz


def _decoders(path: str) -> list[Callable[[Any, Part, float], tuple[np.ndarray, int]]]:
    suffix = Path(path).suffix.lower()
    if suffix == ".pcm":
        return [_decode_pcm]
    return [_decode_ffmpeg, _decode_soundfile] if suffix in FFMPEG_SUFFIXES else [_decode_soundfile, _decode_ffmpeg]


def _one_channel(samples_NC: np.ndarray, channel: int, path: str) -> np.ndarray:
    num_channels = samples_NC.shape[1]
    if channel >= num_channels:
        raise BadRow("audio_channel", f"{path} has {num_channels} channel(s), so there is no channel {channel}")
    if channel >= 0:
        return samples_NC[:, channel]
    return samples_NC.mean(axis=1, dtype=np.float32) if num_channels > 1 else samples_NC[:, 0]


def _decode_soundfile(file: Any, part: Part, max_sec: float) -> tuple[np.ndarray, int]:
    """Seeks to the part; reads one second more than the limit at most, enough to tell that a clip is too long."""
    with soundfile.SoundFile(file) as sound:
        rate_hz = sound.samplerate
        start = min(round(part.start_sec * rate_hz), sound.frames)
        if sound.format == "MP3":
            sound.read(start, dtype="float32")  # seeking lands beside the sample that is asked for
        elif start:
            sound.seek(start)
        wanted = round(part.duration_sec * rate_hz) if part.duration_sec else -1
        limit = round((max_sec + 1) * rate_hz) if max_sec < float("inf") else -1
        lengths = [length for length in (wanted, limit) if length >= 0]
        return sound.read(min(lengths, default=-1), dtype="float32", always_2d=True), rate_hz


def _decode_pcm(file: Any, part: Part, max_sec: float) -> tuple[np.ndarray, int]:
    """Headerless 16-bit little-endian mono at 16 kHz, as KsponSpeech stores it; an odd last byte is left out."""
    data = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
    samples = np.frombuffer(data, "<i2", count=len(data) // 2)
    start = round(part.start_sec * PCM_RATE_HZ)
    end = start + round(part.duration_sec * PCM_RATE_HZ) if part.duration_sec else None
    return (samples[start:end].astype(np.float32) / 32_768)[:, None], PCM_RATE_HZ


def _decode_ffmpeg(file: Any, part: Part, max_sec: float) -> tuple[np.ndarray, int]:
    """Seeks to the key frame before the part and stops decoding behind it, exact to the container's times (1 ms)."""
    import av  # only for the formats that need it: it loads all of FFmpeg
    from av.error import FFmpegError

    blocks: list[np.ndarray] = []
    try:
        opened: Any = av.open(file, mode="r")
        with opened as container:
            if not container.streams.audio or container.streams.audio[0].codec_context is None:
                raise ValueError("no audio stream that FFmpeg can decode")
            stream = container.streams.audio[0]
            rate_hz, first_sec, decoded = stream.rate, None, 0
            length_sec = min(part.duration_sec or float("inf"), max_sec + 1)
            if part.start_sec:
                container.seek(int(part.start_sec * av.time_base))
            resampler = av.AudioResampler(format="fltp", rate=rate_hz)
            for frame in container.decode(stream):
                first_sec = (frame.time or 0.0) if first_sec is None else first_sec
                blocks += [made.to_ndarray() for made in resampler.resample(frame)]
                decoded += frame.samples
                if first_sec + decoded / rate_hz > part.start_sec + length_sec:
                    break
            blocks += [made.to_ndarray() for made in resampler.resample(None)]
    except FFmpegError as error:  # some of its kinds are neither OSError nor ValueError
        raise ValueError(str(error)) from error
    if not blocks:
        raise ValueError("no audio frame")
    samples_NC = np.concatenate(blocks, axis=1).T
    if part == WHOLE:
        return samples_NC, rate_hz
    start = max(0, round((part.start_sec - (first_sec or 0.0)) * rate_hz))
    end = start + round(part.duration_sec * rate_hz) if part.duration_sec else None
    return samples_NC[start:end], rate_hz
