"""BLEU and chrF from per-answer counts, which the bootstrap can resample. The values equal sacrebleu's.

chrF counts character n-grams without spaces. BLEU counts the same n-grams, or those of the words of a tokenizer.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

import numpy as np

from voxray.metrics.captions import Caption
from voxray.metrics.counts import Ratio

CHARACTERS = "char"
"""sacrebleu's tokenizer of characters. Korean words include their particles, so BLEU over words would punish nearly
correct answers."""
MIN_SHARE = 0.25
"""Share of a text's letters that must be Han, Hangul and so on. Korean text has words such as MRI in it."""
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_BY_CHARACTER = re.compile(
    "[\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # kana
    "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7a3\ud7b0-\ud7fb"  # Hangul
    "\u0e01-\u0e4e\u0e80-\u0ece\u1780-\u17d3\u1000-\u109f\ua9e0-\ua9fe\uaa60-\uaa7f]"  # Thai, Lao, Khmer, Burmese
)


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

    @property
    def contributes(self) -> np.ndarray:
        """(answers,), whether each one counts: all do."""
        return np.ones(len(self.columns), bool)

    def select(self, index: np.ndarray) -> "CorpusMetric":
        """The metric over some of the answers."""
        return replace(self, columns=self.columns[index], n=len(index))


SummedMetric = Ratio | CorpusMetric
"""A metric that is computed from sums over answers, so that it has intervals, slices and comparisons."""


