"""Decoding: every format gives the same audio at the model's rate, and every damaged file a bad row with a reason."""

import io
import itertools
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from helpers.audio_files import by_ffmpeg, by_soundfile, sound

from voxray.audio.decode import FFMPEG_SUFFIXES, Part, decode, header_seconds, resampled_length
from voxray.core.errors import BadRow

RATE_HZ = 16_000


def best_correlation(result: np.ndarray, expected: np.ndarray, max_delay: int = 0) -> float:
    """Correlation at the best delay within ``max_delay`` samples."""
    best = 0.0
    for delay in range(-max_delay, max_delay + 1):
        left, right = result[max(delay, 0) :], expected[max(-delay, 0) :]
        size = min(len(left), len(right))
        best = max(best, float(np.corrcoef(left[:size], right[:size])[0, 1]))
    return best


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_wav_at_the_target_rate_is_not_resampled(subtype: str):
    raw = by_soundfile(sound(RATE_HZ), RATE_HZ, "WAV", subtype)
    result = decode("a.wav", RATE_HZ, raw)
    expected = soundfile.read(io.BytesIO(raw), dtype="float32")[0]
    assert np.array_equal(result, expected)
    assert result.dtype == np.float32 and result.ndim == 1 and result.flags.c_contiguous


def test_channels_are_averaged_and_then_resampled():
    left = sound(8000)
    stereo = np.stack([left, -0.5 * left], axis=1)
    raw = by_soundfile(stereo, 8000, "WAV", "FLOAT")
    expected = soxr.resample(stereo.mean(axis=1, dtype=np.float32), 8000, RATE_HZ, quality="HQ")
    result = decode("a.wav", RATE_HZ, raw)
    assert np.array_equal(result, expected) and len(result) == 16_000
    assert best_correlation(result, sound(RATE_HZ)) > 0.9999
    three = by_soundfile(np.stack([left, left, left], axis=1), 8000, "WAV", "FLOAT")
    assert np.allclose(decode("a.wav", 8000, three), left, atol=1e-7)


@pytest.mark.parametrize(("rate_hz", "kind"), [(48_000, "FLAC"), (44_100, "FLAC"), (22_050, "WAV"), (11_025, "AIFF")])
def test_resampling_is_soxr_hq(rate_hz: int, kind: str):
    raw = by_soundfile(sound(rate_hz), rate_hz, kind)
    original = soundfile.read(io.BytesIO(raw), dtype="float32")[0]
    result = decode(f"a.{kind.lower()}", RATE_HZ, raw)
    assert np.array_equal(result, soxr.resample(original, rate_hz, RATE_HZ, quality="HQ"))
    assert best_correlation(result, sound(RATE_HZ)) > 0.999


def test_downsampling_has_no_aliasing():
    time = np.arange(48_000) / 48_000
    tone = (0.5 * np.sin(2 * np.pi * 9000 * time)).astype(np.float32)  # above what 16 kHz can hold
    result = decode("a.wav", RATE_HZ, by_soundfile(tone, 48_000, "WAV", "FLOAT"))
    assert np.abs(result[500:-500]).max() < 1e-5


CODED = {
    "a.ogg": lambda: by_soundfile(sound(44_100), 44_100, "OGG", "VORBIS"),
    "a.opus": lambda: by_soundfile(sound(48_000), 48_000, "OGG", "OPUS"),
    "a.mp3": lambda: by_soundfile(sound(44_100), 44_100, "MP3"),
    "a.m4a": lambda: by_ffmpeg(sound(44_100), 44_100, "ipod", "aac"),
    "a.mp4": lambda: by_ffmpeg(sound(22_050), 22_050, "mp4", "aac"),
    "a.aac": lambda: by_ffmpeg(sound(RATE_HZ), RATE_HZ, "adts", "aac"),
    "a.webm": lambda: by_ffmpeg(sound(48_000), 48_000, "webm", "libopus"),
    "stereo.m4a": lambda: by_ffmpeg(np.stack([sound(44_100)] * 2, axis=1), 44_100, "ipod", "aac"),
}


