"""Any audio file -> mono float32 samples at the model's rate.

libsndfile (soundfile) decodes wav, flac, mp3, ogg, opus, aiff and more. FFmpeg (PyAV) decodes the rest: m4a, aac, webm,
mp4.
"""

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import soundfile

from voxray.audio.cut_off import (
    HEAD_BYTES,
    MAX_CUT_SEC,
    OGG,
    AudioFile,
    damaged_seconds,
    missing_share,
    seconds_by_packets,
)
from voxray.audio.ffmpeg import NO_LENGTH, decoded_frames, open_ffmpeg, packet_seconds
from voxray.audio.mix import BLOCK_VALUES, Mixer
from voxray.core.errors import BadRow, one_line
from voxray.core.lfs import POINTER, POINTER_START

FFMPEG_SUFFIXES = {".m4a", ".aac", ".mp4", ".webm", ".wma", ".mov", ".3gp", ".mka", ".opus"}
"""FFmpeg is tried first for these. libsndfile reads only Opus of them, at half of FFmpeg's speed."""
AUDIO_SUFFIXES = FFMPEG_SUFFIXES | {".wav", ".flac", ".mp3", ".ogg", ".oga", ".aif", ".aiff", ".au", ".snd", ".caf"}
AUDIO_SUFFIXES |= {".w64", ".sph", ".pcm"}
PCM_RATE_HZ = 16_000
PCM_SCALE = 32_768  # of 16-bit samples
NO_SAMPLES = "no samples"
COUNTED = ("MP3", "OGG")
"""Formats of which libsndfile may count only some of the samples."""
MAX_PLANES = 8
"""PyAV crashes on frames with a plane for each of this many channels. Interleaving them is slower."""
MAX_MISSING_SEC = 0.5
"""How much earlier than the requested segment a file may end. The times in corpora are rounded."""


@dataclass(frozen=True)
class Part:
    """The part of a file to decode.

    Attributes:
        start_sec: Start in the file.
        duration_sec: Length; 0 takes everything from the start.
        channel: Channel to read, from 0; -1 averages all channels.
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
        BadRow: See ``decode_native``; or the clip is shorter than one sample at that rate (``audio_empty``).
    """
    samples, _ = _decode(path, raw, part, max_sec, sample_rate_hz)
    if len(samples) == 0:
        raise BadRow("audio_empty", f"{path} is shorter than one sample at {sample_rate_hz} Hz")
    return np.ascontiguousarray(samples, dtype=np.float32)


def resampled_length(num_samples: int, rate_hz: int, sample_rate_hz: int) -> int:
    """Number of samples after resampling, as ``decode`` returns them. soxr rounds to the nearest integer, halves up.

    Raises:
        BadRow: No sample is left (``audio_empty``), as in ``decode``.
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
        path: The file. Its suffix decides which decoder is tried first. ``.pcm`` is headerless 16-bit mono at 16 kHz.
        raw: The file's bytes, if they are in memory. Otherwise only what ``part`` needs is read from the file.
        part: The part of the file to decode.
        max_sec: Longest clip accepted. Checked before resampling, since a header may claim a rate of 1 Hz.
    Returns:
        Samples, float32, shape (num_samples,), and their rate in Hz.
    Raises:
        BadRow: The file cannot be decoded (``audio_unreadable``), has no sample in that part (``audio_empty``), is
            too long (``audio_too_long``), ends before the part does (``audio_too_short``; ``audio_cut_off`` if its
            header states that there is more), lacks a part that damage took away (``audio_cut_off``), lacks the
            channel (``audio_channel``) or has NaN or infinite samples (``audio_not_finite``).
        FileNotFoundError: The file is missing.
    """
    return _decode(path, raw, part, max_sec, 0)


