"""Names of all metrics that validation and evaluation report, and whether a higher or a lower value is better.

A key is ``<task>/<metric>`` or ``overall/<aggregate>``. The metrics are defined where they are computed: ``counts``
(error rates, ROUGE-L and all other ratios of sums over utterances), ``texts`` (BLEU, chrF, distinct-n), ``captions``
(BLEU-n, CIDEr-D), ``meteor_spice`` (METEOR, SPICE), ``overall`` (loss, perplexity, aggregates over tasks).
"""

from collections.abc import Iterable

from voxray.core.task_definitions import ERROR_RATES, TRANSLATION_METRICS
from voxray.core.tasks import TASKS

TEXT_METRICS = ("char_f1", "bleu", "chrf", "distinct_1", "distinct_2")
"""Of tasks with free-text answers, in addition to the metrics of the task table."""
CAPTION_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
"""Of captions, in addition to ``TEXT_METRICS``. CIDEr-D is in the task table."""
JAVA_METRICS = ("meteor", "spice", "spider")
"""Of captions, in evaluation, if Java and the jars are available."""
LIKELIHOOD_METRICS = ("loss", "perplexity")
TRANSCRIPT_METRICS = ("cer_phonetic", "cer_best", "term_recall", "context_leak", "silence_hallucination")
"""Of transcripts, in evaluation, if there are second readings, terms, contexts, or clips without speech."""
FAULTS = ("repetition", "hallucination")
"""Of all tasks, in evaluation."""
OUT_OF_100 = frozenset(TRANSLATION_METRICS)
"""Metrics from 0 to 100, as sacrebleu reports them. Rates and the other scores start at 0 and are 1 at their best."""
OVERALL = ("macro", "weighted", "balance")
_LOWER_IS_BETTER = {
    *("cer_nospace", "cer", "wer", "swer", "cer_phonetic", "cer_best", "loss", "perplexity"),
    *("context_leak", "silence_hallucination", *FAULTS),
}


def is_transcript(task: str) -> bool:
    """Whether a task is scored by error rates."""
    return headline(task) in ERROR_RATES


def is_translation(task: str) -> bool:
    """Whether a task is scored by BLEU and chrF on raw text."""
    return headline(task) in TRANSLATION_METRICS


def is_caption(task: str) -> bool:
    """Whether a task is scored with the metrics of captions, in words and against several references."""
    return "cider_d" in TASKS[task].metrics


def text_metric_names(task: str) -> tuple[str, ...]:
    """The free-text metrics that validation reports for a task; none for transcription."""
    if is_transcript(task):
        return ()
    if is_translation(task):
        return TRANSLATION_METRICS
    return (*TEXT_METRICS, *CAPTION_METRICS) if is_caption(task) else TEXT_METRICS


def validation_metrics(tasks: Iterable[str] | None = None) -> tuple[str, ...]:
    """All keys that validation on these tasks, or on all tasks, can report."""
    keys = []
    for task in TASKS if tasks is None else tasks:
        names = (*TASKS[task].metrics, *text_metric_names(task), *LIKELIHOOD_METRICS)
        keys += [f"{task}/{name}" for name in dict.fromkeys(names)]
    return (*keys, *(f"overall/{name}" for name in OVERALL))


def evaluation_metrics(task: str) -> tuple[str, ...]:
    """All metrics that an evaluation can report for a task, the headline metric first."""
    specific = TRANSCRIPT_METRICS if is_transcript(task) else JAVA_METRICS if is_caption(task) else ()
    names = (*TASKS[task].metrics, *text_metric_names(task), *specific, *FAULTS, *LIKELIHOOD_METRICS)
    return tuple(dict.fromkeys(names))


def headline(task: str) -> str:
    """The main metric of a task, its first in the task table."""
    return TASKS[task].metrics[0]


def higher_is_better(metric: str) -> bool:
    """Whether a higher value of a metric is better.

    Args:
        metric: A key such as ``asr/cer``, ``tqa/perplexity`` or ``overall/macro``, or only the metric's name.
    Raises:
        ValueError: The metric does not exist.
    """
    keys = [f"{task}/{name}" for task in TASKS for name in evaluation_metrics(task)]
    keys += [f"overall/{name}" for name in OVERALL]
    name = metric.rpartition("/")[2]
    if metric not in {*keys, *(key.rpartition("/")[2] for key in keys)}:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(keys)}")
    return name not in _LOWER_IS_BETTER
