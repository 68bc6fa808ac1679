"""Is one run better than another on the same rows? Paired bootstrap intervals and permutation p-values.

Every metric here is computed from sums over rows only: rates are one sum divided by another (edits over reference
length; ROUGE-L over rows), BLEU and chrF are functions of the sums of n-gram counts. Rows of one speaker resemble each
other, so the bootstrap draws *units*, and the permutation test exchanges them: a unit is all rows of a speaker, or one
row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxray.metrics.bootstrap import NUM_RESAMPLES, Groups, group_by_speaker, interval, resampled_sums, resamples_for
from voxray.metrics.ngrams import SummedMetric

ALPHA = 0.05
"""A difference is significant if its p-value is below this and its interval excludes 0."""
MIN_SPEAKERS = 6
"""Fewer speakers can be exchanged in so few ways that no p-value could be below ``ALPHA``."""
MAX_EXACT_UNITS = 13
"""Up to this many units, all 2**units exchanges are enumerated, no more than are drawn otherwise."""
CELLS_AT_ONCE = 1 << 21  # of the matrix (draws, units)
TIE = 1e-9  # tolerance for sums in another order, which differ in their last bits


@dataclass(frozen=True)
class Difference:
    """One metric of two runs on the same rows.

    Attributes:
        first, second: Values of the two runs.
        first_interval, second_interval: 95 % intervals of the values; None with fewer than two units.
        difference: second - first.
        interval: 95 % interval of the difference; None with fewer than two units.
        p: Two-sided p-value of the null hypothesis that the runs can be exchanged.
        num_rows: Number of rows that the metric has.
        num_units: Number of speakers, or rows, that were resampled.
    """

    first: float
    second: float
    first_interval: tuple[float, float] | None
    second_interval: tuple[float, float] | None
    difference: float
    interval: tuple[float, float] | None
    p: float
    num_rows: int
    num_units: int

    @property
    def is_shown(self) -> bool:
        """Whether the difference is significant by both its p-value and its interval."""
        return self.p < ALPHA and self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def resampling_units(rows: Sequence[Mapping[str, Any]]) -> Groups:
    """The units of the resampling: speakers, or rows if there are no speakers or only a few.

    With few speakers the result holds for these speakers and not for others; callers must say so.
    """
    groups = group_by_speaker(rows)
    return groups if groups.num >= MIN_SPEAKERS else Groups(np.arange(len(rows)), len(rows), "utterance")


def compare_rows(
    first: Sequence[SummedMetric],
    second: Sequence[SummedMetric],
    units: Groups,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> list[Difference | None]:
    """Compare two runs on the same rows by some metrics.

    Interval: percentile bootstrap over units. p-value: permutation test that exchanges the runs within units, in all
    ways for up to ``MAX_EXACT_UNITS`` units, else in random ways with the observed one counted among them, so that it
    is never 0.

    Args:
        first, second: The same metrics of the two runs.
        units: Rows that are drawn, and exchanged, together.
        seed: Random seed.
        num_resamples: Number of draws.
    Returns:
        A comparison per metric; None for a metric that no row has.
    """
    columns = [metric.columns for metric in (*first, *second)]
    sums_by_unit = [_by_unit(values, units) for values in columns]
    ends = np.cumsum([values.shape[1] for values in columns])[:-1]
    drawn_sums = resampled_sums(np.concatenate(columns, axis=1), units, seed=seed, num_resamples=num_resamples)
    draws = [
        metric.from_sums(sums)
        for metric, sums in zip((*first, *second), np.split(drawn_sums, ends, axis=1), strict=True)
    ]
    own, others = sums_by_unit[: len(first)], sums_by_unit[len(first) :]
    p_values = _p_values([metric.from_sums for metric in first], own, others, seed + 1, num_resamples)
    differences: list[Difference | None] = []
    for index, (metric, other_metric, p) in enumerate(zip(first, second, p_values, strict=True)):
        value, other = (_total(metric, sums[index]) for sums in (own, others))
        rows = metric.contributes | other_metric.contributes
        num_units = len(np.unique(units.index[rows]))
        if not (np.isfinite(value) and np.isfinite(other)):
            differences.append(None)
            continue
        drawn = np.stack([draws[index], draws[len(first) + index]])
        drawn = drawn[:, np.isfinite(drawn).all(axis=0)]
        intervals = [_interval(values, num_units) for values in (*drawn, drawn[1] - drawn[0])]
        differences.append(
            Difference(
                first=value,
                second=other,
                first_interval=intervals[0],
                second_interval=intervals[1],
                difference=other - value,
                interval=intervals[2],
                p=float(p),
                num_rows=int(rows.sum()),
                num_units=num_units,
            )
        )
    return differences


def metric_intervals(
    run: Sequence[SummedMetric], units: Groups, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> list[Difference | None]:
    """Values and intervals of one run, computed by comparing it with itself."""
    return compare_rows(run, run, units, seed=seed, num_resamples=num_resamples)


def _total(metric: SummedMetric, sums: np.ndarray) -> float:
    """A metric from the sums of its columns by unit; not finite if no row has it."""
    return float(metric.from_sums(np.array([[column.sum() for column in sums.T]]))[0])


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests by Holm's method.

    Of twenty slices, one differs at p < 0.05 by chance. Of the adjusted values, any is below 0.05 by chance in at most
    one of twenty such tables.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def _by_unit(values_RM: np.ndarray, units: Groups) -> np.ndarray:
    """Sums over the rows of each unit."""
    columns = [np.bincount(units.index, weights=column, minlength=units.num) for column in values_RM.T]
    return np.stack(columns, axis=1)


def _chunks(num_draws: int, num_units: int) -> Iterator[int]:
    size = max(1, CELLS_AT_ONCE // num_units)
    for start in range(0, num_draws, size):
        yield min(size, num_draws - start)


def _p_values(
    from_sums: Sequence[Callable[[np.ndarray], np.ndarray]],
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    seed: int,
    num_resamples: int,
) -> np.ndarray:
    """Two-sided p-value per metric: how often exchanging the runs within units gives a difference at least as large.

    Args:
        from_sums: Of each metric.
        first, second: Sums of the columns of each metric by unit, of the two runs.
    """
    own, others = np.concatenate(first, axis=1), np.concatenate(second, axis=1)
    ends = np.cumsum([values.shape[1] for values in first])[:-1]
    moves, totals = others - own, (others + own).sum(axis=0)

    def size(signed_sums: np.ndarray) -> np.ndarray:
        """|second - first| of exchanges, (n, metrics), from the sums of ``moves`` with their signs."""
        parts = (np.split((totals + sign * signed_sums) / 2, ends, axis=1) for sign in (1, -1))
        values = [value(sums) - value(other_sums) for value, sums, other_sums in zip(from_sums, *parts, strict=True)]
        return np.abs(np.nan_to_num(np.stack(values, axis=1)))

    limit = size(moves.sum(axis=0, keepdims=True))[0]
    limit -= TIE * (1 + limit)
    moves = moves[(moves != 0).any(axis=1)]  # exchanging equal units changes nothing
    num_units = len(moves)
    if num_units <= MAX_EXACT_UNITS:
        signs = 1.0 - 2.0 * ((np.arange(1 << num_units)[:, None] >> np.arange(num_units)) & 1)
        return (size(signs @ moves) >= limit).mean(axis=0)
    num_exchanges = resamples_for(num_units, num_resamples)
    rng, reached = np.random.default_rng(seed), np.zeros(len(limit))
    for num_draws in _chunks(num_exchanges, num_units):
        signs = rng.integers(0, 2, (num_draws, num_units), dtype=np.int8).astype(np.float64) * 2 - 1
        reached += (size(signs @ moves) >= limit).sum(axis=0)
    return (reached + 1) / (num_exchanges + 1)


def _interval(values: np.ndarray, num_units: int) -> tuple[float, float] | None:
    low, high = interval(values) if num_units > 1 else (None, None)
    return None if low is None or high is None else (low, high)