def _decode(path: str, raw: bytes | None, part: Part, max_sec: float, sample_rate_hz: int) -> tuple[np.ndarray, int]:
    """Decode a clip at ``sample_rate_hz``, or at its own rate if that is 0; returns the file's rate, too."""
    audio_file = _open_audio(path, raw)
    faults = []
    for decoder in _decoders(audio_file.suffix):
        mixer = Mixer(path, part.channel, sample_rate_hz)
        try:
            rate_hz = decoder(audio_file, part, max_sec, mixer)
            break
        except BadRow:
            raise
        # MemoryError: a damaged header can promise terabytes
        except (soundfile.LibsndfileError, OSError, ValueError, RuntimeError, MemoryError) as error:
            message = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
            faults.append(one_line(message) or type(error).__name__)
    else:
        _check_whole(audio_file, float("inf"))
        if faults[0] == NO_SAMPLES:
            raise BadRow("audio_empty", f"{path} has no samples")
        raise BadRow("audio_unreadable", f"cannot decode {path}: {faults[0]}")
    _check_length(audio_file, part, mixer.num_samples / rate_hz, max_sec)
    if not mixer.is_finite:
        raise BadRow("audio_not_finite", f"{path} holds NaN or infinite samples")
    return mixer.samples(), rate_hz


def _check_length(file: AudioFile, part: Part, sec: float, max_sec: float) -> None:
    """Check the length of a decoded part in seconds against the part, the file's header and the limit.

    Raises:
        BadRow: See ``decode_native``.
    """
    path = file.path
    if not sec and not part.start_sec:
        raise BadRow("audio_empty", f"{path} has no samples")
    short_sec, end_sec = part.duration_sec - sec, part.start_sec + sec
    if not part.duration_sec or short_sec > MAX_CUT_SEC:
        _check_whole(file, end_sec, end_sec if sec <= max_sec else float("inf"))
    if sec > max_sec:
        raise BadRow(
            "audio_too_long",
            f"{path} is longer than {max_sec:g} s; only evaluate and infer accept this, for transcription",
        )
    if not sec:
        raise BadRow("audio_empty", f"{path} has no samples in this segment")
    if short_sec > MAX_MISSING_SEC:
        segment = f"the segment from {part.start_sec:g} s for {part.duration_sec:g} s"
        raise BadRow("audio_too_short", f"{path} ends at {end_sec:.2f} s, within {segment}")


def _check_whole(file: AudioFile, at_least_sec: float, end_sec: float = float("inf")) -> None:
    """Refuse a file that lacks the end of its audio, or a part in the middle.

    Args:
        at_least_sec: The file holds this many seconds or more.
        end_sec: Where the decoded audio ends, if the file was decoded to its end; infinity otherwise.
    Raises:
        BadRow: ``audio_cut_off``.
    """
    share = missing_share(file, end_sec) if file.suffix != ".pcm" else 0.0
    if share and share * at_least_sec > MAX_CUT_SEC:
        raise BadRow("audio_cut_off", f"{file.path} is cut off: the file ends before its audio does")
    if lost_sec := damaged_seconds(file, end_sec):
        raise BadRow("audio_cut_off", f"{file.path} is damaged: {lost_sec:.1f} s of its audio are missing")


def to_pcm16(samples: np.ndarray) -> np.ndarray:
    """Convert samples of full scale 1 to 16-bit integers, rounded to the nearest."""
    return np.clip(np.rint(samples * PCM_SCALE), -PCM_SCALE, PCM_SCALE - 1).astype("<i2")


def header_seconds(path: str) -> float:
    """Length of a file in seconds according to its header. The audio is not decoded.

    If the header does not state it (ADTS AAC, MP3 without a Xing header, several files in one), packets are counted.

    Raises:
        BadRow: The file is known to be cut off (``audio_cut_off``).
        OSError, ValueError: The file cannot be read, or its header has no length.
    """
    audio_file = _open_audio(path, None)
    if audio_file.suffix == ".pcm":
        return audio_file.size / 2 / PCM_RATE_HZ
    seconds = _header_seconds(audio_file)
    _check_whole(audio_file, seconds)
    return seconds


