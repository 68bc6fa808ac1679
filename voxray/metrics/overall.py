"""What is said of several tasks at once, and of answers' likelihood."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from voxray.metrics.names import headline, higher_is_better


def likelihood_metrics(nll: float, tokens: int) -> dict[str, float]:
    """Loss and perplexity of reference answers.

    loss        mean of -ln p over all answer tokens, the end-of-text token included, without label smoothing
    perplexity  e to that power: weighted by tokens, not a mean over rows or batches

    Args:
        nll: Sum of -ln p over the answer tokens.
    Returns:
        Those of the two that are finite.
    """
    if not tokens or not math.isfinite(nll):
        return {}
    loss = nll / tokens
    perplexity = math.exp(loss) if loss < math.log(1e300) else math.inf
    return {"loss": loss} | ({"perplexity": perplexity} if math.isfinite(perplexity) else {})


def headline_score(task: str, value: Any) -> Any:
    """A task's headline metric turned so that 1 is best and 0 worst: ROUGE-L as it is, 1 - CER down to 0.

    Args:
        value: A number, or an array of them; what comes back is of its kind.
    """
    return value if higher_is_better(headline(task)) else 1 - np.minimum(value, 1.0)


def overall_metrics(values: Mapping[str, float], rows: Mapping[str, int]) -> dict[str, float]:
    """Figures over the tasks that have a headline value, from their scores (``headline_score``); all are from 0 to 1.

    Args:
        values: {"<task>/<metric>": value}.
        rows: {task: rows of its validation set}.
    Returns:
        {"overall/macro", ...}; empty without any task.
    """
    tasks = [task for task in rows if rows[task] and f"{task}/{headline(task)}" in values]
    if not tasks:
        return {}
    scores = np.array([[headline_score(task, values[f"{task}/{headline(task)}"])] for task in tasks])
    found = figures(scores, np.array([rows[task] for task in tasks]))
    return {f"overall/{name}": float(value[0]) for name, value in found.items()}


def figures(scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Figures over tasks.

    macro     mean of the scores, every task counting the same
    weighted  mean of the scores, every task counting by the rows of its set
    balance   smallest score over the largest: 1 if all tasks are equally good; 0 if the largest is 0

    Args:
        scores: (tasks, n), n systems or draws at once.
        weights: (tasks,), rows.
    Returns:
        {figure: (n,)}.
    """
    largest = scores.max(axis=0)
    balance = np.where(largest > 0, scores.min(axis=0) / np.where(largest > 0, largest, 1), 0.0)
    return {"macro": scores.mean(axis=0), "weighted": weights @ scores / weights.sum(), "balance": balance}
