"""Ogg and Matroska files that lack a part in the middle: decoders go on after it, so positions in the file tell."""

import glob
import io
import itertools
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from conftest import ASSETS
from helpers.audio_files import by_ffmpeg, by_soundfile

from voxray.audio.decode import Part, decode
from voxray.audio.ogg import read_ogg
from voxray.core.errors import BadRow

RATE_HZ = 16_000
SEC = 6.0


def noise(rate_hz: int = 48_000) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(SEC * rate_hz)).astype(np.float32)


FILES = {
    "vorbis.ogg": lambda: by_soundfile(noise(), 48_000, "OGG", "VORBIS"),
    "opus.ogg": lambda: by_soundfile(noise(), 48_000, "OGG", "OPUS"),
    "a.opus": lambda: by_ffmpeg(noise(), 48_000, "ogg", "libopus"),
    "a.mka": lambda: by_ffmpeg(noise(), 48_000, "matroska", "libopus"),
    "aac.mka": lambda: by_ffmpeg(noise(), 48_000, "matroska", "aac"),
    "a.webm": lambda: by_ffmpeg(noise(), 48_000, "webm", "libopus"),
}


def zeroed(raw: bytes) -> bytes:
    start, end = round(0.45 * len(raw)), round(0.55 * len(raw))
    return raw[:start] + bytes(end - start) + raw[end:]


def shortened(raw: bytes) -> bytes:
    return raw[: round(0.4 * len(raw))] + raw[round(0.6 * len(raw)) :]


@pytest.mark.parametrize("name", FILES)
def test_damage_in_the_middle_is_refused(name: str, tmp_path: Path) -> None:
    raw, path = FILES[name](), tmp_path / name
    whole = decode(name, RATE_HZ, raw)
    assert len(whole) / RATE_HZ == pytest.approx(SEC, abs=0.05)
    for part in (Part(0.5), Part(3.0), Part(5.5), Part(0.5, 5.49), Part(1.0, 5.2)):
        path.write_bytes(raw)
        expected = round((part.duration_sec or SEC) * RATE_HZ)
        assert 0 < len(decode(str(path), RATE_HZ, part=part)) <= expected
    for damaged in (zeroed(raw), shortened(raw)):
        path.write_bytes(damaged)
        for options in ({}, {"raw": damaged}, {"part": Part(0.5)}):
            with pytest.raises(BadRow) as error:
                decode(str(path), RATE_HZ, **options)
            assert error.value.reason in ("audio_cut_off", "audio_unreadable")
        assert len(decode(str(path), RATE_HZ, part=Part(0.2, 1.0))) == RATE_HZ, "what lies before the damage"


def test_the_message_says_how_much_is_missing() -> None:
    with pytest.raises(BadRow, match=r"a.opus is damaged: \d\.\d s of its audio are missing") as error:
        decode("a.opus", RATE_HZ, zeroed(FILES["a.opus"]()))
    assert error.value.reason == "audio_cut_off"


def test_whole_pages_state_the_length_of_all_clips() -> None:
    for path in glob.glob(f"{ASSETS}/speech/*/*.ogg")[::5]:
        with open(path, "rb") as file:
            pages = read_ogg(file)
        assert pages.num_streams == 1 and not pages.is_damaged
        assert pages.seconds == soundfile.info(path).duration


def _pages(raw: bytes) -> list[bytes]:
    starts = [at for at in range(len(raw)) if raw.startswith(b"OggS\0", at)] + [len(raw)]
    return [raw[start:end] for start, end in itertools.pairwise(starts)]


@pytest.mark.parametrize("name", ["vorbis.ogg", "a.opus"])
def test_a_recorded_broadcast_is_whole(name: str) -> None:
    """It starts with the headers and goes on at a late position."""
    pages = _pages(FILES[name]())
    late = b"".join(pages[:2] + pages[4:])
    assert 0.3 * SEC < len(decode(name, RATE_HZ, late)) / RATE_HZ < SEC
    assert len(decode("a.mka", RATE_HZ, by_ffmpeg(noise(), 48_000, "matroska", "libopus", live="1"))) > 5 * RATE_HZ


def with_a_gap(container: str) -> bytes:
    """A call in which a microphone was off for 3 s: the times leap, but nothing is missing."""
    file = io.BytesIO()
    with av.open(io.BytesIO(FILES["a.opus"]())) as source, av.open(file, "w", format=container) as output:
        stream = output.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None and not 2.0 < packet.dts * packet.time_base < 5.0:
                packet.stream = stream
                output.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize(("name", "container"), [("a.opus", "ogg"), ("a.mka", "matroska")])
def test_a_recording_with_gaps_is_whole(name: str, container: str) -> None:
    assert 2.5 * RATE_HZ < len(decode(name, RATE_HZ, with_a_gap(container))) < 4 * RATE_HZ
