"""Results of a sweep: trials ranked by the metric, choices repeated with other seeds, results.csv and best.yaml."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from voxray.config.search_space import Choice, format_choice, format_value
from voxray.config.tune import trial_values
from voxray.core.storage import write_atomically
from voxray.sweep.trials import Trial

_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Quantile 0.975 of Student's t for 1 to 30 degrees of freedom."""
_Z = 1.959964
ORDER = {"done": 0, "stopped": 1, "running": 2, "failed": 3}


@dataclass(frozen=True)
class Repeated:
    """A choice that was trained again with other seeds.

    Attributes:
        first: The trial of the search with this choice; its own value is not part of the mean.
        values: {seed: metric} of the repeats that have the metric.
        missing: Number of repeats without the metric.
        mean: Mean of the values.
        low, high: 95 % interval of the mean (Student's t); None with fewer than two values.
    """

    first: Trial
    values: Mapping[int, float]
    missing: int
    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class SweepOutcome:
    """The current results of a sweep.

    Attributes:
        metric, mode: The metric that decides, and whether its ``min`` or ``max`` is best.
        trials: Trials of the search, the best first; finished trials come before those that were stopped.
        repeated: Choices trained again with other seeds, the best mean first.
        repeats: The runs with other seeds.
    """

    metric: str
    mode: str
    trials: Sequence[Trial]
    repeated: Sequence[Repeated] = field(default_factory=list)
    repeats: Sequence[Trial] = field(default_factory=list)

    @property
    def winner(self) -> Trial | None:
        """The trial of the search with the best choice; None if no trial has the metric."""
        if self.repeated:
            return self.repeated[0].first
        return next((trial for trial in self.trials if trial.value(self.metric) is not None), None)

    @property
    def winning_value(self) -> float | None:
        """The metric of the winner; the mean over seeds if its choice was repeated."""
        if self.repeated:
            return self.repeated[0].mean
        return self.winner.value(self.metric) if self.winner else None

    @property
    def ties(self) -> list[Trial]:
        """Other finished trials whose value equals that of the winner, if choices were trained once."""
        if self.repeated or self.winner is None:
            return []
        value = self.winner.value(self.metric)
        others = (trial for trial in self.trials if trial is not self.winner and trial.state == "done")
        return [trial for trial in others if trial.value(self.metric) == value]

    def is_better(self, one: Trial, other: Trial) -> bool:
        """Whether ``one`` has the better value; False if either has none."""
        values = (one.value(self.metric), other.value(self.metric))
        if values[0] is None or values[1] is None:
            return False
        return values[0] < values[1] if self.mode == "min" else values[0] > values[1]

    def verdict(self) -> str:
        """Whether other seeds confirm the winner, as a sentence; "" without other seeds."""
        if len(self.repeated) < 2:
            return ""
        best, *others = self.repeated
        near = [other for other in others if _overlap(best, other)]
        if not near:
            return "its interval overlaps with none of the others: the winner is no accident of the seed"
        names = "; ".join(format_choice(other.first.choice) for other in near)
        whose = "that of another choice" if len(near) == 1 else f"those of {len(near)} other choices"
        return f"its interval overlaps with {whose}, which it is not shown to be better than: {names}"


def summarise_trials(trials: Sequence[Trial], metric: str, mode: str, top_k: int = 0) -> SweepOutcome:
    """Rank a sweep's trials.

    Args:
        top_k: Number of choices that are repeated; repeats of other choices, from an earlier start, are ignored.
    """
    ordered = ranked([trial for trial in trials if not trial.repeats], metric, mode)
    repeats = [trial for trial in trials if trial.repeats]
    repeated = []
    for first in top_trials(ordered, metric, top_k):
        of_choice = [trial for trial in repeats if trial.repeats == first.number]
        by_seed = [(trial.choice["seed"], trial.value(metric)) for trial in of_choice if trial.state == "done"]
        values = {seed: value for seed, value in by_seed if value is not None}
        if values:
            mean, low, high = t_interval(list(values.values()))
            repeated.append(Repeated(first, values, len(of_choice) - len(values), mean, low, high))
    repeated.sort(key=lambda entry: entry.mean if mode == "min" else -entry.mean)
    return SweepOutcome(metric, mode, ordered, repeated, repeats)


