"""Names of everything that validation and evaluation report, and which way each of them is good.

A key is ``<task>/<metric>``, or ``overall/<figure>``. What the metrics are stands where they are computed: ``counts``
(error rates, ROUGE-L and all that adds up over utterances), ``texts`` (BLEU, chrF, distinct-n), ``captions`` (BLEU-n,
CIDEr-D), ``java`` (METEOR, SPICE, SPIDEr), ``overall`` (loss, perplexity, and the figures over tasks).
"""

from collections.abc import Iterable

from voxray.core.tasks import TASKS

TEXT_METRICS = ("char_f1", "bleu", "chrf", "distinct_1", "distinct_2")
"""Reported for tasks that are answered in free text, beside the metrics of the task table."""
CAPTION_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
"""Reported for captions, beside those; CIDEr-D stands in the task table."""
JAVA_METRICS = ("meteor", "spice", "spider")
"""Of captions, in evaluation, where Java and the jars are given."""
LIKELIHOOD_METRICS = ("loss", "perplexity")
TRANSCRIPT_METRICS = ("cer_phonetic", "cer_best", "term_recall", "silence_hallucination")
"""Of transcripts, in evaluation, where there are second readings, terms, or clips in which nobody speaks."""
FAULTS = ("repetition", "hallucination")
"""Of every task, in evaluation."""
OVERALL = ("macro", "weighted", "balance")
_LOWER_IS_BETTER = {
    *("cer_nospace", "cer", "wer", "swer", "cer_phonetic", "cer_best", "loss", "perplexity"),
    *("silence_hallucination", *FAULTS),
}


def is_transcript(task: str) -> bool:
    """Whether a task is scored by error rates."""
    return headline(task) == "cer_nospace"


def is_caption(task: str) -> bool:
    """Whether a task is scored as captions are, in words and over several references."""
    return "cider_d" in TASKS[task].metrics


def text_metric_names(task: str) -> tuple[str, ...]:
    """The free-text metrics of a task that validation reports too; none for transcription."""
    if is_transcript(task):
        return ()
    return (*TEXT_METRICS, *CAPTION_METRICS) if is_caption(task) else TEXT_METRICS


def validation_metrics(tasks: Iterable[str] | None = None) -> tuple[str, ...]:
    """Every key that validating rows of these tasks, or of all, can give."""
    found = []
    for task in TASKS if tasks is None else tasks:
        names = (*TASKS[task].metrics, *text_metric_names(task), *LIKELIHOOD_METRICS)
        found += [f"{task}/{name}" for name in names]
    return (*found, *(f"overall/{name}" for name in OVERALL))


def evaluation_metrics(task: str) -> tuple[str, ...]:
    """Every metric that an evaluation can give for a task, the headline first."""
    own = TRANSCRIPT_METRICS if is_transcript(task) else JAVA_METRICS if is_caption(task) else ()
    return (*TASKS[task].metrics, *text_metric_names(task), *own, *FAULTS, *LIKELIHOOD_METRICS)


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
    keys = [f"{task}/{name}" for task in TASKS for name in evaluation_metrics(task)]
    keys += [f"overall/{name}" for name in OVERALL]
    name = metric.rpartition("/")[2]
    if metric not in {*keys, *(key.rpartition("/")[2] for key in keys)}:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(keys)}")
    return name not in _LOWER_IS_BETTER