def bleu_and_chrf(
    answers: Sequence[Caption], *, by_script: bool = False
) -> tuple[dict[str, CorpusMetric], dict[str, str]]:
    """Corpus BLEU and chrF2, from 0 to 100, equal to sacrebleu's ``corpus_score``.

    Args:
        answers: One or more references and the prediction of each answer.
        by_script: BLEU's tokenizer is that of the script of an answer's first reference (``script_tokenizer``). If
            these are several, n-grams are counted by each and summed, and the signature lists them: ``tok:13a+char``.
            Otherwise BLEU is over characters.
    Returns:
        {metric: CorpusMetric}, {metric: signature of sacrebleu}.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf = BLEU(tokenize=CHARACTERS), CHRF()
    num_references = {len(references) for references, _ in answers}
    # sacrebleu marks a varying number by -1
    bleu.num_refs = chrf.num_refs = num_references.pop() if len(num_references) == 1 else -1
    names = [script_tokenizer(references[0]) if by_script else CHARACTERS for references, _ in answers]
    tokenizers = {name: BLEU(tokenize=name).tokenizer for name in sorted(set(names))}
    bleu.tokenizer_signature = "+".join(tokenizers)
    words = {name: None if name == CHARACTERS else tokenizer for name, tokenizer in tokenizers.items()}
    counts = [_answer_counts(*answer, words[name], chrf) for answer, name in zip(answers, names, strict=True)]
    bleu_columns, chrf_columns = (np.array(rows, np.float64) for rows in zip(*counts, strict=True))
    metrics = {
        "bleu": CorpusMetric(bleu_columns, _bleu, len(counts)),
        "chrf": CorpusMetric(chrf_columns, lambda sums: _chrf(sums, chrf), len(counts)),
    }
    return metrics, {name: metric.get_signature().format() for name, metric in (("bleu", bleu), ("chrf", chrf))}


def script_tokenizer(text: str) -> str:
    """Name of sacrebleu's tokenizer for a text, by its script.

    ``zh`` for Chinese. ``char`` for Japanese, Korean, Thai, Lao, Khmer and Burmese: sacrebleu's own tokenizers for
    Japanese and Korean (``ja-mecab``, ``ko-mecab``) need packages that voxray does not install. ``13a`` for all others.
    """
    num_han, num_by_character = len(_HAN.findall(text)), len(_BY_CHARACTER.findall(text))
    others = _BY_CHARACTER.sub("", _HAN.sub("", text))
    if num_han + num_by_character <= MIN_SHARE * (num_han + num_by_character + sum(map(str.isalpha, others))):
        return "13a"
    return CHARACTERS if num_by_character else "zh"


def _answer_counts(
    references: Sequence[str], prediction: str, tokenize: Callable[[str], str] | None, chrf: Any
) -> tuple[list[int], list[int]]:
    """Contribution of one answer.

    Args:
        tokenize: BLEU's tokenizer, which puts spaces between words; None for characters.
    Returns:
        For BLEU: see ``_bleu_counts``.
        For chrF, for each order from 1 to 6: n-grams of the prediction, of the best reference, and common to both.
    """
    solid_pred, *solid_refs = ("".join(text.split()) for text in (prediction, *references))
    pred_ngrams, ref_ngrams = (
        _ngrams(solid_pred, chrf.char_order),
        [_ngrams(text, chrf.char_order) for text in solid_refs],
    )
    common = [_num_common(pred_ngrams, ngrams) for ngrams in ref_ngrams]
    num_pred = [ngrams.total() for ngrams in pred_ngrams]
    chrf_counts = []
    for by_order, num_common in zip(ref_ngrams, common, strict=True):
        triples = zip(num_pred, by_order, num_common, strict=True)
        chrf_counts.append([n for pred, ref, both in triples for n in (pred if ref else 0, ref.total(), both)])
    best = int(_chrf(np.array(chrf_counts), chrf).argmax()) if len(references) > 1 else 0
    lengths = [len(solid_pred), *map(len, solid_refs)]
    if tokenize:
        pred_words, *ref_words = (tuple(tokenize(text.rstrip()).split()) for text in (prediction, *references))
        pred_ngrams, ref_ngrams = _ngrams(pred_words, 4), [_ngrams(words, 4) for words in ref_words]
        common = [_num_common(pred_ngrams, ngrams) for ngrams in ref_ngrams]
        lengths = [len(pred_words), *map(len, ref_words)]
    return _bleu_counts(lengths, pred_ngrams[:4], ref_ngrams, common), chrf_counts[best]


NgramsByOrder = list[Counter[Any]]
"""The n-grams of a text, order by order."""


def _bleu_counts(
    lengths: Sequence[int],
    pred_ngrams: NgramsByOrder,
    ref_ngrams: Sequence[NgramsByOrder],
    common: Sequence[Sequence[int]],
) -> list[int]:
    """Contribution of one answer to BLEU.

    Args:
        lengths: Of the prediction and of each reference.
        common: For each reference, its n-grams that the prediction has, by order.
    Returns:
        Length of the prediction, length of the closest reference (the shorter one on a tie), matching n-grams of orders
        1 to 4, all n-grams of the prediction of orders 1 to 4.
    """
    num_matches = list(common[0][:4])
    if len(ref_ngrams) > 1:
        num_matches = _num_common(
            pred_ngrams, [reduce(or_, same_order) for same_order in zip(*ref_ngrams, strict=True)]
        )
    reference_len = min((abs(length - lengths[0]), length) for length in lengths[1:])[1]
    return [lengths[0], reference_len, *num_matches[:4], *(ngrams.total() for ngrams in pred_ngrams)]


def _ngrams(units: Sequence[str], max_order: int) -> NgramsByOrder:
    """n-grams of orders 1 to ``max_order`` of the characters of a text, or of a tuple of words."""
    orders = range(1, max_order + 1)
    return [Counter(units[start : start + order] for start in range(len(units) - order + 1)) for order in orders]


def _num_common(first: NgramsByOrder, second: NgramsByOrder) -> list[int]:
    """Number of n-grams that two texts have in common, by order."""
    return [
        sum(min(times, others[ngram]) for ngram, times in ngrams.items() if ngram in others)
        for ngrams, others in zip(first, second, strict=False)
    ]


def _bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU with exponential smoothing: ``compute_bleu`` of sacrebleu, which takes one row of sums at a time.

    Logarithms, their sum and exponentials are Python's, whose last digits may differ from numpy's.

    Args:
        sums: (n, 10), see ``_bleu_counts``.
    """
    lengths, reference_lengths, matches, totals = np.split(np.rint(sums), (1, 2, 6), axis=1)
    defined = matches.any(axis=1) & (totals > 0).all(axis=1)
    lengths, reference_lengths, matches, totals = (
        part[defined] for part in (lengths, reference_lengths, matches, totals)
    )
    smoothing = 2.0 ** np.cumsum(matches == 0, axis=1)
    precisions = np.where(matches > 0, 100 * matches, 100) / np.where(matches > 0, totals, smoothing * totals)
    penalties = np.minimum(1 - reference_lengths / lengths, 0)
    scores = np.zeros(len(sums))
    scores[defined] = [
        math.exp(penalty) * math.exp(sum(map(math.log, by_order)) / 4)
        for by_order, [penalty] in zip(precisions.tolist(), penalties.tolist(), strict=True)
    ]
    return scores


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
