"""Recordings that are too long for the model: how they are split, and how the texts of their chunks are joined."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import TINY
from helpers.audio_files import by_ffmpeg

from voxray.audio.decode import Part, decode
from voxray.core.errors import BadRow
from voxray.core.manifest import Sample
from voxray.core.tasks import TASKS
from voxray.generation.join_chunks import join_chunk_rows, join_texts
from voxray.generation.long_audio import MAX_CHUNKS, OVERLAP_SEC, overlap_share, split_into_chunks
from voxray.models.front_end import FrontEnd
from voxray.models.registry import get_family


@pytest.fixture
def front_end(monkeypatch: pytest.MonkeyPatch) -> FrontEnd:
    voxtral = get_family(TINY).front_end(TINY)
    monkeypatch.setattr(type(voxtral), "max_audio_sec", 40.0)
    return voxtral


def recording(folder: Path, sec: float) -> Sample:
    soundfile.write(folder / "a.wav", np.zeros(int(sec * 16_000), np.float32), 16_000)
    return Sample("a", TASKS["asr"], "", "", str(folder / "a.wav"), "ko", "m:1")


@pytest.mark.parametrize("sec", [40.1, 75.0, 75.1, 200.0, 1234.5])
def test_chunks_cover_the_recording_and_overlap(tmp_path: Path, front_end: FrontEnd, sec: float) -> None:
    parts = split_into_chunks(recording(tmp_path, sec), front_end, 10_000)
    ends = [part.start_sec + part.duration_sec for part in parts]
    assert parts[0].start_sec == 0 and ends[-1] == pytest.approx(sec, abs=0.002)
    assert {part.duration_sec for part in parts} == {40.0}
    overlaps = [end - part.start_sec for end, part in zip(ends, parts[1:], strict=False)]
    assert min(overlaps) >= OVERLAP_SEC - 0.002
    assert len(parts) == 2 or len(parts) - 1 < (sec - OVERLAP_SEC) / (40 - OVERLAP_SEC), "no more than needed"
    assert overlap_share(parts) == pytest.approx(overlaps[0] / 40, abs=1e-3)


def test_segments_and_token_limits(tmp_path: Path, front_end: FrontEnd) -> None:
    sample = recording(tmp_path, 200)
    parts = split_into_chunks(replace(sample, start_sec=50, duration_sec=100), front_end, 10_000)
    assert parts[0].start_sec == 50 and parts[-1].start_sec + parts[-1].duration_sec == pytest.approx(150)
    short = split_into_chunks(sample, front_end, 200)  # 50 positions for 4 s
    assert {part.duration_sec for part in short} == {10.0}
    assert all(len(front_end.prompt_ids(part, int(part.duration_sec * 16_000))) <= 200 for part in short)
    with pytest.raises(BadRow, match="not even a chunk of 2 s is within --max_len 20"):
        split_into_chunks(sample, front_end, 20)
    with pytest.raises(BadRow, match=f"over {MAX_CHUNKS} chunks"):
        split_into_chunks(replace(sample, duration_sec=1e8), front_end, 10_000)


def test_chunks_of_a_recording_whose_header_states_no_length(tmp_path: Path, front_end: FrontEnd) -> None:
    """FFmpeg estimates the length of ADTS AAC from its first frames, where noise takes more bytes than silence."""
    noise = np.random.default_rng(0).normal(0, 0.3, 8 * 16_000)
    samples = np.concatenate([noise, np.zeros(100 * 16_000), noise]).astype(np.float32)
    path = tmp_path / "a.aac"
    path.write_bytes(by_ffmpeg(samples, 16_000, "adts", "aac"))
    sample = replace(recording(tmp_path, 1), audio_path=str(path))
    parts = split_into_chunks(sample, front_end, 10_000)
    assert len(parts) == 4 and parts[-1].start_sec + parts[-1].duration_sec == pytest.approx(116, abs=0.3)
    last = decode(str(path), 16_000, part=Part(parts[-1].start_sec, parts[-1].duration_sec))
    assert len(last) == 40 * 16_000 and np.abs(last[-4 * 16_000 :]).max() > 0.1


@pytest.mark.parametrize("sec", [39.0, 40.0, 40.0001])
def test_chunks_never_start_at_the_same_time(tmp_path: Path, front_end: FrontEnd, sec: float) -> None:
    """A header may state less audio than the file holds. The row was refused because the audio is too long."""
    sample = recording(tmp_path, 1)
    if sec > 40:
        parts = split_into_chunks(replace(sample, duration_sec=sec), front_end, 10_000)
        assert [part.start_sec for part in parts] == [0, 0.01]
        return
    with pytest.raises(BadRow, match=f"longer than 40 s, but its header states {sec:.2f} s") as error:
        split_into_chunks(replace(sample, duration_sec=sec), front_end, 10_000)
    assert error.value.reason == "audio_too_long"


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["환자는 어제부터 열이 나고", "열이 나고 기침을 합니다"], "환자는 어제부터 열이 나고 기침을 합니다"),
        (["a b c the patient has", "patient has a fever now x"], "a b c the patient has a fever now x"),
        # a word cut at the border is complete in the other chunk
        (["어제부터 열이 나고 기치", "열이 나고 기침을 합니다"], "어제부터 열이 나고 기침을 합니다"),
        # the spacing differs, so no word is equal
        (["환자는 혈압이높아서", "혈압이 높아서요 약을"], "환자는 혈압이높아서요 약을"),
        (["약은 하루세번드세요", "두번하루세번드세요 그리고"], "약은 하루세번드세요 그리고"),
        (["one two", "three four"], "one two three four"),
        (["", "three four"], "three four"),
        (["one two", "", "four"], "one two four"),
        (["Has A Fever,", "has a fever and coughs"], "Has A Fever, and coughs"),
    ],
)
def test_texts_are_joined_at_their_longest_match(texts: list[str], joined: str) -> None:
    assert join_texts(texts, 0.4) == joined


def test_only_the_overlap_is_searched() -> None:
    """Joining many chunks gives the original text; a phrase repeated outside the overlap is kept twice."""
    words = [f"w{number}" for number in range(300)]
    parts = [words[start : start + 40] for start in range(0, 260, 35)]
    assert join_texts((" ".join(part) for part in parts), 5 / 40).split() == words[: 35 * (len(parts) - 1) + 40]
    refrain = "약을 드세요 " * 30
    first, second = f"{refrain} 하나 둘 셋 넷 다섯", f"다섯 여섯 일곱 여덟 아홉 열 {refrain}"
    assert join_texts([first, second], 0.02).count("약을") == 60


def test_a_recording_with_a_missing_chunk_is_left_out() -> None:
    part = {"chunk_of": "m:1", "num_chunks": 2, "overlap_share": 0.5, "whole_samples": 9, "id": "a", "source": "l:1"}
    part |= {"sec": 1.0, "num_new_tokens": 2, "hit_max": False}
    parts = [{**part, "chunk": 1, "prediction": "둘 셋 넷 다섯"}, {**part, "chunk": 0, "prediction": "하나 둘 셋 넷"}]
    other = {"chunk_of": None, "id": "b", "source": "m:2"}
    assert join_chunk_rows([parts[0], other]) == [other]
    [first, row] = join_chunk_rows([*parts, other])
    assert first == other and row["prediction"] == "하나 둘 셋 넷 다섯"
    assert (row["source"], row["num_samples"], row["sec"], row["num_new_tokens"]) == ("m:1", 9, 2.0, 4)