@pytest.mark.parametrize("name", CODED)
def test_coded_formats_keep_the_sound(name: str, tmp_path: Path):
    raw = CODED[name]()
    result = decode(name, RATE_HZ, raw)
    assert abs(len(result) - 16_000) <= 1600  # codecs add a frame or two of silence
    assert best_correlation(result, sound(RATE_HZ), max_delay=1100) > 0.99
    assert 0.3 < np.abs(result).max() < 0.6
    (tmp_path / name).write_bytes(raw)
    assert np.array_equal(decode(str(tmp_path / name), RATE_HZ), result)
    # The suffix only decides which decoder is tried first: with a wrong one the other decoder succeeds.
    assert best_correlation(decode("wrong.wav", RATE_HZ, raw), sound(RATE_HZ), max_delay=1100) > 0.99
    assert best_correlation(decode("wrong.m4a", RATE_HZ, raw), sound(RATE_HZ), max_delay=1100) > 0.99


def test_channels_of_a_coded_clip_are_averaged():
    stereo = np.stack([sound(44_100), np.zeros(44_100, np.float32)], axis=1)
    peak = np.abs(decode("a.m4a", RATE_HZ, by_ffmpeg(stereo, 44_100, "ipod", "aac"))).max()
    assert 0.15 < peak < 0.3


def test_suffixes_are_case_insensitive():
    assert ".opus" in FFMPEG_SUFFIXES
    raw = CODED["a.opus"]()
    assert np.array_equal(decode("A.OPUS", RATE_HZ, raw), decode("a.opus", RATE_HZ, raw))


def test_a_clip_of_one_sample():
    raw = by_soundfile(np.array([0.25], np.float32), RATE_HZ, "WAV", "FLOAT")
    assert decode("a.wav", RATE_HZ, raw).tolist() == [0.25]


# -- files that are not audio


def refusal(name: str, raw: bytes) -> tuple[str, str]:
    with pytest.raises(BadRow) as error:
        decode(name, RATE_HZ, raw)
    assert name in str(error.value) and "\n" not in str(error.value)
    return error.value.reason, str(error.value)


def wav(**changes: tuple[int, bytes]) -> bytes:
    """One second of 16-bit mono with bytes of the header replaced."""
    raw = bytearray(by_soundfile(sound(RATE_HZ), RATE_HZ, "WAV", "PCM_16"))
    for start, value in changes.values():
        raw[start : start + len(value)] = value
    return bytes(raw)


def video_only() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for part in (av.VideoFrame(16, 16, "yuv420p"), None):
            output.mux(stream.encode(part))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "raw", "reason"),
    [
        ("a.wav", b"", "audio_unreadable"),
        ("a.m4a", b"", "audio_unreadable"),
        ("a.wav", b"<html>404</html>" * 50, "audio_unreadable"),
        ("a.webm", bytes(5000), "audio_unreadable"),
        ("a.mp4", video_only(), "audio_unreadable"),
        ("a.wav", wav(rate=(24, struct.pack("<I", 0))), "audio_unreadable"),
        ("a.wav", wav(channels=(22, struct.pack("<H", 0))), "audio_unreadable"),
        ("a.wav", wav()[:44], "audio_cut_off"),
        ("a.wav", wav(size=(40, bytes(4)))[:44], "audio_empty"),
        ("a.wav", by_soundfile(np.array([1.0, np.nan], np.float32), RATE_HZ, "WAV", "FLOAT"), "audio_not_finite"),
        ("a.wav", by_soundfile(np.array([[1, np.inf], [0, 0]], np.float32), 8000, "WAV", "FLOAT"), "audio_not_finite"),
        ("a.wav", by_soundfile(np.ones(2, np.float32), 192_000, "WAV", "FLOAT"), "audio_empty"),
    ],
    ids=itertools.count(),  # a float WAV holds the second it was written in: two test processes would disagree
)
def test_files_that_are_not_audio(name: str, raw: bytes, reason: str):
    assert refusal(name, raw)[0] == reason


