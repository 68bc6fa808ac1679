"""Rows that prepare leaves out are a sentence with the flag that keeps them."""

from pathlib import Path

import pytest
from conftest import write_rows
from helpers.bad_input import noise
from helpers.corpora import prepare

from voxray.config.prepare import PrepareSettings
from voxray.core.units import format_duration
from voxray.corpora.prepare.advice import KEEP, LIMITS, advice


def test_each_flag_is_one_of_prepare() -> None:
    flags = {
        name.removeprefix("--") for text in (*KEEP.values(), *LIMITS.values()) for name in text.split() if "--" in name
    }
    assert {flag.rstrip(",") for flag in flags} <= set(PrepareSettings.model_fields)


@pytest.mark.parametrize(
    ("short_secs", "end"),
    [
        ([0.6] * 51 + [0.2] * 5, ": --min_sec 0.5 keeps 51 of them"),
        ([2.5] * 3, ": --min_sec 2 keeps 3 of them"),
        ([0.15] * 2 + [0.01] * 2, ": --min_sec 0.1 keeps 2 of them"),
        ([0.01], ""),
    ],
)
def test_the_shorter_limit(short_secs: list[float], end: str) -> None:
    left_out = {"too_short": {"rows": len(short_secs)}, "bad_row": {"rows": 1}}
    assert advice(left_out, 80, short_secs, 3.0) == [f"{len(short_secs)} of 80 rows are shorter than 3 s{end}"]


def test_prepare_prints_the_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = [4.0, 1.2, 1.4, 4.0]
    texts = ["혈압이 높습니다", "머리가 아픕니다", "열이 납니다", "땀이 아주 많이 납니다"]
    rows = [
        {"audio_path": noise(tmp_path / f"{n}.wav", sec), "transcript": text}
        for n, (sec, text) in enumerate(zip(seconds, texts, strict=True))
    ]
    _, _, _, summary = prepare(tmp_path, write_rows(tmp_path / "m.jsonl", [*rows, rows[0]]), val_output="")
    output = capsys.readouterr().out
    assert "2 of 5 rows are shorter than 3 s: --min_sec 1 keeps 2 of them" in output
    assert "1 of 5 rows are left out as duplicate: --duplicates keep keeps them" in output
    assert "8.0 s" in output and summary["quarantined"]["too_short"]["hours"] == pytest.approx(2.6 / 3600, abs=1e-4)


def test_durations() -> None:
    assert [format_duration(sec) for sec in (8.25, 750, 11_700, 4e6)] == ["8.2 s", "12.5 min", "3.25 h", "1,111.11 h"]