def ranked(trials: Sequence[Trial], metric: str, mode: str) -> list[Trial]:
    """Sort trials: finished, stopped, running, failed; in each group the best first, those without the metric last."""

    def sort_key(trial: Trial) -> tuple[int, float, int]:
        value = trial.value(metric)
        return ORDER[trial.state], math.inf if value is None else value if mode == "min" else -value, trial.number

    return sorted(trials, key=sort_key)


def top_trials(ordered: Sequence[Trial], metric: str, top_k: int) -> list[Trial]:
    """The first ``top_k`` trials that finished and have the metric."""
    return [trial for trial in ordered if trial.state == "done" and trial.value(metric) is not None][:top_k]


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and its 95 % interval by Student's t; the interval is None for one value."""
    mean, degrees = float(np.mean(values)), len(values) - 1
    if not degrees:
        return mean, None, None
    half_width = t_quantile(degrees) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half_width, mean + half_width


def t_quantile(degrees: int) -> float:
    """Quantile 0.975 of Student's t: from the table, or by the Cornish-Fisher expansion, exact to three decimals."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    first, second = (_Z**3 + _Z) / 4, (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    return _Z + first / degrees + second / degrees**2


def _overlap(one: Repeated, other: Repeated) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return True  # a single run has no interval
    return one.low <= other.high and other.low <= one.high


def front(points: Sequence[tuple[float, float]], *, first_up: bool, second_up: bool) -> list[int]:
    """Indices of the Pareto front: points that no other point beats in both metrics, sorted by the first.

    Args:
        first_up, second_up: Whether a larger value of the metric is better.
    """
    signed = [(x if first_up else -x, y if second_up else -y) for x, y in points]

    def is_beaten(point: tuple[float, float]) -> bool:
        return any(all(a >= b for a, b in zip(other, point, strict=True)) and other != point for other in signed)

    return sorted((i for i, point in enumerate(signed) if not is_beaten(point)), key=lambda index: points[index])


def csv_row(trial: Trial, names: Sequence[str]) -> dict[str, Any]:
    """One trial as a line of results.csv.

    Args:
        names: The swept flags.
    """
    choice = {name: format_value(trial.choice[name]) for name in names if name in trial.choice}
    seed = {"repeats": trial.repeats, "seed": trial.choice["seed"]} if trial.repeats else {}
    measured = {name: value for name, value in trial.metrics.items() if name not in {"kind", "step"}}
    progress = {"step": trial.metrics.get("step", ""), "sec": trial.sec, "state": trial.state}
    return {"trial": trial.number, **choice, **seed, **progress, **measured, "reason": trial.reason}


def write_csv(path: Path, outcome: SweepOutcome, names: Sequence[str]) -> None:
    """Write results.csv: the trials of the search, the best first, then the runs with other seeds."""
    rows = [csv_row(trial, names) for trial in (*outcome.trials, *outcome.repeats)]
    measured = {outcome.metric: None} | {name: None for row in rows for name in row if "/" in name}
    seeds = ["repeats", "seed"] if outcome.repeats else []
    columns = ["trial", *names, *seeds, "state", "step", "sec", *measured, "reason"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(columns)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_best(path: Path, settings: Any, choice: Choice, result: str) -> None:
    """Write a choice as a file that the training job takes as --config.

    Args:
        result: The metric and its value, for the comment.
    """
    values = trial_values(settings, {}) | {
        name: format_value(value) if isinstance(value, Mapping) else value for name, value in choice.items()
    }
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    features = path.parent / "features"  # of the trials
    values |= {"output_dir": str(path.parent / "best"), "features_dir": values.get("features_dir") or str(features)}
    head = f"# best of the sweep by {result}, for train_{settings.recipe} --config\n"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_atomically(path, (head + text).encode())
