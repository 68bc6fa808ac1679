"""The trials of a sweep on disk: choice, state and result of each, independent of the driver process.

A trial is a folder such as ``trials/0003``: the run folder of its training job plus ``trial.json`` with its choice and
state, which the driver writes. The trial itself writes ``result.json`` when it has trained to its end, or
``error.json`` if it fails. Ray Tune's own files are never read.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from voxray.config.search_space import Choice
from voxray.core.errors import RunError
from voxray.core.storage import write_json
from voxray.runs.layout import newest_step
from voxray.training.records import read_metrics

FOLDER, FILE = "trials", "trial.json"
ERROR_FILE, RESULT_FILE = "error.json", "result.json"
WORST = 1e30
"""Absolute value that replaces a missing or non-finite metric for schedulers, which cannot compare NaN."""

TrialState = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: Number of the trial, from 1.
        folder: The trial's run folder.
        choice: Values of the swept flags.
        state: ``running`` until the driver has recorded its end; ``stopped`` if the scheduler ended it early.
        reason: Why it failed, or the step at which it was stopped.
        sec: Wall time so far, in seconds.
        repeats: Number of the trial whose choice it trains again with another seed; 0 for a trial of the search.
        history: Validations, {"step", metrics}, in the order of steps.
        counts_step: Step of the adapter's weights; 0 if the trial did not train to its end.
    """

    number: int
    folder: Path
    choice: Choice
    state: TrialState = "running"
    reason: str = ""
    sec: float = 0.0
    repeats: int = 0
    history: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)
    counts_step: int = 0

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The validation that counts: that of the adapter, else the last one; {} without validations."""
        of_adapter = [record for record in self.history if record["step"] == self.counts_step]
        return (of_adapter or list(self.history) or [{}])[-1]

    def value(self, metric: str) -> float | None:
        """A metric of the validation that counts; None if it is missing or not finite."""
        value: Any = self.metrics.get(metric)
        return float(value) if _is_finite(value) else None

    @property
    def status(self) -> str:
        """State with the reason: ``done``, ``stopped at step 20``, ``failed: out of memory``."""
        separator = ": " if self.state == "failed" else " "
        return separator.join(filter(None, [self.state, self.reason]))

    @property
    def saved_step(self) -> int:
        """Step of the newest checkpoint, from which the trial resumes."""
        return newest_step(self.folder)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def new_trial(sweep_dir: Path, number: int, choice: Choice, repeats: int = 0) -> Trial:
    return Trial(number, sweep_dir / FOLDER / f"{number:04d}", choice, repeats=repeats)


def write_trial(trial: Trial) -> None:
    """Write trial.json: all attributes that cannot be read from other files of the folder."""
    values = {name: value for name, value in asdict(trial).items() if name not in {"folder", "history", "counts_step"}}
    write_json(trial.folder / FILE, values)


def read_trials(sweep_dir: Path) -> list[Trial]:
    """All trials of a sweep, in order. A trial that finished after its driver was killed counts as done.

    Raises:
        RunError: The trial.json of a trial is damaged.
    """
    trials = []
    for path in sorted((sweep_dir / FOLDER).glob(f"*/{FILE}")):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            trial = with_outcome(Trial(folder=path.parent, **stored))
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{path}: damaged ({error}); delete its folder to train it anew") from None
        is_finished = trial.state == "running" and trial.counts_step
        trials.append(replace(trial, state="done") if is_finished else trial)
    return sorted(trials, key=lambda trial: trial.number)


def with_outcome(trial: Trial) -> Trial:
    """The trial with the history and result in its folder."""
    result = _read(trial.folder / RESULT_FILE)
    return replace(
        trial,
        history=tuple(read_metrics(trial.folder, "validation")),
        counts_step=result.get("adapter_step", 0) if result.get("finished") else 0,
    )


def end_trial(trial: Trial, *, died: bool, sec: float) -> Trial:
    """The trial after Ray Tune reported its end, with the state that its folder shows.

    Args:
        died: Whether its process crashed.
        sec: Wall time since its last start, in seconds.
    """
    trial = replace(with_outcome(trial), sec=round(trial.sec + sec, 1))
    if trial.counts_step:
        return replace(trial, state="done")
    if message := _read(trial.folder / ERROR_FILE).get("message"):
        return replace(trial, state="failed", reason=message)
    if died:
        return replace(
            trial, state="failed", reason="its process broke off; see ray.log, and error.txt in the folder ray"
        )
    last = trial.history[-1]["step"] if trial.history else 0
    return replace(trial, state="stopped", reason=f"at step {last}")


def scheduler_record(record: Mapping[str, Any], metric: str, mode: str) -> dict[str, Any]:
    """A validation as reported to the scheduler, with ``WORST`` for a missing or non-finite metric."""
    value, worst = record.get(metric), WORST if mode == "min" else -WORST
    return {"step": record["step"], metric: value if _is_finite(value) else worst}


def _read(path: Path) -> dict[str, Any]:
    """Content of a JSON file of the trial; {} if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