def _header_seconds(file: AudioFile) -> float:
    seconds: float | None = None
    with suppress(soundfile.LibsndfileError):
        info = soundfile.info(file.path)
        seconds = info.duration
        if info.format in COUNTED:
            seconds = seconds_by_packets(file) or seconds
    if seconds:
        return seconds
    import av
    from av.error import FFmpegError

    try:
        with open_ffmpeg(file.path) as container:
            has_length = container.format.name not in NO_LENGTH
            seconds = (container.duration or 0) / av.time_base or seconds
    except FFmpegError as error:
        if seconds is None:
            raise ValueError(str(error)) from None
        return seconds
    if not has_length:
        return packet_seconds(file.path)
    if seconds is None:
        raise ValueError(f"{file.path} does not say how long it is")
    return seconds


def _open_audio(path: str, raw: bytes | None) -> AudioFile:
    """Open a file. One that starts with 64 KiB of zeros is a failed download, which decoders would scan to its end.

    A Git LFS pointer is refused, too.

    Raises:
        BadRow: ``audio_unreadable``.
        FileNotFoundError: The file is missing.
    """
    try:
        file = AudioFile(path, raw)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadRow("audio_unreadable", f"cannot read {path}: {error.strerror}") from None
    if file.head.startswith(POINTER_START):
        raise BadRow("audio_unreadable", f"{path} is {POINTER}")
    if len(file.head) == HEAD_BYTES and not any(file.head) and file.suffix != ".pcm":
        raise BadRow("audio_unreadable", f"cannot decode {path}: it begins with {HEAD_BYTES >> 10} KiB of zeros")
    return file


def _decoders(suffix: str) -> list[Callable[[AudioFile, Part, float, Mixer], int]]:
    if suffix == ".pcm":
        return [_decode_pcm]
    return [_decode_ffmpeg, _decode_soundfile] if suffix in FFMPEG_SUFFIXES else [_decode_soundfile, _decode_ffmpeg]


class _Sound(soundfile.SoundFile):
    """A file that is read on from where the last read ended. soundfile seeks after every read, which harms MP3."""

    def seekable(self) -> bool:
        return False


def _decode_soundfile(file: AudioFile, part: Part, max_sec: float, mixer: Mixer) -> int:
    """Seeks to the part. Reads at most one second more than ``max_sec``, enough to detect that a clip is too long.

    Leaves a file to FFmpeg if the part ends after the samples that libsndfile counted, and there are more.
    """
    with _Sound(file.source) as sound:
        rate_hz = sound.samplerate
        if not sound.frames:
            raise ValueError(NO_SAMPLES)  # or a WAV of unknown length, which FFmpeg reads to its end
        length_sec = min(part.duration_sec or float("inf"), max_sec + 1)
        counted_sec = sound.frames / rate_hz
        needs_end = sound.format in COUNTED and part.start_sec + length_sec > counted_sec
        if needs_end and seconds_by_packets(file) > counted_sec + MAX_CUT_SEC:
            raise ValueError(f"libsndfile reads only {counted_sec:.2f} s of it")
        start = min(round(part.start_sec * rate_hz), sound.frames)
        is_mp3 = sound.format == "MP3"  # only its beginning can be sought exactly
        if start or is_mp3:
            sound.seek(0 if is_mp3 else start)
        for _ in _blocks(sound, start if is_mp3 else 0):
            pass
        num_samples = sound.frames - start
        if length_sec < float("inf"):
            num_samples = min(num_samples, round(length_sec * rate_hz))
        for block_NC in _blocks(sound, num_samples):
            mixer.add(block_NC, rate_hz)
        return rate_hz


def _blocks(sound: _Sound, num_samples: int) -> Iterator[np.ndarray]:
    """Read the next samples in blocks, up to the end of the file."""
    block_samples = BLOCK_VALUES // sound.channels
    while num_samples > 0:
        block_NC = sound.read(min(num_samples, block_samples), dtype="float32", always_2d=True)
        yield block_NC
        num_samples = num_samples - block_samples if len(block_NC) == block_samples else 0


