"""Channels are averaged block by block: any number of them, in little memory, with the same samples as at once."""

import io
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from helpers.audio_files import by_ffmpeg, by_soundfile

from voxray.audio import decode as decoding
from voxray.audio import mix
from voxray.audio.decode import Part, decode, decode_native
from voxray.core.errors import BadRow

RATE_HZ = 16_000


def noise(num_channels: int, num_samples: int = 20_000) -> np.ndarray:
    return np.random.default_rng(num_channels).normal(0, 0.1, (num_samples, num_channels)).astype(np.float32)


def in_matroska(samples_NC: np.ndarray, codec: str = "pcm_f32le") -> bytes:
    """A file that only FFmpeg reads."""
    file, num_channels = io.BytesIO(), samples_NC.shape[1]
    layout = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}.get(num_channels, f"{num_channels} channels")
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream(codec, rate=RATE_HZ, layout=layout)
        for start in range(0, len(samples_NC), 4000):
            values = np.ascontiguousarray(samples_NC[start : start + 4000]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(values, format="flt", layout=layout)
            frame.sample_rate, frame.pts = RATE_HZ, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("num_channels", [1, 2, 6, 7, 8, 9, 16])
def test_any_number_of_channels(num_channels: int) -> None:
    """PyAV 18.1 crashes on a frame with a plane for each of 8 or more channels."""
    samples_NC = noise(num_channels)
    expected = samples_NC.mean(axis=1, dtype=np.float32) if num_channels > 1 else samples_NC[:, 0]
    for name, raw in [
        ("a.mka", in_matroska(samples_NC)),
        ("a.wav", by_soundfile(samples_NC, RATE_HZ, "WAV", "FLOAT")),
    ]:
        result, rate_hz = decode_native(name, raw)
        assert rate_hz == RATE_HZ and np.array_equal(result, expected)
        last = Part(channel=num_channels - 1)
        assert np.array_equal(decode_native(name, raw, part=last)[0], samples_NC[:, -1])
        with pytest.raises(BadRow, match=rf"{num_channels} channel\(s\), so there is no channel {num_channels}"):
            decode_native(name, raw, part=Part(channel=num_channels))


def test_eight_channels_of_a_codec_with_planes() -> None:
    time = np.arange(2 * RATE_HZ) / RATE_HZ
    tone = (0.3 * np.sin(2 * np.pi * 300 * time)).astype(np.float32)
    result, _ = decode_native("a.mka", in_matroska(np.repeat(tone[:, None], 8, axis=1), "flac"))
    assert np.abs(result[: len(tone)] - tone).max() < 1e-3


def small_blocks(monkeypatch: pytest.MonkeyPatch, num_values: int) -> None:
    for module in (mix, decoding):
        monkeypatch.setattr(module, "BLOCK_VALUES", num_values)


FILES = {
    "a.wav": lambda: by_soundfile(noise(6), RATE_HZ, "WAV"),
    "a.flac": lambda: by_soundfile(noise(3), RATE_HZ, "FLAC"),
    "a.mp3": lambda: by_soundfile(noise(2), RATE_HZ, "MP3"),
    "a.ogg": lambda: by_soundfile(noise(2), RATE_HZ, "OGG"),
    "a.m4a": lambda: by_ffmpeg(noise(2), 44_100, "ipod", "aac"),
}


@pytest.mark.parametrize("name", FILES)
def test_blocks_are_mixed_as_the_whole_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = FILES[name]()
    for part in (Part(), Part(0.1, 0.2), Part(0.3), Part(channel=1)):
        at_once = decode_native(name, raw, part=part)[0]
        with monkeypatch.context() as patch:
            small_blocks(patch, 3000)
            assert np.array_equal(decode_native(name, raw, part=part)[0], at_once), part


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize(("rate_hz", "to_hz"), [(8_000, 16_000), (44_100, 16_000), (655_350, 16_000), (17_000, 24_000)])
def test_blocks_are_resampled_as_the_whole_is(
    rate_hz: int, to_hz: int, num_channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples_NC = noise(num_channels, 50_000)
    raw = by_soundfile(samples_NC, rate_hz, "WAV", "FLOAT")
    mono = samples_NC.mean(axis=1, dtype=np.float32) if num_channels > 1 else samples_NC[:, 0]
    small_blocks(monkeypatch, 3000)
    assert np.array_equal(decode("a.wav", to_hz, raw), soxr.resample(mono, rate_hz, to_hz, quality="HQ"))


@pytest.mark.parametrize("suffix", [".flac", ".mka"])
def test_memory_is_that_of_one_channel(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file with eight channels at the highest rate of FLAC, read by either decoder."""
    small_blocks(monkeypatch, 1 << 18)
    path, rate_hz, num_sec = tmp_path / f"a{suffix}", 655_350, 4
    with soundfile.SoundFile(path, "w", rate_hz, 8, "PCM_16", format="FLAC") as file:
        for _ in range(num_sec):
            file.write(np.zeros((rate_hz, 8), np.int16))
    tracemalloc.start()
    samples, _ = decode_native(str(path))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(samples) == num_sec * rate_hz
    assert peak_bytes < 1.6 * samples.nbytes + 12 * mix.BLOCK_VALUES, "8 times the samples if all channels were kept"
    tracemalloc.start()
    samples = decode(str(path), RATE_HZ)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(samples) == num_sec * RATE_HZ
    assert peak_bytes < 3 * samples.nbytes + 12 * mix.BLOCK_VALUES, "40 times the samples before they are resampled"


def test_the_part_before_a_segment_of_an_mp3_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeking in MP3 is not exact, so what comes before the segment is decoded too."""
    small_blocks(monkeypatch, 1 << 18)
    soundfile.write(tmp_path / "a.mp3", np.zeros(600 * RATE_HZ, np.float32), RATE_HZ)
    tracemalloc.start()
    decode_native(str(tmp_path / "a.mp3"), part=Part(598.0, 1.0))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 3 * 4 * mix.BLOCK_VALUES


def test_a_clip_of_absurdly_many_samples_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "MAX_VALUES", 10_000)
    for name, raw in [("a.wav", FILES["a.wav"]()), ("a.mka", in_matroska(noise(2)))]:
        with pytest.raises(BadRow, match="over 10,000 samples in") as error:
            decode_native(name, raw)
        assert error.value.reason == "audio_too_long"


@pytest.mark.parametrize(("rate_hz", "num_channels"), [(16_000, 1), (22_050, 2), (44_100, 1)])
def test_segments_of_an_mp3_are_exact(rate_hz: int, num_channels: int) -> None:
    """A decoder that seeks to the segment lacks the bits that earlier frames hold for it: a click at its start."""
    steps = np.random.default_rng(0).normal(0, 0.01, (5 * rate_hz, num_channels))
    raw = by_soundfile(steps.cumsum(axis=0).clip(-0.9, 0.9).astype(np.float32), rate_hz, "MP3")
    whole = decode_native("a.mp3", raw)[0]
    for start_sec in (0.05, 1.3, 3.1):
        start = round(start_sec * rate_hz)
        assert np.array_equal(decode_native("a.mp3", raw, part=Part(start_sec, 1.0))[0], whole[start:][:rate_hz])
