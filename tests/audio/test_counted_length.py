"""Files whose header does not state how long they are: all of the audio is decoded, also if they are several in one."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.audio_files import by_ffmpeg, by_soundfile

from voxray.audio.decode import Part, decode, header_seconds

RATE_HZ = 16_000
SEC = 30.0


def noise_then_silence() -> np.ndarray:
    """Noise takes far more bytes than silence, so an estimate from the first frames is too short."""
    noise = np.random.default_rng(0).normal(0, 0.2, 5 * RATE_HZ)
    return np.concatenate([noise, np.zeros(20 * RATE_HZ), noise]).astype(np.float32)


def vbr_mp3(samples: np.ndarray) -> bytes:
    """MP3 of variable bit rate, as it is written to a pipe: without a Xing header."""
    file = by_ffmpeg(
        samples,
        RATE_HZ,
        "mp3",
        "libmp3lame",
        codec_options={"flags": "+qscale", "global_quality": "472"},
        write_xing="0",
    )
    assert b"Xing" not in file and b"Info" not in file[:1000]
    return file


FILES = {
    "vbr.mp3": vbr_mp3,
    "a.aac": lambda samples: by_ffmpeg(samples, RATE_HZ, "adts", "aac"),
    "a.mp3": lambda samples: by_soundfile(samples, RATE_HZ, "MP3"),
    "ffmpeg.mp3": lambda samples: by_ffmpeg(samples, RATE_HZ, "mp3", "libmp3lame"),
    "vorbis.ogg": lambda samples: by_soundfile(samples, RATE_HZ, "OGG", "VORBIS"),
    "opus.ogg": lambda samples: by_soundfile(samples, RATE_HZ, "OGG", "OPUS"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("copies", [1, 2])
def test_all_of_the_audio_is_decoded(name: str, copies: int, tmp_path: Path) -> None:
    samples = noise_then_silence()
    path, sec = tmp_path / name, copies * SEC
    path.write_bytes(FILES[name](samples) * copies)
    whole = decode(str(path), RATE_HZ)
    assert len(whole) / RATE_HZ == pytest.approx(sec, abs=0.25)
    assert np.array_equal(decode(str(path), RATE_HZ, path.read_bytes()), whole)
    assert header_seconds(str(path)) == pytest.approx(sec, abs=0.3)
    assert np.abs(whole[-3 * RATE_HZ :]).max() > 0.1, "the noise at the end"


@pytest.mark.parametrize("name", FILES)
def test_segments_after_the_estimated_length(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name](noise_then_silence()) * 2)
    whole = decode(str(path), RATE_HZ)
    for start_sec, duration_sec in ((0.5, 1.0), (26.0, 2.0), (31.0, 2.0), (56.5, 2.0), (57.0, 0.0)):
        segment = decode(str(path), RATE_HZ, part=Part(start_sec, duration_sec))
        start = round(start_sec * RATE_HZ)
        expected = whole[start : start + round(duration_sec * RATE_HZ)] if duration_sec else whole[start:]
        assert len(segment) == len(expected), start_sec
        before = whole[max(0, start - 1200) :]
        delays = np.correlate(before[1024 : 2400 + 5024], segment[1024:5024], "valid")  # FFmpeg seeks to a frame of AAC
        delay = int(delays.argmax()) - min(start, 1200)
        assert abs(delay) <= 600, (start_sec, delay)  # libsndfile leaves out less of the encoder's delay
        reference = whole[start + delay :][1024:5024]
        assert np.corrcoef(segment[1024:5024], reference)[0, 1] > 0.97, (start_sec, delay)


def test_an_estimate_may_be_too_long(tmp_path: Path) -> None:
    """Silence at the start takes few bytes, so an estimate from it is longer than the audio."""
    path = tmp_path / "a.mp3"
    path.write_bytes(vbr_mp3(np.roll(noise_then_silence(), 10 * RATE_HZ)))
    assert soundfile.info(path).duration > 1.2 * SEC
    assert header_seconds(str(path)) == pytest.approx(len(decode(str(path), RATE_HZ)) / RATE_HZ, abs=0.1)


def test_an_mp3_that_libsndfile_reads_to_its_end_stays_with_it() -> None:
    """Its decoder has another delay than FFmpeg's, and features of such files exist."""
    samples = np.random.default_rng(0).normal(0, 0.1, 4 * RATE_HZ).astype(np.float32)
    for options in ({}, {"write_xing": "0"}):
        raw = by_ffmpeg(samples, RATE_HZ, "mp3", "libmp3lame", **options)
        assert np.array_equal(decode("a.mp3", RATE_HZ, raw), soundfile.read(io.BytesIO(raw), dtype="float32")[0])
