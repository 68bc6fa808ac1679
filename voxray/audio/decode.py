"""Any audio file -> mono float32 samples at the model's rate.

libsndfile (soundfile) reads what it can: wav, flac, mp3, ogg, opus, aiff and more. What it cannot, FFmpeg (PyAV) does:
m4a, aac, webm, mp4. Resampling is soxr's HQ setting everywhere, whose filter passes 7 kHz untouched and leaves no
alias.
"""

import io
from pathlib import Path

import numpy as np
import soundfile
import soxr

from voxray.manifest import BadRow

FFMPEG_SUFFIXES = {".m4a", ".aac", ".mp4", ".webm", ".wma", ".mov", ".3gp", ".mka", ".opus"}
"""Read by FFmpeg first: libsndfile cannot, except Opus, which FFmpeg decodes twice as fast."""


def decode(path: str, sample_rate_hz: int, raw: bytes | None = None, *, max_sec: float = float("inf")) -> np.ndarray:
    """Decode a clip, average its channels and resample it.

    Args:
        path: The file; its suffix decides which decoder is tried first.
        sample_rate_hz: Rate to return.
        raw: The file's bytes if they are at hand already.
        max_sec: Longest clip accepted; checked before resampling, since a header may claim a rate of 1 Hz.
    Returns:
        Samples, float32, shape (num_samples,).
    Raises:
        BadRow: The file cannot be decoded (``audio_unreadable``), holds no sample (``audio_empty``), is too long
            (``audio_too_long``) or holds NaN or infinite samples (``audio_not_finite``).
    """
    data = Path(path).read_bytes() if raw is None else raw
    decoders = [_decode_soundfile, _decode_ffmpeg]
    if Path(path).suffix.lower() in FFMPEG_SUFFIXES:
        decoders.reverse()
    faults = []
    for decoder in decoders:
        try:
            samples_NC, rate_hz = decoder(data)
            break
        # MemoryError: a damaged header can promise terabytes
        except (soundfile.LibsndfileError, OSError, ValueError, RuntimeError, MemoryError) as error:
            faults.append(" ".join(str(error).split()) or type(error).__name__)
    else:
        raise BadRow("audio_unreadable", f"cannot decode {path}: {faults[0]}")
    if len(samples_NC) == 0:
        raise BadRow("audio_empty", f"{path} holds no sample")
    if len(samples_NC) / rate_hz > max_sec:
        raise BadRow("audio_too_long", f"{path} lasts {len(samples_NC) / rate_hz:.1f} s; the model takes {max_sec:g} s")
    samples = samples_NC.mean(axis=1, dtype=np.float32) if samples_NC.shape[1] > 1 else samples_NC[:, 0]
    if not np.isfinite(samples).all():
        raise BadRow("audio_not_finite", f"{path} holds NaN or infinite samples")
    if rate_hz != sample_rate_hz:
        samples = soxr.resample(samples, rate_hz, sample_rate_hz, quality="HQ")
    if len(samples) == 0:
        raise BadRow("audio_empty", f"{path} is shorter than one sample at {sample_rate_hz} Hz")
    return np.ascontiguousarray(samples, dtype=np.float32)


def _decode_soundfile(data: bytes) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)


def _decode_ffmpeg(data: bytes) -> tuple[np.ndarray, int]:
    import av  # only for the formats that need it: it loads all of FFmpeg
    from av.error import FFmpegError

    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            if not container.streams.audio or container.streams.audio[0].codec_context is None:
                raise ValueError("no audio stream that FFmpeg can decode")
            stream = container.streams.audio[0]
            rate_hz, blocks = stream.rate, []
            resampler = av.AudioResampler(format="fltp", rate=rate_hz)
            for frame in container.decode(stream):
                blocks += [part.to_ndarray() for part in resampler.resample(frame)]
            blocks += [part.to_ndarray() for part in resampler.resample(None)]
    except FFmpegError as error:  # some of its kinds are neither OSError nor ValueError
        raise ValueError(str(error)) from error
    if not blocks:
        raise ValueError("no audio frame")
    return np.concatenate(blocks, axis=1).T, rate_hz
