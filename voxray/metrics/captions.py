"""Captions against several references: BLEU-1 to 4 and CIDEr-D as the COCO caption evaluation has them, without Java.

Words are those of ko-v1 between spaces, not the Penn Treebank's, so figures may differ a little from published ones.
Formulas, and the constants that keep empty counts from dividing by zero, are those of pycocoevalcap.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from voxray.text.normalize import normalize_ko_v1

MAX_ORDER = 4
CIDER_SIGMA = 6.0
_TINY, _SMALL = 1e-15, 1e-9

Caption = tuple[Sequence[str], str]
"""References and prediction, as raw text."""
Ngrams = Counter[tuple[str, ...]]


def tokenize(text: str) -> list[str]:
    return normalize_ko_v1(text).split()


def coco_bleu(captions: Sequence[Caption]) -> list[float]:
    """BLEU-1 to BLEU-4 of a set of captions, 0 to 1.

    n-grams are counted over the whole set, each clipped to the reference that has most of it; of the references'
    lengths the one closest to the prediction's counts, the shorter of two. No smoothing.
    """
    return bleu_of_sums(bleu_counts(captions).sum(axis=0, keepdims=True))[0].tolist()


def bleu_counts(captions: Sequence[Caption]) -> np.ndarray:
    """What every caption adds to ``coco_bleu``: (captions, 10), the words it has, the words it should have, its
    n-grams that are right, 1 to 4, and all of them."""
    rows = []
    for references, prediction in captions:
        words, wanted = tokenize(prediction), [tokenize(text) for text in references]
        length = min((abs(len(other) - len(words)), len(other)) for other in wanted)[1]
        correct, guessed = [], []
        for order in range(1, MAX_ORDER + 1):
            most: Ngrams = Counter()
            for other in wanted:
                most |= _ngrams(other, order)
            found = _ngrams(words, order)
            guessed.append(found.total())
            correct.append((found & most).total())
        rows.append([len(words), length, *correct, *guessed])
    return np.array(rows, np.float64)


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Sums of ``bleu_counts``, (n, 10), to BLEU-1 to BLEU-4, (n, 4)."""
    lengths, wanted, correct, guessed = np.split(sums, (1, 2, 2 + MAX_ORDER), axis=1)
    ratio = (lengths + _TINY) / (wanted + _SMALL)
    penalty = np.exp(np.minimum(1 - 1 / ratio, 0))
    precisions = (correct + _TINY) / (guessed + _SMALL)
    return np.cumprod(precisions, axis=1) ** (1 / np.arange(1, MAX_ORDER + 1)) * penalty


def cider_d(captions: Sequence[Caption]) -> list[float]:
    """CIDEr-D of every caption, 0 to 10; their mean is that of the set.

    How much an n-gram weighs depends on how many clips of this very set have it in a reference, so the figure belongs
    to the whole set, and a single clip scores 0.

    Source: Vedantam et al. 2015 (arXiv 1411.5726), with pycocoevalcap's length: the number of bigrams.
    """
    tokens = [([tokenize(text) for text in references], tokenize(prediction)) for references, prediction in captions]
    clips_with: Ngrams = Counter()
    for references, _ in tokens:
        clips_with.update({gram for words in references for gram in _all_ngrams(words)})
    log_clips = math.log(max(len(tokens), 1))
    scores = []
    for references, words in tokens:
        mine = _weighted(words, clips_with, log_clips)
        each = [_similarity(mine, _weighted(other, clips_with, log_clips)) for other in references]
        scores.append(10 * sum(each) / len(each))
    return scores


Weighted = tuple[list[dict[tuple[str, ...], float]], list[float], int]
"""Weights of n-grams by order, the length of each order's vector, and the number of bigrams."""


def _weighted(words: Sequence[str], clips_with: Ngrams, log_clips: float) -> Weighted:
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_ORDER)]
    for gram, times in _all_ngrams(words).items():
        vectors[len(gram) - 1][gram] = times * (log_clips - math.log(max(1, clips_with[gram])))
    norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
    return vectors, norms, max(len(words) - 1, 0)


def _similarity(mine: Weighted, other: Weighted) -> float:
    total = 0.0
    for vector, norm, wanted, wanted_norm in zip(*mine[:2], *other[:2], strict=True):
        if norm and wanted_norm:
            common = sum(min(weight, wanted[gram]) * wanted[gram] for gram, weight in vector.items() if gram in wanted)
            total += common / (norm * wanted_norm)
    return total / MAX_ORDER * math.exp(-((mine[2] - other[2]) ** 2) / (2 * CIDER_SIGMA**2))


def _ngrams(words: Sequence[str], order: int) -> Ngrams:
    return Counter(zip(*(words[at:] for at in range(order)), strict=False))


def _all_ngrams(words: Sequence[str]) -> Ngrams:
    found: Ngrams = Counter()
    for order in range(1, MAX_ORDER + 1):
        found.update(_ngrams(words, order))
    return found
