"""Bootstrap over speakers or utterances: how much a metric would vary with other speakers of the same kind.

Utterances of one speaker have correlated errors, so resampling single utterances would give intervals that are too
narrow. The draws depend only on the seed and the number of groups. Two systems evaluated on the same rows therefore get
the same draws, as a paired comparison requires.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

NUM_RESAMPLES = 10_000
LEVEL = 0.95
_BLOCK_SIZE = 1 << 21  # groups drawn per matrix product; for much smaller products BLAS threads are ten times slower
_MAX_DRAWN_GROUPS = 1 << 26  # over all draws
MIN_RESAMPLES = 1_000

Unit = Literal["speaker", "utterance"]


@dataclass(frozen=True)
class Groups:
    """The groups of rows that the bootstrap resamples.

    Attributes:
        index: (rows,), group of every row, from 0.
        num: Number of groups.
        unit: Whether a group is a speaker or a single utterance.
    """

    index: np.ndarray
    num: int
    unit: Unit


def group_by_speaker(rows: Sequence[Mapping[str, Any]]) -> Groups:
    """Group rows by ``speaker``; a row without a speaker is a group of its own.

    With fewer than two speakers, every row is a group.
    """
    speakers = [row.get("speaker") for row in rows]
    if len({speaker for speaker in speakers if speaker}) < 2:
        return Groups(np.arange(len(rows)), len(rows), "utterance")
    numbers: dict[Any, int] = {}
    keys = [("speaker", speaker) if speaker else ("row", row) for row, speaker in enumerate(speakers)]
    index = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    return Groups(index, len(numbers), "speaker")


def resampled_sums(
    columns: np.ndarray, groups: Groups, *, seed: int | Sequence[int] = 0, num_resamples: int = NUM_RESAMPLES
) -> np.ndarray:
    """Column sums over the rows of each bootstrap draw, which resamples as many groups as there are, with replacement.

    Args:
        columns: (rows, columns), counts or other numbers that add up.
        num_resamples: Draws; reduced for very many groups (see ``resamples_for``).
    Returns:
        (draws, columns).
    """
    num_resamples = resamples_for(groups.num, num_resamples)
    sums = np.zeros((groups.num, columns.shape[1]))
    np.add.at(sums, groups.index, columns)
    rng = np.random.default_rng(seed)
    draws_per_block = max(1, _BLOCK_SIZE // max(groups.num, 1))
    blocks = []
    for start in range(0, num_resamples, draws_per_block):
        draws = min(draws_per_block, num_resamples - start)
        drawn = rng.integers(0, groups.num, size=(draws, groups.num), dtype=np.int64)
        drawn += np.arange(draws)[:, None] * groups.num
        times = np.bincount(drawn.ravel(), minlength=draws * groups.num).reshape(draws, groups.num)
        blocks.append(times.astype(np.float64) @ sums)
    return np.concatenate(blocks)


def resamples_for(num_groups: int, num_resamples: int) -> int:
    """Number of draws: fewer for very many groups, but at least 1,000, so that a million utterances take seconds."""
    return min(num_resamples, max(MIN_RESAMPLES, _MAX_DRAWN_GROUPS // max(num_groups, 1)))


def interval(samples: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """The middle 95 % of the draws' values (percentile bootstrap); (None, None) without finite values."""
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return None, None
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
