"""Metrics of free-text answers that need the whole set of texts: BLEU, chrF, distinct-n, and those of captions.

Texts are normalised by ko-v1 first. These metrics belong to a whole set of answers: they are never means over parts.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from voxray.metrics import captions
from voxray.metrics.counts import Ratio, rouge_units
from voxray.metrics.names import CAPTION_METRICS, is_caption, is_transcript
from voxray.metrics.ngrams import Summed, bleu_and_chrf
from voxray.text.normalize import KO_V1, normalize_ko_v1

UNITS = "hangul by character, latin words and numbers whole"

Pair = tuple[str | Sequence[str], str]
"""References, or the only one, and prediction, as raw text."""
TextScores = dict[str, dict[str, float | int]]


def text_metrics(task: str, pairs: Sequence[Pair]) -> TextScores:
    """Metrics of all answers to a task's rows, see ``scored_texts``."""
    summed, whole, _ = scored_texts(task, pairs)
    return {name: {"value": each.value, "n": each.n} for name, each in summed.items()} | whole


def scored_texts(task: str, pairs: Sequence[Pair]) -> tuple[dict[str, Ratio | Summed], TextScores, dict[str, str]]:
    """Metrics of all answers to a task's rows, and what exactly made each figure.

    bleu                    sacrebleu's corpus BLEU on characters (spaces do not count), from 0 to 100
    chrf                    sacrebleu's chrF2, from 0 to 100
    distinct_1, distinct_2  different n-grams over all n-grams of all answers, 0 to 1, in ROUGE units (Hangul by
                            character, Latin words and numbers whole); it falls with the amount of text
    bleu_1 .. bleu_4        of captions: COCO's BLEU in words, from 0 to 1
    cider_d                 of captions: CIDEr-D, from 0 to 10, with the weights of this very set

    Args:
        pairs: References, one or more, and prediction of every row.
    Returns:
        {metric: sums} of those that sums over rows give, for intervals too.
        {metric: {"value", "n"}} of distinct-n, ``n`` being n-grams; without any of them the metric is absent.
        {metric: signature}, sacrebleu's own, and what the others cut texts into.
        All are empty for a task that is not answered in free text.
    """
    if is_transcript(task) or not pairs:
        return {}, {}, {}
    several = [
        (tuple(map(normalize_ko_v1, (texts,) if isinstance(texts, str) else texts)), normalize_ko_v1(prediction))
        for texts, prediction in pairs
    ]
    sacrebleus, signed = bleu_and_chrf(several)
    summed: dict[str, Ratio | Summed] = {**sacrebleus}
    signatures = {name: f"{signature}|norm:{KO_V1}" for name, signature in signed.items()}
    signatures |= {name: f"tok:{UNITS}|norm:{KO_V1}" for name in ("rouge_l", "distinct_1", "distinct_2")}
    if is_caption(task):
        counts = captions.bleu_counts(several)
        summed |= {name: Summed(counts, partial(_coco_bleu, at), len(pairs)) for at, name in enumerate(CAPTION_METRICS)}
        values = np.array(captions.cider_d(several))
        summed["cider_d"] = Ratio(values, np.ones_like(values), len(pairs))
        signatures |= {name: f"tok:words|norm:{KO_V1}" for name in ("rouge_l", "cider_d", *CAPTION_METRICS)}
    return summed, _distinct([prediction for _, prediction in several]), signatures


def _distinct(predictions: Sequence[str]) -> TextScores:
    found: TextScores = {}
    answers = [rouge_units(text) for text in predictions]
    for size in (1, 2):
        ngrams = Counter(tuple(units[at : at + size]) for units in answers for at in range(len(units) - size + 1))
        if total := ngrams.total():
            found[f"distinct_{size}"] = {"value": len(ngrams) / total, "n": total}
    return found


def _coco_bleu(at: int, sums: np.ndarray) -> np.ndarray:
    return captions.bleu_of_sums(sums)[:, at]
