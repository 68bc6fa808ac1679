"""A clip is decoded in another process as in this one. A decoder that crashes, hangs or needs memory is one line."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import SPEECH

from voxray.audio import isolated
from voxray.audio.decode import decode
from voxray.audio.isolated import IsolatedDecoder
from voxray.core.errors import BadRow

SAMPLE = str(SPEECH / "sample.wav")
RATE_HZ = 22_050


@pytest.fixture
def decoder() -> Iterator[IsolatedDecoder]:
    decoder = IsolatedDecoder()
    yield decoder
    decoder.close()


def decoded(decoder: IsolatedDecoder, target: Path) -> np.ndarray:
    decoder.decode(SAMPLE, RATE_HZ, target, max_sec=60.0)
    return decode(str(target), RATE_HZ)


def refusal(decoder: IsolatedDecoder, target: Path, path: str = SAMPLE, max_sec: float = 60.0) -> str:
    with pytest.raises(BadRow) as error:
        decoder.decode(path, RATE_HZ, target, max_sec=max_sec)
    assert path in error.value.message and not target.exists()
    return error.value.reason


def test_samples_and_refusals_are_those_of_this_process(decoder: IsolatedDecoder, tmp_path: Path) -> None:
    target = tmp_path / "out.wav"
    assert np.array_equal(decoded(decoder, target), decode(SAMPLE, RATE_HZ))
    (tmp_path / "words.wav").write_text("words " * 99)
    assert refusal(decoder, tmp_path / "none.wav", str(tmp_path / "words.wav")) == "audio_unreadable"
    assert refusal(decoder, tmp_path / "none.wav", max_sec=0.5) == "audio_too_long"


@pytest.mark.parametrize("code", ["import os; os.abort()", "raise SystemExit(3)"])
def test_a_crash_is_one_line_and_the_next_clip_is_decoded(
    code: str, decoder: IsolatedDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.stdin.read(); {code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert decoder._next
    decoder._next.kill()
    monkeypatch.setattr(decoder, "_next", process)
    with pytest.raises(BadRow, match="its decoder crashed"):
        decoder.decode(SAMPLE, RATE_HZ, tmp_path / "none.wav", max_sec=60.0)
    assert len(decoded(decoder, tmp_path / "out.wav"))


def test_limits_of_time_and_memory(decoder: IsolatedDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as impatient:
        impatient.setattr(isolated, "DECODE_SEC", 0.001)
        assert refusal(decoder, tmp_path / "none.wav") == "audio_unreadable"
    soundfile.write(tmp_path / "long.flac", np.zeros(30 * 96_000), 96_000)
    with monkeypatch.context() as small:
        small.setattr(isolated, "MEMORY_BYTES", 100 << 20)
        assert refusal(decoder, tmp_path / "none.wav", str(tmp_path / "long.flac")) == "audio_unreadable"
    assert len(decoded(decoder, tmp_path / "out.wav"))


def test_a_process_that_ended_while_it_waited_is_replaced(decoder: IsolatedDecoder, tmp_path: Path) -> None:
    assert decoder._next
    decoder._next.kill()
    decoder._next.wait()
    assert len(decoded(decoder, tmp_path / "out.wav"))
