"""A file that lacks the end of its audio is refused; a whole one is not, also if it states no length."""

import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers.audio_files import by_ffmpeg, by_soundfile, sound

from voxray.audio.decode import Part, decode, header_seconds
from voxray.core.errors import BadRow

RATE_HZ = 16_000
SEC = 4.0


def noise(rate_hz: int) -> np.ndarray:
    """Takes several pages of Ogg, unlike a chord."""
    return np.random.default_rng(0).normal(0, 0.1, round(SEC * rate_hz)).astype(np.float32)


FILES = {
    "a.wav": lambda: by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "WAV"),
    "float.wav": lambda: by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "WAVEX", "FLOAT"),
    "adpcm.wav": lambda: by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "WAV", "IMA_ADPCM"),
    "rf64.wav": lambda: by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "RF64", "PCM_16"),
    "a.w64": lambda: by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "W64", "PCM_16"),
    "a.aiff": lambda: by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "AIFF", "PCM_16"),
    "a.au": lambda: by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "AU", "PCM_16"),
    "a.caf": lambda: by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "CAF", "PCM_16"),
    "a.sph": lambda: by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "NIST", "PCM_16"),
    "a.mp3": lambda: by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "MP3"),
    "ffmpeg.mp3": lambda: by_ffmpeg(sound(44_100, SEC), 44_100, "mp3", "libmp3lame"),
    "vorbis.ogg": lambda: by_soundfile(noise(RATE_HZ), RATE_HZ, "OGG", "VORBIS"),
    "opus.ogg": lambda: by_soundfile(sound(48_000, SEC), 48_000, "OGG", "OPUS"),
    "a.opus": lambda: by_ffmpeg(sound(48_000, SEC), 48_000, "ogg", "libopus"),
    "a.m4a": lambda: by_ffmpeg(sound(44_100, SEC), 44_100, "mp4", "aac"),
    "fragments.mp4": lambda: by_ffmpeg(
        sound(44_100, SEC), 44_100, "mp4", "aac", movflags="empty_moov+default_base_moof", frag_duration="1000000"
    ),
    "a.webm": lambda: by_ffmpeg(sound(48_000, SEC), 48_000, "webm", "libopus"),
}


