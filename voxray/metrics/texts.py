"""Metrics of free-text answers that need the whole set of texts: BLEU, chrF, distinct-n and the caption metrics.

Texts are normalised by ko-v1 first, except translations, which are scored as raw text. The metrics are defined on a
whole set of answers and never averaged over parts.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from voxray.metrics import captions
from voxray.metrics.counts import Ratio, rouge_units
from voxray.metrics.names import CAPTION_METRICS, is_caption, is_transcript, is_translation
from voxray.metrics.ngrams import CorpusMetric, SummedMetric, bleu_and_chrf
from voxray.text.normalize import KO_V1, normalize_ko_v1

UNITS = "hangul by character, latin words and numbers whole"

Pair = tuple[str | Sequence[str], str]
"""One reference or several, and the prediction, as raw text."""
TextScores = dict[str, dict[str, float | int]]


def text_metrics(task: str, pairs: Sequence[Pair]) -> TextScores:
    """{metric: {"value", "n"}} of all answers to the rows of a task (see ``score_texts``)."""
    summed, distinct, _ = score_texts(task, pairs)
    return {name: {"value": metric.value, "n": metric.n} for name, metric in summed.items()} | distinct


def score_texts(task: str, pairs: Sequence[Pair]) -> tuple[dict[str, SummedMetric], TextScores, dict[str, str]]:
    """Metrics of all answers to the rows of a task, with the signature of each.

    bleu                    sacrebleu's corpus BLEU on characters (spaces do not count), from 0 to 100; of translations
                            on raw text, with the tokenizer of the reference's script (``ngrams.script_tokenizer``)
    chrf                    sacrebleu's chrF2, from 0 to 100; of translations on raw text
    distinct_1, distinct_2  different n-grams over all n-grams of all answers, 0 to 1, in ROUGE units (Hangul by
                            character, Latin words and numbers whole); it falls with the amount of text
    bleu_1 .. bleu_4        captions only: COCO's BLEU on words, from 0 to 1
    cider_d                 captions only: CIDEr-D, from 0 to 10, with n-gram weights from this set

    Args:
        pairs: One reference or several, and the prediction, of every row.
    Returns:
        {metric: sums} of the metrics that can be computed from sums over rows, and therefore have intervals.
        {metric: {"value", "n"}} of distinct-n, where ``n`` is the number of n-grams; absent without n-grams.
        {metric: signature}: sacrebleu's own, and for the others tokenisation and normaliser.
        All are empty for a task without free-text answers; a translation has only BLEU and chrF.
    """
    if is_transcript(task) or not pairs:
        return {}, {}, {}
    answers = [((texts,) if isinstance(texts, str) else tuple(texts), prediction) for texts, prediction in pairs]
    if is_translation(task):
        translation_metrics, signatures = bleu_and_chrf(answers, by_script=True)
        return {**translation_metrics}, {}, signatures
    normalized = [(tuple(map(normalize_ko_v1, texts)), normalize_ko_v1(prediction)) for texts, prediction in answers]
    sacrebleu_metrics, sacrebleu_signatures = bleu_and_chrf(normalized)
    summed: dict[str, SummedMetric] = {**sacrebleu_metrics}
    signatures = {name: f"{signature}|norm:{KO_V1}" for name, signature in sacrebleu_signatures.items()}
    signatures |= {name: f"tok:{UNITS}|norm:{KO_V1}" for name in ("rouge_l", "distinct_1", "distinct_2")}
    if is_caption(task):
        counts = captions.bleu_counts(normalized)
        for index, name in enumerate(CAPTION_METRICS):
            summed[name] = CorpusMetric(counts, partial(_coco_bleu, index), len(pairs))
        scores = np.array(captions.cider_d(normalized))
        summed["cider_d"] = Ratio(scores, np.ones_like(scores), len(pairs))
        signatures |= {name: f"tok:words|norm:{KO_V1}" for name in ("rouge_l", "cider_d", *CAPTION_METRICS)}
    return summed, _distinct([prediction for _, prediction in normalized]), signatures


def _distinct(predictions: Sequence[str]) -> TextScores:
    scores: TextScores = {}
    answers = [rouge_units(text) for text in predictions]
    for order in (1, 2):
        starts = ((units, start) for units in answers for start in range(len(units) - order + 1))
        ngrams = Counter(tuple(units[start : start + order]) for units, start in starts)
        if total := ngrams.total():
            scores[f"distinct_{order}"] = {"value": len(ngrams) / total, "n": total}
    return scores


def _coco_bleu(index: int, sums: np.ndarray) -> np.ndarray:
    return captions.bleu_from_sums(sums)[:, index]
