"""Importance of each swept flag for the metric."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from voxray.config.search_space import Domain, choice_key

NUM_GROUPS = 4
"""Number of groups of equal size that the values of a range are divided into."""


def importance(domain: Domain, values: Sequence[Any], metric_values: Sequence[float]) -> float | None:
    """Share of the metric's variance that the flag's values explain, corrected for chance.

    This is epsilon squared of a one-way analysis of variance: (between - (groups - 1) * mean square within) / total. It
    is 0 on average for a flag without effect, where the uncorrected share would grow with the number of values.

    Args:
        domain: The flag.
        values: Value of the flag in every trial.
        metric_values: Value of the metric in every trial.
    Returns:
        From 0 to 1; None if there are too few trials, or if the metric is the same in all.
    """
    groups = group(domain, values)
    metric_T, names = np.asarray(metric_values, float), sorted(set(groups))
    num_within = len(groups) - len(names)
    total = float(((metric_T - metric_T.mean()) ** 2).sum()) if len(metric_T) else 0.0
    if len(names) < 2 or num_within < 1 or total <= 0:
        return None
    groups_T = np.asarray(groups)
    within = sum(float(((part - part.mean()) ** 2).sum()) for name in names if len(part := metric_T[groups_T == name]))
    return max(0.0, (total - within - (len(names) - 1) * within / num_within) / total)


def group(domain: Domain, values: Sequence[Any]) -> list[int]:
    """Group of every value: one group per choice, or up to four for numbers of a range, from low to high."""
    if domain.kind == "choice":
        keys = [choice_key({domain.name: choice}) for choice in domain.values]
        return [keys.index(choice_key({domain.name: value})) for value in values]
    distinct = sorted(set(values))
    if len(distinct) <= NUM_GROUPS:
        return [distinct.index(value) for value in values]
    edges = np.quantile(values, np.arange(1, NUM_GROUPS) / NUM_GROUPS)
    return np.searchsorted(edges, values, side="right").tolist()