def test_a_missing_file_raises_file_not_found(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        decode(str(tmp_path / "none.wav"), RATE_HZ)


def test_a_header_with_too_many_samples():
    """A file whose length was unknown is decoded up to its end. 2^36 samples of FLAC must not allocate 256 GiB."""
    assert len(decode("a.wav", RATE_HZ, wav(size=(40, struct.pack("<I", 2**31 - 1))))) == 16_000
    flac = bytearray(by_soundfile(sound(RATE_HZ), RATE_HZ, "FLAC"))
    flac[21] |= 0x0F
    flac[22:26] = b"\xff" * 4
    assert len(decode("a.flac", RATE_HZ, bytes(flac))) == 16_000


@pytest.mark.parametrize("name", [*CODED, "a.wav", "a.flac"])
def test_damaged_files_are_bad_rows_or_samples(name: str):
    """With any bytes changed or missing, the result is samples or a BadRow."""
    plain = {"a.wav": wav, "a.flac": lambda: by_soundfile(sound(RATE_HZ), RATE_HZ, "FLAC")}
    raw = {**CODED, **plain}[name]()
    random = np.random.default_rng(len(raw))
    rate_bytes = range(24, 28) if name == "a.wav" else range(0)  # a rate of 1 Hz would give hours of audio
    for attempt in range(40):
        damaged = np.frombuffer(raw, np.uint8).copy()
        if attempt % 4 == 0:
            damaged = damaged[: random.integers(len(raw))]
        else:
            head = len(raw) if attempt % 2 else 400
            offsets = [offset for offset in random.integers(head, size=20) if offset not in rate_bytes]
            damaged[offsets] = random.integers(256, size=len(offsets))
        try:
            samples = decode(name, RATE_HZ, damaged.tobytes())
        except BadRow as error:
            assert error.reason.startswith("audio_")
        else:
            assert len(samples) and np.isfinite(samples).all()


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_a_segment_is_that_part_of_the_whole(tmp_path, name):
    """A segment equals the same range of samples of the whole file."""
    generator = np.random.default_rng(0)
    soundfile.write(tmp_path / name, np.cumsum(generator.normal(0, 0.01, 8 * 16_000)).clip(-0.9, 0.9), 16_000)
    whole = decode(str(tmp_path / name), 16_000)
    part = decode(str(tmp_path / name), 16_000, part=Part(3.3, 2.1))
    assert len(part) == 33_600 and np.array_equal(part, whole[52_800:86_400])
    assert np.array_equal(decode(str(tmp_path / name), 16_000, part=Part(7.5)), whole[120_000:])
    with pytest.raises(BadRow) as error:
        decode(str(tmp_path / name), 16_000, part=Part(9.0, 1.0))
    assert error.value.reason == "audio_empty"


def test_one_channel_of_several(tmp_path):
    both = np.stack([np.full(1_600, 0.25), np.full(1_600, -0.5)], axis=1)
    soundfile.write(tmp_path / "a.wav", both, 16_000, subtype="FLOAT")
    assert decode(str(tmp_path / "a.wav"), 16_000, part=Part(channel=1))[0] == -0.5
    assert decode(str(tmp_path / "a.wav"), 16_000)[0] == -0.125
    with pytest.raises(BadRow, match=r"2 channel\(s\), so there is no channel 2"):
        decode(str(tmp_path / "a.wav"), 16_000, part=Part(channel=2))


def test_headerless_pcm_with_an_odd_byte(tmp_path):
    (tmp_path / "a.pcm").write_bytes(np.array([0, 16_384, -32_768], "<i2").tobytes() + b"x")
    assert decode(str(tmp_path / "a.pcm"), 16_000).tolist() == [0.0, 0.5, -1.0]


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 192_000])
def test_resampled_length_agrees_with_decode(rate_hz: int) -> None:
    """Also at half samples, and for a clip too short to leave a sample."""
    for count in (*range(1, 40), 4_409, 4_410, 4_411, 99_999, 123_457):
        raw = by_soundfile(np.zeros(count, np.float32), rate_hz, "WAV")
        try:
            expected = len(decode("a.wav", RATE_HZ, raw))
        except BadRow as error:
            assert error.reason == "audio_empty"
            with pytest.raises(BadRow, match="shorter than one sample"):
                resampled_length(count, rate_hz, RATE_HZ)
        else:
            assert resampled_length(count, rate_hz, RATE_HZ) == expected


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_container_that_is_called_pcm_is_read_as_what_it_is(kind: str, tmp_path: Path) -> None:
    """Headerless samples have no rate; a WAV at 8 kHz called .pcm would be read twice as fast, after a click."""
    samples = np.sin(np.arange(8_000) / 7).astype(np.float32) / 2
    raw = by_soundfile(samples, 8_000, kind)
    path = tmp_path / "a.pcm"
    path.write_bytes(raw)
    assert np.array_equal(decode(str(path), RATE_HZ), decode(f"a.{kind.lower()}", RATE_HZ, raw))
    assert header_seconds(str(path)) == 1.0
