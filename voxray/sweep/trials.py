"""The trials of a sweep on disk: what each was given and what came of it, whatever became of the driver.

A trial is a folder ``trials/0003``: a run folder of its training job, and in it ``trial.json`` with its choice and its
state. That file is the driver's; the trial itself leaves ``result.json`` when it has trained to its end, and
``error.json`` when it could not. Ray Tune's own files are never read.
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
from voxray.runs.layout import list_checkpoints
from voxray.training.records import read_metrics

FOLDER, FILE = "trials", "trial.json"
ERROR_FILE, RESULT_FILE = "error.json", "result.json"
WORST = 1e30
"""What a metric that is no number counts as, on the bad side: schedulers compare it, and cannot compare NaN."""

TrialState = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: From 1.
        folder: Its run folder.
        choice: What it was given.
        state: ``running`` until the driver has heard of its end; ``stopped`` is early, by the scheduler.
        reason: Why it failed, or where it was stopped.
        sec: Wall time so far.
        repeats: Number of the trial whose choice it trains again with another seed; 0 for a trial of the search.
        history: Its validations, {"step", metrics}, in the order of steps.
        counts_step: Step whose weights its adapter has; 0 if it did not train to its end.
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
        """The validation that it is judged by: that of its adapter, else the last; {} without one."""
        of_adapter = [record for record in self.history if record["step"] == self.counts_step]
        return (of_adapter or list(self.history) or [{}])[-1]

    def value(self, metric: str) -> float | None:
        """The metric that it is judged by; None if it has none that is a number."""
        found = self.metrics.get(metric)
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None

    @property
    def fate(self) -> str:
        """What became of it: ``done``, ``stopped at step 20``, ``failed: out of memory``."""
        between = ": " if self.state == "failed" else " "
        return between.join(filter(None, [self.state, self.reason]))

    @property
    def saved_step(self) -> int:
        """Step that it would go on from."""
        return max((step for step, _ in list_checkpoints(self.folder)), default=0)


def new_trial(sweep_dir: Path, number: int, choice: Choice, repeats: int = 0) -> Trial:
    return Trial(number, sweep_dir / FOLDER / f"{number:04d}", choice, repeats=repeats)


def write_trial(trial: Trial) -> None:
    """Write what no other file of its folder says."""
    kept = {name: value for name, value in asdict(trial).items() if name not in {"folder", "history", "counts_step"}}
    write_json(trial.folder / FILE, kept)


def read_trials(sweep_dir: Path) -> list[Trial]:
    """All trials of a sweep, in order; one whose driver was killed after its end counts as ended.

    Raises:
        RunError: The file of a trial is damaged.
    """
    found = []
    for path in sorted((sweep_dir / FOLDER).glob(f"*/{FILE}")):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            trial = with_outcome(Trial(folder=path.parent, **stored))
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{path}: damaged ({error}); delete its folder to train it anew") from None
        is_over = trial.state == "running" and trial.counts_step
        found.append(replace(trial, state="done") if is_over else trial)
    return sorted(found, key=lambda trial: trial.number)


def with_outcome(trial: Trial) -> Trial:
    """The trial with what its folder says of its training."""
    result = _read(trial.folder / RESULT_FILE)
    return replace(
        trial,
        history=tuple(read_metrics(trial.folder, "validation")),
        counts_step=result.get("adapter_step", 0) if result.get("finished") else 0,
    )


def ended(trial: Trial, *, died: bool, sec: float) -> Trial:
    """The trial after Ray Tune said that it is over, with the state that its folder shows.

    Args:
        died: Whether its process broke off.
        sec: Wall time of this start of it.
    """
    trial = replace(with_outcome(trial), sec=round(trial.sec + sec, 1))
    if trial.counts_step:
        return replace(trial, state="done")
    if said := _read(trial.folder / ERROR_FILE).get("message"):
        return replace(trial, state="failed", reason=said)
    if died:
        return replace(
            trial, state="failed", reason="its process broke off; see ray.log, and error.txt in the folder ray"
        )
    last = trial.history[-1]["step"] if trial.history else 0
    return replace(trial, state="stopped", reason=f"at step {last}")


def reported(record: Mapping[str, Any], metric: str, mode: str) -> dict[str, Any]:
    """A validation as the scheduler sees it."""
    value = record.get(metric)
    known = isinstance(value, int | float) and math.isfinite(value)
    return {"step": record["step"], metric: value if known else WORST if mode == "min" else -WORST}


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of the trial; {} if it is missing or was cut off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
