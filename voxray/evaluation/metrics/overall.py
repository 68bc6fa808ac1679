"""What is said of several tasks at once, and of answers' likelihood."""

import math
from collections.abc import Mapping

from voxray.evaluation.metrics.names import headline, higher_is_better


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


def score_of(task: str, value: float) -> float:
    """A task's headline metric turned so that 1 is best and 0 worst: ROUGE-L as it is, 1 - CER down to 0."""
    return value if higher_is_better(headline(task)) else 1 - min(value, 1.0)


def overall_metrics(values: Mapping[str, float], rows: Mapping[str, int]) -> dict[str, float]:
    """Figures over the tasks that have a headline value, from their scores (``score_of``); all are from 0 to 1.

    macro     mean of the scores, every task counting the same
    weighted  mean of the scores, every task counting by the rows of its set
    balance   smallest score over the largest: 1 if all tasks are equally good; 0 if the largest is 0

    Args:
        values: {"<task>/<metric>": value}.
        rows: {task: rows of its validation set}.
    Returns:
        {"overall/macro", ...}; empty without any task.
    """
    keys = {task: f"{task}/{headline(task)}" for task in rows if rows[task]}
    scores = {task: score_of(task, values[key]) for task, key in keys.items() if key in values}
    if not scores:
        return {}
    total = sum(rows[task] for task in scores)
    largest = max(scores.values())
    return {
        "overall/macro": sum(scores.values()) / len(scores),
        "overall/weighted": sum(score * rows[task] for task, score in scores.items()) / total,
        "overall/balance": min(scores.values()) / largest if largest else 0.0,
    }
