"""The driver's progress bar and its estimate of the time left."""

import json
from pathlib import Path
from typing import Any

import pytest

from voxray.launch.progress_view import Pace, show_progress


def step_line(step: int, sec: float, **more: Any) -> str:
    return json.dumps({"kind": "train", "step": step, "sec": sec, "loss": 1.25, **more})


def test_time_left_follows_from_the_last_steps() -> None:
    pace = Pace()
    pace.read_log("data: 12 asr rows; 9 steps of 4 rows per epoch")
    assert (pace.total, pace.note()) == (0, "")
    pace.read_log("resuming from step 900 of 1000")
    assert (pace.step, pace.total, pace.note()) == (900, 1000, ""), "known before the first step"
    pace.read_record(step_line(901, 2.0))
    assert pace.seconds_left() == 99 * 2 and pace.note() == "loss 1.2500  0:03:18 left"
    for step in range(902, 952):
        pace.read_record(step_line(step, 4.0))
    assert pace.seconds_left() == (1000 - 951) * 4, "the first step no longer counts"
    pace.read_record('{"kind": "train", "st')
    pace.read_record(json.dumps({"kind": "validation", "step": 999, "asr/cer": 0.1}))
    assert pace.step == 951
    pace.read_log("resuming from step 940 of 1000")
    assert (pace.step, pace.seconds_left()) == (940, None)


def test_progress_is_printed_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("voxray.core.console.SECONDS_BETWEEN_LINES", -1.0)
    with show_progress(tmp_path):
        (tmp_path / "train.log").write_text("starting at step 0 of 4\n")
        (tmp_path / "metrics.jsonl").write_text(step_line(1, 30.0) + "\n")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "training ..." and printed[-1] == "training: 1 of 4  loss 1.2500  0:01:30 left"
