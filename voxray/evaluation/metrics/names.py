"""Names of everything that validation and evaluation report, and which way each of them is good.

A key is ``<task>/<metric>``, or ``overall/<figure>``. What the metrics are stands where they are computed: ``counts``
(error rates, ROUGE-L, exact match), ``texts`` (BLEU, character F1, distinct-n), ``overall`` (loss, perplexity, and the
figures over tasks).
"""

from collections.abc import Iterable

from voxray.tasks import TASKS

TEXT_METRICS = ("bleu", "char_f1", "distinct_1", "distinct_2")
"""Reported for tasks that are answered in free text, beside the metrics of the task table."""
LIKELIHOOD_METRICS = ("loss", "perplexity")
OVERALL = ("macro", "weighted", "balance")
_LOWER_IS_BETTER = {"cer_nospace", "cer", "wer", "loss", "perplexity"}


def text_metrics_of(task: str) -> tuple[str, ...]:
    """The free-text metrics of a task; none for transcription."""
    return TEXT_METRICS if "rouge_l" in TASKS[task].metrics else ()


def validation_metrics(tasks: Iterable[str] | None = None) -> tuple[str, ...]:
    """Every key that validating rows of these tasks, or of all, can give."""
    found = []
    for task in TASKS if tasks is None else tasks:
        names = (*TASKS[task].metrics, *text_metrics_of(task), *LIKELIHOOD_METRICS)
        found += [f"{task}/{name}" for name in names]
    return (*found, *(f"overall/{name}" for name in OVERALL))


def headline(task: str) -> str:
    """The metric that a task is judged by, the first of the task table: ``cer_nospace`` or ``rouge_l``."""
    return TASKS[task].metrics[0]


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of a metric is a better one.

    Args:
        metric: A key such as ``asr/cer``, ``tqa/perplexity`` or ``overall/macro``, or the metric's bare name.
    Raises:
        ValueError: There is no such metric.
    """
    keys, name = validation_metrics(), metric.rpartition("/")[2]
    if metric not in {*keys, *(key.rpartition("/")[2] for key in keys)}:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(keys)}")
    return name not in _LOWER_IS_BETTER
