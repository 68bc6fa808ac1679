"""Bootstrap over speakers, or utterances: how far a figure would move with other speakers of the same kind.

Utterances of one speaker err alike, so that drawing utterances one by one would give intervals that are too narrow.
Draws depend on the seed and the number of groups alone: two systems answered by the same rows are drawn alike, which is
what a paired comparison needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

NUM_RESAMPLES = 10_000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 21  # much smaller products are slowed down tenfold by the threads that BLAS starts for them
_DRAWS_IN_ALL = 1 << 26
MIN_RESAMPLES = 1_000

Unit = Literal["speaker", "utterance"]


@dataclass(frozen=True)
class Groups:
    """What is drawn.

    Attributes:
        index: Group of every row, from 0.
        num: Groups.
        unit: What a group is.
    """

    index: np.ndarray
    num: int
    unit: Unit


def group_by_speaker(rows: Sequence[Mapping[str, Any]]) -> Groups:
    """Group rows by ``speaker``; a row that has none is a group of its own.

    With less than two speakers in all there is nothing to draw among, so utterances are drawn.
    """
    speakers = [row.get("speaker") for row in rows]
    if len({speaker for speaker in speakers if speaker}) < 2:
        return Groups(np.arange(len(rows)), len(rows), "utterance")
    numbers: dict[Any, int] = {}
    keys = [("speaker", speaker) if speaker else ("row", at) for at, speaker in enumerate(speakers)]
    index = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    return Groups(index, len(numbers), "speaker")


def resampled_sums(
    columns: np.ndarray, groups: Groups, *, seed: int | Sequence[int] = 0, num_resamples: int = NUM_RESAMPLES
) -> np.ndarray:
    """Sums over rows, for each of many draws of as many groups as there are, with replacement.

    Args:
        columns: (rows, columns), counts or other numbers that add up.
        num_resamples: Draws; for very many groups fewer are made, though never less than 1,000 (``resamples_for``).
    Returns:
        (draws, columns).
    """
    num_resamples = resamples_for(groups.num, num_resamples)
    sums = np.zeros((groups.num, columns.shape[1]))
    np.add.at(sums, groups.index, columns)
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // max(groups.num, 1))
    parts = []
    for start in range(0, num_resamples, at_once):
        draws = min(at_once, num_resamples - start)
        drawn = rng.integers(0, groups.num, size=(draws, groups.num), dtype=np.int64)
        drawn += np.arange(draws)[:, None] * groups.num
        times = np.bincount(drawn.ravel(), minlength=draws * groups.num).reshape(draws, groups.num)
        parts.append(times.astype(np.float64) @ sums)
    return np.concatenate(parts)


def resamples_for(num_groups: int, wanted: int) -> int:
    """Draws to make, so that a million utterances take seconds and not hours."""
    return min(wanted, max(MIN_RESAMPLES, _DRAWS_IN_ALL // max(num_groups, 1)))


def interval(samples: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """The middle 95 % of drawn values (percentile bootstrap); (None, None) without any."""
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return None, None
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
