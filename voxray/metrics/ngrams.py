"""BLEU and chrF from per-answer counts, which the bootstrap can resample. The values equal sacrebleu's.

Both count character n-grams without spaces, so the n-grams are counted once for the two.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from voxray.metrics.captions import Caption

BLEU_TOKENIZER = "char"
"""Of sacrebleu. Korean words include their particles, so BLEU over words would punish nearly correct answers."""


@dataclass(frozen=True)
class CorpusMetric:
    """A metric computed from sums over answers; ``counts.Ratio`` is the simplest case.

    Attributes:
        columns: (answers, columns).
        from_sums: Maps sums of the columns, (n, columns), to values, (n,).
        n: Number of answers.
    """

    columns: np.ndarray
    from_sums: Callable[[np.ndarray], np.ndarray]
    n: int

    @property
    def value(self) -> float:
        return float(self.from_sums(self.columns.sum(axis=0, keepdims=True))[0])


def bleu_and_chrf(answers: Sequence[Caption]) -> tuple[dict[str, CorpusMetric], dict[str, str]]:
    """Corpus BLEU on characters and chrF2, from 0 to 100, equal to sacrebleu's ``corpus_score``.

    Args:
        answers: One or more references and the prediction of each answer, normalised: the only white space is single
            spaces.
    Returns:
        {metric: CorpusMetric}, {metric: signature of sacrebleu}.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf = BLEU(tokenize=BLEU_TOKENIZER), CHRF()
    num_references = {len(references) for references, _ in answers}
    # sacrebleu marks a varying number by -1
    bleu.num_refs = chrf.num_refs = num_references.pop() if len(num_references) == 1 else -1
    counts = [_answer_counts(references, prediction, chrf) for references, prediction in answers]
    bleu_columns, chrf_columns = (np.array(rows, np.float64) for rows in zip(*counts, strict=True))
    metrics = {
        "bleu": CorpusMetric(bleu_columns, lambda sums: _bleu(sums, bleu), len(counts)),
        "chrf": CorpusMetric(chrf_columns, lambda sums: _chrf(sums, chrf), len(counts)),
    }
    return metrics, {name: metric.get_signature().format() for name, metric in (("bleu", bleu), ("chrf", chrf))}


def _answer_counts(references: Sequence[str], prediction: str, chrf: Any) -> tuple[list[int], list[int]]:
    """Contribution of one answer.

    Returns:
        For BLEU: length of the prediction, length of the closest reference (the shorter one on a tie), matching n-grams
        of orders 1 to 4, all n-grams of the prediction of orders 1 to 4.
        For chrF, for each order from 1 to 6: n-grams of the prediction, of the best reference, and common to both.
    """
    solid_pred, solid_refs = prediction.replace(" ", ""), [text.replace(" ", "") for text in references]
    pred_ngrams = _ngrams(solid_pred, chrf.char_order)
    ref_ngrams = [_ngrams(text, chrf.char_order) for text in solid_refs]
    common = [[_num_common(*pair) for pair in zip(pred_ngrams, ngrams, strict=True)] for ngrams in ref_ngrams]
    num_matches = common[0][:4]
    if len(references) > 1:
        max_counts = [reduce(or_, same_order) for same_order in zip(*ref_ngrams, strict=True)]
        num_matches = [_num_common(pred_ngrams[order], max_counts[order]) for order in range(4)]
    reference_len = min((abs(len(text) - len(solid_pred)), len(text)) for text in solid_refs)[1]
    num_pred = [ngrams.total() for ngrams in pred_ngrams]
    chrf_counts = []
    for by_order, num_common in zip(ref_ngrams, common, strict=True):
        triples = zip(num_pred, by_order, num_common, strict=True)
        chrf_counts.append([n for pred, ref, both in triples for n in (pred if ref else 0, ref.total(), both)])
    best = int(_chrf(np.array(chrf_counts), chrf).argmax()) if len(references) > 1 else 0
    return [len(solid_pred), reference_len, *num_matches, *num_pred[:4]], chrf_counts[best]


def _ngrams(text: str, max_order: int) -> list[Counter[str]]:
    """Character n-grams of orders 1 to ``max_order``."""
    orders = range(1, max_order + 1)
    return [Counter(text[start : start + order] for start in range(len(text) - order + 1)) for order in orders]


def _num_common(first: Counter[str], second: Counter[str]) -> int:
    return sum(min(times, second[ngram]) for ngram, times in first.items() if ngram in second)


def _bleu(sums: np.ndarray, bleu: Any) -> np.ndarray:
    scores = [
        bleu.compute_bleu(row[2:6], row[6:], row[0], row[1], bleu.smooth_method).score
        for row in np.rint(sums).astype(int).tolist()
    ]
    return np.array(scores)


def _chrf(sums: np.ndarray, chrf: Any) -> np.ndarray:
    """F of the mean precision and the mean recall over the n-gram orders that both sides have.

    The terms are added in sacrebleu's order, so that even the last digit is equal.
    """
    precision, recall, num_orders = np.zeros((3, len(sums)))
    for start in range(0, sums.shape[1], 3):
        num_pred, num_ref, num_common = sums[:, start : start + 3].T
        in_both = (num_pred > 0) & (num_ref > 0)
        precision += np.where(in_both, num_common / np.maximum(num_pred, 1), 0)
        recall += np.where(in_both, num_common / np.maximum(num_ref, 1), 0)
        num_orders += in_both
    precision, recall = precision / np.maximum(num_orders, 1), recall / np.maximum(num_orders, 1)
    weight = chrf.beta**2
    denominator = weight * precision + recall
    f_score = (1 + weight) * precision * recall / np.where(denominator > 0, denominator, 1)
    return 100 * np.where(denominator > 0, f_score, 0)
