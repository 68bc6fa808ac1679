"""Corpora as people reported them: quotes in tables, codes of languages, encodings, mistyped pairs, two talkers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import write_rows
from helpers.bad_input import RATE, noise
from helpers.corpora import lines, prepare

COLUMNS = (
    "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale segment"
)
HEADER = "\t".join(COLUMNS.split())


def run(tmp_path: Path, corpus: Path) -> tuple[list[dict], list[dict], dict]:
    """Training rows, ledger and summary of a corpus of short clips."""
    train, _, ledger, summary = prepare(tmp_path, str(corpus), min_sec=0.5, val_output="", max_chars_per_sec=100)
    return train, ledger, summary


def common_voice(folder: Path, *rows: tuple[str, str]) -> None:
    """A table of (sentence, locale), with a clip for each row."""
    table = [f"c\t{n}.mp3\ts\t{text}\t\t2\t0\t\t\t\t\t{locale}\t" for n, (text, locale) in enumerate(rows)]
    for number in range(len(rows)):
        noise(folder / "clips" / f"{number}.mp3", 1.5)
    lines(folder / "validated.tsv", HEADER, *table)


def test_quotes_stay_as_typed(tmp_path: Path) -> None:
    texts = ['"환자 번호 삼 사 이', "칠 오 육 육", '"공 사 공 칠"', '혈압이 많이 높습니다"', "탭\t있는 문장", ""]
    common_voice(tmp_path / "ko", *((text, "ko") for text in texts))
    train, ledger, _ = run(tmp_path, tmp_path / "ko")
    assert [row["transcript"] for row in train] == texts[:4]
    assert [(entry["line"], entry["reason"]) for entry in ledger] == [(6, "bad_row"), (7, "empty_text")]


def test_languages_that_whisper_has_stay(tmp_path: Path) -> None:
    codes = ["yue", "haw", "jv", "jw", "nb-NO", "no", "zh-HK", "kab"]
    common_voice(tmp_path / "cv", *((f"sentence {code}", code) for code in codes))
    train, [entry], _ = run(tmp_path, tmp_path / "cv")
    assert [row["language"] for row in train] == codes[:-1]
    assert entry["reason"] == "bad_language" and "'kab' is not known" in entry["message"]


PAIRS = {
    "진짜 (100%)(백 프로)가 왜": ("진짜 100%가 왜", "진짜 백 프로가 왜"),
    "(70%):(칠십 퍼센트) 확률": ("70% 확률", "칠십 퍼센트 확률"),
    "(3)?(세) 개 주세요": ("3 개 주세요", "세 개 주세요"),
    "(3)/+(세) 개 주세요": ("3 개 주세요", "세 개 주세요"),
    "(1/하나) 번": ("1 번", "하나 번"),
    "아 ((3시)/(세 시))에 봐": ("아 3시에 봐", "아 세 시에 봐"),
    "（2개）/（두 개） 주세요": ("2개 주세요", "두 개 주세요"),
    "그 + 그 사람": ("그 그 사람", None),
    "어~/ 그 아+아+ 뭐": ("어 그 아 아 뭐", None),
    "네 /(noise) 그래요 @웃음": ("네 그래요", None),
}
"""Text of a KsponSpeech or other AI-Hub corpus -> written and spoken form; None if both are the same."""


def test_mistyped_pairs_have_one_reading(tmp_path: Path) -> None:
    for number, text in enumerate(PAIRS):
        noise(tmp_path / "corpus" / f"k{number:02d}.wav", 1.5)
        lines(tmp_path / "corpus" / f"k{number:02d}.txt", text)
    train, ledger, summary = run(tmp_path, tmp_path / "corpus")
    assert [(row["transcript"], row.get("transcript_phonetic")) for row in train] == list(PAIRS.values())
    assert not ledger and summary["transcript_notes"] == {"noise": 1}


@pytest.mark.parametrize("encoding", ["cp949", "utf-8", "utf-8-sig"])
def test_encodings_of_ksponspeech(tmp_path: Path, encoding: str) -> None:
    folder = tmp_path / "KsponSpeech_01" / "KsponSpeech_0001"
    noise(folder / "clip.wav", 1.5)
    samples, _ = soundfile.read(folder / "clip.wav", dtype="int16")
    (folder / "clip.wav").unlink()
    (folder / "KsponSpeech_000000.pcm").write_bytes(samples.tobytes())
    (folder / "KsponSpeech_000000.txt").write_bytes("b/ (70%)/(칠십 퍼센트) 확률이라니 n/ 뭐+ 뭐\r\n".encode(encoding))
    [row], _, _ = run(tmp_path, tmp_path / "KsponSpeech_01")
    assert row["transcript"] == "70% 확률이라니 뭐 뭐" and row["transcript_phonetic"] == "칠십 퍼센트 확률이라니 뭐 뭐"


def test_rows_that_mix_two_talkers_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talkers = np.random.default_rng(0).normal(0, 0.1, (2 * RATE, 2))
    for name in ("call", "other"):
        soundfile.write(tmp_path / f"{name}.wav", talkers if name == "call" else talkers[::-1], RATE)
    texts = ["혈압이 높습니다", "머리가 아픕니다", "열이 납니다", "땀이 납니다"]
    places: list[dict[str, Any]] = [{}, {"channel": 0}, {"channel": 1}, {"audio_path": "other.wav"}]
    rows = [{"audio_path": "call.wav", "transcript": text, **place} for text, place in zip(texts, places, strict=True)]
    train, _, summary = run(tmp_path, Path(write_rows(tmp_path / "rows.jsonl", rows)))
    assert [row.get("channel") for row in train] == [None, 0, 1, None] and summary["mixed_channels"] == 1
    assert "1 row(s) average the channels" in capsys.readouterr().out
