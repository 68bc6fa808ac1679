"""Writes the folders of sweeps as trials write them, for tests of the results."""

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
    """Write the files that a trial's own process writes in its folder.

    Args:
        validations: Metrics by step 10, 20 and so on; None stands for a value that is not a number.
    """
    trial.folder.mkdir(parents=True, exist_ok=True)
    records = [{"kind": "validation", "step": 10 * number, **metrics} for number, metrics in enumerate(validations, 1)]
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if error:
        (trial.folder / "error.json").write_text(json.dumps({"message": error, "kind": "RunError"}))
    elif finished:
        step = 10 * len(validations)
        (trial.folder / "result.json").write_text(json.dumps({"finished": True, "steps": step, "adapter_step": step}))


def write(
    folder: Path, number: int, choice: dict, *validations: Mapping[str, Any], repeats: int = 0, **fields: Any
) -> Trial:
    """Write a finished trial to disk; its state is done unless ``fields`` has another."""
    trial = new_trial(folder, number, choice, repeats)
    leave(trial, validations, finished=fields.get("state", "done") == "done")
    write_trial(Trial(**{**vars(trial), "state": "done", **fields}))
    return trial


class Runner:
    """Stands in for Ray Tune: runs the trials of a queue one after the other.

    Args:
        outcome: Function of a trial that returns its validations, its error message, or None for a killed process.
    """

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.ran, self.earlier = outcome, [], []

    def __call__(self, queue: Queue, earlier: Sequence[Trial] | None) -> None:
        self.earlier.append(earlier)
        while entry := queue.next():
            trial, _ = entry
            self.ran.append(trial.number)
            result = self.outcome(trial)
            if isinstance(result, str):
                leave(trial, error=result)
            elif result is not None:
                leave(trial, result)
            queue.end(trial.number, died=result is None)