def _decode_pcm(file: AudioFile, part: Part, max_sec: float, mixer: Mixer) -> int:
    """Headerless 16-bit little-endian mono at 16 kHz, as KsponSpeech stores it. An odd last byte is ignored."""
    start = 2 * round(part.start_sec * PCM_RATE_HZ)
    with file.open() as stream:
        num_bytes = max(0, stream.seek(0, io.SEEK_END) - start)
        length_sec = min(part.duration_sec or float("inf"), max_sec + 1)
        if length_sec < float("inf"):
            num_bytes = min(num_bytes, 2 * round(length_sec * PCM_RATE_HZ))
        stream.seek(start)
        samples = np.frombuffer(stream.read(num_bytes // 2 * 2), "<i2")
    mixer.add((samples.astype(np.float32) / PCM_SCALE)[:, None], PCM_RATE_HZ)
    return PCM_RATE_HZ


def _decode_ffmpeg(file: AudioFile, part: Part, max_sec: float, mixer: Mixer) -> int:
    """Seeks to the key frame before the part and stops decoding after it. As exact as the container's times (1 ms).

    A container without times is decoded from its start.
    """
    import av  # imported only where needed, since it loads all of FFmpeg
    from av.error import FFmpegError

    try:
        with open_ffmpeg(file.source) as container:
            if not container.streams.audio or container.streams.audio[0].codec_context is None:
                raise ValueError("no audio stream that FFmpeg can decode")
            stream = container.streams.audio[0]
            if not stream.rate:
                raise ValueError("a sample rate of 0")
            has_times = _has_times(file, container)
            if part.start_sec and has_times:
                container.seek(int(part.start_sec * av.time_base))
            frames, rate_hz = decoded_frames(container, stream), stream.rate
            if (first := next(frames, None)) is None:
                raise ValueError("no audio frame")
            lead_sec = part.start_sec - (first.time or 0.0 if has_times else 0.0)
            start = max(0, round(lead_sec * rate_hz)) if part != WHOLE else 0
            end = start + round(part.duration_sec * rate_hz) if part.duration_sec else sys.maxsize
            enough = (lead_sec + min(part.duration_sec or float("inf"), max_sec + 1)) * rate_hz
            at = 0
            for block_NC in _ffmpeg_blocks(chain([first], frames), first.layout.nb_channels, rate_hz, enough):
                mixer.add(block_NC[max(0, start - at) : max(0, end - at)], rate_hz)
                at += len(block_NC)
            return rate_hz
    except FFmpegError as error:  # some subclasses are neither OSError nor ValueError
        raise ValueError(str(error)) from error


def _has_times(file: AudioFile, container: Any) -> bool:
    """Whether FFmpeg can seek a time in the file. It guesses in MP3, and in Ogg each of several files starts at 0."""
    return container.format.name != "mp3" and not (file.head.startswith(OGG) and file.ogg.num_streams > 1)


def _ffmpeg_blocks(frames: Iterable[Any], num_channels: int, rate_hz: int, enough: float) -> Iterator[np.ndarray]:
    """Samples of decoded frames in blocks of shape (num_samples, num_channels), until there are ``enough``."""
    import av

    is_planar = num_channels < MAX_PLANES
    resampler = av.AudioResampler(format="fltp" if is_planar else "flt", rate=rate_hz)
    arrays: list[np.ndarray] = []
    waiting = decoded = 0

    def block_NC() -> np.ndarray:
        values = np.concatenate(arrays, axis=1)
        return values.T if is_planar else values.reshape(-1, num_channels)

    for frame in frames:
        arrays += [part.to_ndarray() for part in resampler.resample(frame)]
        waiting += frame.samples
        if arrays and waiting * num_channels >= BLOCK_VALUES:
            yield block_NC()
            arrays, waiting = [], 0
        decoded += frame.samples
        if decoded > enough:
            break
    arrays += [part.to_ndarray() for part in resampler.resample(None)]
    if arrays:
        yield block_NC()
