"""Aggregates over several tasks, and the likelihood metrics loss and perplexity."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from voxray.metrics.names import OUT_OF_100, headline, higher_is_better


def likelihood_metrics(nll: float, tokens: int) -> dict[str, float]:
    """Loss and perplexity of reference answers.

    loss        mean of -ln p over all answer tokens, end-of-text token included, without label smoothing
    perplexity  exp(loss): weighted by tokens, not a mean over rows or batches

    Args:
        nll: Sum of -ln p over the answer tokens.
    Returns:
        {metric: value}, without values that are not finite.
    """
    if not tokens or not math.isfinite(nll):
        return {}
    loss = nll / tokens
    perplexity = math.exp(loss) if loss < math.log(1e300) else math.inf
    return {"loss": loss} | ({"perplexity": perplexity} if math.isfinite(perplexity) else {})


def headline_score(task: str, value: Any) -> Any:
    """A task's headline metric as a score from 0, worst, to 1, best: ROUGE-L unchanged, max(1 - CER, 0), BLEU / 100.

    Args:
        value: A number or an array; the result has the same type.
    """
    if headline(task) in OUT_OF_100:
        return value / 100
    return value if higher_is_better(headline(task)) else 1 - np.minimum(value, 1.0)


def overall_metrics(values: Mapping[str, float], rows: Mapping[str, int]) -> dict[str, float]:
    """Aggregate the scores (``headline_score``) of all tasks that have a headline value; all results are from 0 to 1.

    Args:
        values: {"<task>/<metric>": value}.
        rows: {task: rows of its validation set}.
    Returns:
        {"overall/macro", ...}; empty without tasks.
    """
    tasks = [task for task in rows if rows[task] and f"{task}/{headline(task)}" in values]
    if not tasks:
        return {}
    scores = np.array([[headline_score(task, values[f"{task}/{headline(task)}"])] for task in tasks])
    aggregates = aggregate_tasks(scores, np.array([rows[task] for task in tasks]))
    return {f"overall/{name}": float(value[0]) for name, value in aggregates.items()}


def aggregate_tasks(scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Aggregate scores over tasks.

    macro     mean of the scores
    weighted  mean of the scores, weighted by the number of rows per task
    balance   smallest score over the largest: 1 if all tasks are equally good; 0 if the largest is 0

    Args:
        scores: (tasks, n) for n systems or bootstrap draws.
        weights: (tasks,), number of rows.
    Returns:
        {aggregate: (n,)}.
    """
    largest = scores.max(axis=0)
    balance = np.where(largest > 0, scores.min(axis=0) / np.where(largest > 0, largest, 1), 0.0)
    return {"macro": scores.mean(axis=0), "weighted": weights @ scores / weights.sum(), "balance": balance}
