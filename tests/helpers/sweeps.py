"""Folders of sweeps as trials leave them, written by hand: for the tests of what is made of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.running import parse_only
from voxray.sweep.queue import Queue
from voxray.sweep.trials import Trial, new_trial, write_trial

FLAGS = ("--train_jsonl", "t.jsonl", "--val_jsonl", "v.jsonl")


def sweep_settings(folder: Path, *flags: str) -> Any:
    """Settings of jobs/tune.py."""
    return parse_only("tune", [*FLAGS, "--output_dir", str(folder), *flags])


def leave(
    trial: Trial, validations: Sequence[Mapping[str, Any]] = (), *, finished: bool = True, error: str = ""
) -> None:
    """Write what a trial's own process leaves in its folder.

    Args:
        validations: Metrics by step 10, 20 and so on; None stands for what is no number.
    """
    trial.folder.mkdir(parents=True, exist_ok=True)
    records = [{"kind": "validation", "step": 10 * at, **metrics} for at, metrics in enumerate(validations, 1)]
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if error:
        (trial.folder / "error.json").write_text(json.dumps({"message": error, "kind": "RunError"}))
    elif finished:
        step = 10 * len(validations)
        (trial.folder / "result.json").write_text(json.dumps({"finished": True, "steps": step, "adapter_step": step}))


def write(
    folder: Path, number: int, choice: dict, *validations: Mapping[str, Any], repeats: int = 0, **how: Any
) -> Trial:
    """A trial that is over, on disk: done unless ``how`` says another state."""
    trial = new_trial(folder, number, choice, repeats)
    leave(trial, validations, finished=how.get("state", "done") == "done")
    write_trial(Trial(**{**vars(trial), "state": "done", **how}))
    return trial


class Runner:
    """In the place of Ray Tune: runs a queue's trials one after the other, by a function of their choice.

    Args:
        outcome: Gives a trial's validations, or the text of its error, or None for a process that breaks off.
    """

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.ran, self.earlier = outcome, [], []

    def __call__(self, queue: Queue, earlier: Sequence[Trial] | None) -> None:
        self.earlier.append(earlier)
        while found := queue.next():
            trial, _ = found
            self.ran.append(trial.number)
            what = self.outcome(trial)
            if what is not None:
                leave(
                    trial, *(((),) if isinstance(what, str) else (what,)), error=what if isinstance(what, str) else ""
                )
            queue.end(trial.number, died=what is None)