def _half(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def reason(name: str, raw: bytes | None = None, **options: Part) -> str:
    with pytest.raises(BadRow) as error:
        decode(name, RATE_HZ, raw, **options)
    assert "\n" not in str(error.value) and name in str(error.value)
    return error.value.reason


@pytest.mark.parametrize("name", FILES)
def test_a_cut_off_file_is_refused_and_a_whole_one_is_not(name: str, tmp_path: Path) -> None:
    raw, path = FILES[name](), tmp_path / name
    assert abs(len(decode(name, RATE_HZ, raw)) - SEC * RATE_HZ) < 0.1 * RATE_HZ
    path.write_bytes(raw)
    assert header_seconds(str(path)) == pytest.approx(SEC, abs=0.1)
    for share in (0.3, 0.5, 0.9):
        path.write_bytes(raw[: int(share * len(raw))])
        assert reason(name, path.read_bytes()) == reason(str(path)) == "audio_cut_off", share


def test_a_cut_off_flac_is_refused(tmp_path: Path) -> None:
    """Decoders fail within a frame. Between two frames they only find that the file ends."""
    raw = by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "FLAC")
    assert len(decode("a.flac", RATE_HZ, raw)) == SEC * RATE_HZ
    assert reason("a.flac", _half(raw)) == "audio_unreadable"
    frames = [at for at in range(len(raw)) if raw[at : at + 2] == raw[raw.rindex(b"\xff\xf8") :][:2]]
    assert reason("a.flac", raw[: frames[len(frames) // 2]]) == "audio_cut_off"


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "vorbis.ogg"])
def test_segments_of_a_cut_off_file(name: str, tmp_path: Path) -> None:
    """What is there can be used. A segment that reaches further is refused, and so is one up to the end."""
    raw, path = FILES[name](), str(tmp_path / name)
    Path(path).write_bytes(_half(raw))
    assert len(decode(path, RATE_HZ, part=Part(0.1, 0.6))) == 0.6 * RATE_HZ
    for part in (Part(0.2, 3.0), Part(1.0), Part(3.5, 0.4), Part(3.5)):
        assert reason(path, part=part) == "audio_cut_off", part
    Path(path).write_bytes(raw)
    assert reason(path, part=Part(0.2, 5.0)) == "audio_too_short"


def test_a_long_recording_that_is_cut_off_is_not_split_into_chunks(tmp_path: Path) -> None:
    """Otherwise it is answered up to where it ends. Of an MP3, whose length is the stated one, the last chunk fails."""
    for name in ("a.wav", "vorbis.ogg", "a.webm"):
        path = tmp_path / name
        path.write_bytes(_half(FILES[name]()))
        with pytest.raises(BadRow) as error:
            decode(str(path), RATE_HZ, max_sec=1.0)
        assert error.value.reason == "audio_cut_off"
        with pytest.raises(BadRow, match="cut off"):
            header_seconds(str(path))
    (tmp_path / "a.mp3").write_bytes(_half(FILES["a.mp3"]()))
    assert header_seconds(str(tmp_path / "a.mp3")) == pytest.approx(SEC, abs=0.1)


def test_a_tenth_of_a_second_may_be_missing() -> None:
    raw = FILES["a.wav"]()
    assert len(decode("a.wav", RATE_HZ, raw[: -2 * 1500])) == SEC * RATE_HZ - 1500
    assert reason("a.wav", raw[: -2 * 1700]) == "audio_cut_off"


UNKNOWN = [0, 0xFFFF_FFFF, 0xFFFF_FFFF - 36, 0xFFFF_FFFF - 44, 0x7FFF_FFFF, 0x7FFF_F000, 0x7FFF_FFDB, 0x8000_0000]


@pytest.mark.parametrize("size", UNKNOWN)
def test_a_wav_of_unknown_length_is_read_to_its_end(size: int) -> None:
    """Programs that write to a pipe cannot correct the sizes in the header afterwards."""
    raw = bytearray(by_soundfile(sound(RATE_HZ, SEC), RATE_HZ, "WAV"))
    for riff in (size, min(size + 36, 0xFFFF_FFFF)):
        raw[4:8], raw[40:44] = struct.pack("<I", riff), struct.pack("<I", size)
        assert len(decode("a.wav", RATE_HZ, bytes(raw))) == SEC * RATE_HZ


def test_other_files_of_unknown_length_are_read_to_their_end() -> None:
    for name, at, unknown in [
        ("a.au", 8, b"\xff" * 4),
        ("a.caf", FILES["a.caf"]().index(b"data") + 4, struct.pack(">q", -1)),
        ("a.aiff", FILES["a.aiff"]().index(b"SSND") + 4, struct.pack(">I", 0x7F00_0008)),
    ]:
        raw = FILES[name]()
        changed = raw[:at] + unknown + raw[at + len(unknown) :]
        assert np.array_equal(decode(name, RATE_HZ, changed), decode(name, RATE_HZ, raw)), name
    live = by_ffmpeg(sound(48_000, SEC), 48_000, "webm", "libopus", live="1")
    assert len(decode("a.webm", RATE_HZ, live)) > 0.9 * SEC * RATE_HZ


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_whole_mp3_files_of_all_rates(rate_hz: int) -> None:
    for seconds, channels in itertools.product((0.3, 2.0), (1, 2)):
        samples = np.stack([sound(rate_hz, seconds)] * channels, axis=1).squeeze()
        for raw in (by_soundfile(samples, rate_hz, "MP3"), *_ffmpeg_mp3(samples, rate_hz)):
            for name in ("a.mp3", "a.m4a"):  # with each of the decoders
                assert len(decode(name, RATE_HZ, raw)) >= (seconds - 0.1) * RATE_HZ


def _ffmpeg_mp3(samples: np.ndarray, rate_hz: int) -> list[bytes]:
    if rate_hz < 16_000:
        return []
    return [by_ffmpeg(samples, rate_hz, "mp3", "libmp3lame", **options) for options in ({}, {"id3v2_version": "4"})]


def test_half_an_mp3_that_states_no_length_is_whole() -> None:
    raw = by_ffmpeg(sound(44_100, SEC), 44_100, "mp3", "libmp3lame", write_xing="0")
    half = len(decode("a.mp3", RATE_HZ, _half(raw)))
    assert 0.4 < half / (SEC * RATE_HZ) < 0.6


def test_tags_before_and_after_the_audio() -> None:
    mp3 = FILES["a.mp3"]()
    tag = b"ID3\x04\0\0" + bytes([0, 0, 8, 0]) + bytes(1024)
    after = b"TAG" + bytes(125)
    for name in ("a.mp3", "a.wav", "vorbis.ogg", "a.m4a"):
        raw = FILES[name]()
        assert np.array_equal(decode(name, RATE_HZ, raw + after), decode(name, RATE_HZ, raw)), name
    assert np.array_equal(decode("a.mp3", RATE_HZ, tag + tag + mp3 + after), decode("a.mp3", RATE_HZ, mp3))
    assert reason("a.mp3", tag + _half(mp3)) == "audio_cut_off"


def test_ogg_streams() -> None:
    """One after the other, shortened at the last page, and with a last page that has no audio."""
    raw = FILES["vorbis.ogg"]()
    last = raw.rindex(b"OggS")
    assert reason("a.ogg", raw[:last]) == reason("a.ogg", raw[:-1]) == "audio_cut_off"
    opus = FILES["a.opus"]()
    chained = decode("a.opus", RATE_HZ, opus + opus)
    assert len(chained) >= SEC * RATE_HZ
    assert reason("a.opus", opus + _half(opus)) == "audio_cut_off"
