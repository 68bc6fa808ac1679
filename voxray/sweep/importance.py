"""How much of what trials differ in goes with each swept flag."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from voxray.config.search_space import Domain, choice_key

NUM_GROUPS = 4
"""Groups of equal size into which drawn numbers are cut."""


def importance(domain: Domain, values: Sequence[Any], figures: Sequence[float]) -> float | None:
    """Share of the variance of the figures that the flag's values explain by themselves, less what chance would.

    This is epsilon squared of a one-way analysis of variance: (between - (groups - 1) * mean square within) / total. A
    flag that does nothing has 0 on average, where the plain share would grow with its number of values.

    Args:
        domain: The flag.
        values: Its value in every trial.
        figures: What came of the trials.
    Returns:
        From 0 to 1; None where there are too few trials, or no differences at all.
    """
    groups = group(domain, values)
    figures_T, names = np.asarray(figures, float), sorted(set(groups))
    num_within = len(groups) - len(names)
    total = float(((figures_T - figures_T.mean()) ** 2).sum()) if len(figures_T) else 0.0
    if len(names) < 2 or num_within < 1 or total <= 0:
        return None
    groups_T = np.asarray(groups)
    within = sum(float(((part - part.mean()) ** 2).sum()) for name in names if len(part := figures_T[groups_T == name]))
    return max(0.0, (total - within - (len(names) - 1) * within / num_within) / total)


def group(domain: Domain, values: Sequence[Any]) -> list[int]:
    """Number of the group of every value: one for each choice, and up to four for drawn numbers, from low to high."""
    if domain.kind == "choice":
        keys = [choice_key({domain.name: choice}) for choice in domain.values]
        return [keys.index(choice_key({domain.name: value})) for value in values]
    distinct = sorted(set(values))
    if len(distinct) <= NUM_GROUPS:
        return [distinct.index(value) for value in values]
    edges = np.quantile(values, np.arange(1, NUM_GROUPS) / NUM_GROUPS)
    return np.searchsorted(edges, values, side="right").tolist()
