"""What a sweep comes to: trials in order of merit, choices repeated with other seeds, results.csv and best.yaml."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from voxray.config.search_space import Choice, described, shown
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
        first: The trial that won it the second look; its own value does not count.
        values: {seed: metric}, of the repeats that have one.
        missing: Repeats that have none.
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
    """A sweep as it stands.

    Attributes:
        metric, mode: What decides, and whether ``min`` or ``max`` of it is good.
        trials: Of the search, the best first; those trained to their end come before those that were stopped.
        repeated: Choices trained with other seeds, the best mean first.
        repeats: The runs of those.
    """

    metric: str
    mode: str
    trials: Sequence[Trial]
    repeated: Sequence[Repeated] = field(default_factory=list)
    repeats: Sequence[Trial] = field(default_factory=list)

    @property
    def winner(self) -> Trial | None:
        """The trial of the search whose choice is the best one; None without any that has the metric."""
        if self.repeated:
            return self.repeated[0].first
        return next((trial for trial in self.trials if trial.value(self.metric) is not None), None)

    @property
    def winning_value(self) -> float | None:
        """The metric of the winner, the mean over seeds if there are."""
        if self.repeated:
            return self.repeated[0].mean
        return self.winner.value(self.metric) if self.winner else None

    def is_better(self, one: Trial, other: Trial) -> bool:
        """Whether the first has the better value."""
        values = (one.value(self.metric), other.value(self.metric))
        if values[0] is None or values[1] is None:
            return False
        return values[0] < values[1] if self.mode == "min" else values[0] > values[1]

    def verdict(self) -> str:
        """Whether other seeds bear the winner out, as a sentence; "" without them."""
        if len(self.repeated) < 2:
            return ""
        best, *others = self.repeated
        near = [other for other in others if _overlap(best, other)]
        if not near:
            return "its interval overlaps with none of the others: the winner is no accident of the seed"
        names = "; ".join(described(other.first.choice) for other in near)
        whose = "that of another choice" if len(near) == 1 else f"those of {len(near)} other choices"
        return f"its interval overlaps with {whose}, which it is not shown to be better than: {names}"


def summarise_trials(trials: Sequence[Trial], metric: str, mode: str, top_k: int = 0) -> SweepOutcome:
    """Put a sweep's trials in order.

    Args:
        top_k: How many choices are repeated; repeats of others, of an earlier start, do not count.
    """
    ordered = ranked([trial for trial in trials if not trial.repeats], metric, mode)
    repeats = [trial for trial in trials if trial.repeats]
    repeated = []
    for first in top_trials(ordered, metric, top_k):
        mine = [trial for trial in repeats if trial.repeats == first.number]
        found = [(trial.choice["seed"], trial.value(metric)) for trial in mine if trial.state == "done"]
        values = {seed: value for seed, value in found if value is not None}
        if values:
            mean, low, high = t_interval(list(values.values()))
            repeated.append(Repeated(first, values, len(mine) - len(values), mean, low, high))
    repeated.sort(key=lambda entry: entry.mean if mode == "min" else -entry.mean)
    return SweepOutcome(metric, mode, ordered, repeated, repeats)


def ranked(trials: Sequence[Trial], metric: str, mode: str) -> list[Trial]:
    """The best first: trained to the end before stopped before failed, those without the metric last of their kind."""

    def merit(trial: Trial) -> tuple[int, float, int]:
        value = trial.value(metric)
        return ORDER[trial.state], math.inf if value is None else value if mode == "min" else -value, trial.number

    return sorted(trials, key=merit)


def top_trials(ordered: Sequence[Trial], metric: str, top_k: int) -> list[Trial]:
    """The first so many trials that trained to their end and have the metric."""
    return [trial for trial in ordered if trial.state == "done" and trial.value(metric) is not None][:top_k]


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and the 95 % interval around it, after Student; the interval is None for one value."""
    mean, degrees = float(np.mean(values)), len(values) - 1
    if not degrees:
        return mean, None, None
    reach = t_quantile(degrees) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def t_quantile(degrees: int) -> float:
    """Quantile 0.975 of Student's t; beyond the table by Cornish and Fisher's expansion, right to three decimals."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    first, second = (_Z**3 + _Z) / 4, (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96
    return _Z + first / degrees + second / degrees**2


def _overlap(one: Repeated, other: Repeated) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return True  # one run each shows nothing
    return one.low <= other.high and other.low <= one.high


def front(points: Sequence[tuple[float, float]], *, first_up: bool, second_up: bool) -> list[int]:
    """Which points no other one beats in both figures, in the order of the first figure.

    Args:
        first_up, second_up: Whether a large figure is good.
    """
    signed = [(x if first_up else -x, y if second_up else -y) for x, y in points]

    def is_beaten(own: tuple[float, float]) -> bool:
        return any(all(a >= b for a, b in zip(other, own, strict=True)) and other != own for other in signed)

    return sorted((at for at, own in enumerate(signed) if not is_beaten(own)), key=lambda at: points[at])


def csv_row(trial: Trial, names: Sequence[str]) -> dict[str, Any]:
    """One trial as a line of results.csv.

    Args:
        names: What is swept.
    """
    choice = {name: shown(trial.choice[name]) for name in names if name in trial.choice}
    seed = {"repeats": trial.repeats, "seed": trial.choice["seed"]} if trial.repeats else {}
    measured = {name: value for name, value in trial.metrics.items() if name not in {"kind", "step"}}
    how = {"step": trial.metrics.get("step", ""), "sec": trial.sec, "state": trial.state}
    return {"trial": trial.number, **choice, **seed, **how, **measured, "reason": trial.reason}


def write_csv(path: Path, outcome: SweepOutcome, names: Sequence[str]) -> None:
    """Write results.csv: the trials of the search, the best first, then those repeated with other seeds."""
    rows = [csv_row(trial, names) for trial in (*outcome.trials, *outcome.repeats)]
    measured = {outcome.metric: None} | {name: None for row in rows for name in row if "/" in name}
    seeds = ["repeats", "seed"] if outcome.repeats else []
    columns = ["trial", *names, *seeds, "state", "step", "sec", *measured, "reason"]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(columns)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_best(path: Path, settings: Any, choice: Choice, said: str) -> None:
    """Write a choice as a file that the training job takes as --config.

    Args:
        said: What it came to, for the comment.
    """
    values = trial_values(settings, {}) | {
        name: shown(value) if isinstance(value, Mapping) else value for name, value in choice.items()
    }
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    features = path.parent / "features"  # those of the trials
    values |= {"output_dir": str(path.parent / "best"), "features_dir": values.get("features_dir") or str(features)}
    head = f"# best of the sweep by {said}, for train_{settings.recipe} --config\n"
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_atomically(path, (head + text).encode())
