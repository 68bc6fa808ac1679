"""Captions against several references: BLEU-1 to BLEU-4 and CIDEr-D of the COCO caption evaluation, without Java.

Tokens are the words of ko-v1, not the tokens of the Penn Treebank, so values may differ slightly from published ones.
The formulas, and the constants that keep empty counts from dividing by zero, are those of pycocoevalcap.
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

    n-grams are counted over the whole set. The matches of an n-gram are clipped to its largest count in one reference.
    The reference length is the one closest to the prediction's length, the shorter one on a tie. No smoothing.
    """
    return bleu_from_sums(bleu_counts(captions).sum(axis=0, keepdims=True))[0].tolist()


def bleu_counts(captions: Sequence[Caption]) -> np.ndarray:
    """Contribution of every caption to ``coco_bleu``.

    Returns:
        (captions, 10): length of the prediction, length of the reference, matching n-grams of orders 1 to 4, all
        n-grams of the prediction of orders 1 to 4.
    """
    rows = []
    for references, prediction in captions:
        words, reference_words = tokenize(prediction), [tokenize(text) for text in references]
        reference_len = min((abs(len(reference) - len(words)), len(reference)) for reference in reference_words)[1]
        num_matches, num_ngrams = [], []
        for order in range(1, MAX_ORDER + 1):
            max_counts: Ngrams = Counter()
            for reference in reference_words:
                max_counts |= _ngrams(reference, order)
            ngrams = _ngrams(words, order)
            num_ngrams.append(ngrams.total())
            num_matches.append((ngrams & max_counts).total())
        rows.append([len(words), reference_len, *num_matches, *num_ngrams])
    return np.array(rows, np.float64)


def bleu_from_sums(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4, (n, 4), from sums of ``bleu_counts``, (n, 10)."""
    lengths, reference_lengths, matches, ngrams = np.split(sums, (1, 2, 2 + MAX_ORDER), axis=1)
    ratio = (lengths + _TINY) / (reference_lengths + _SMALL)
    brevity_penalty = np.exp(np.minimum(1 - 1 / ratio, 0))
    precisions = (matches + _TINY) / (ngrams + _SMALL)
    return np.cumprod(precisions, axis=1) ** (1 / np.arange(1, MAX_ORDER + 1)) * brevity_penalty


def cider_d(captions: Sequence[Caption]) -> list[float]:
    """CIDEr-D of every caption, 0 to 10; their mean is the CIDEr-D of the set.

    The weight of an n-gram depends on how many clips of this set have it in a reference. The value is therefore only
    meaningful for the whole set, and a single clip scores 0.

    Source: Vedantam et al. 2015 (arXiv 1411.5726), with the length of pycocoevalcap: the number of bigrams.
    """
    tokens = [([tokenize(text) for text in references], tokenize(prediction)) for references, prediction in captions]
    num_clips_with: Ngrams = Counter()
    for references, _ in tokens:
        num_clips_with.update({gram for words in references for gram in _all_ngrams(words)})
    log_clips = math.log(max(len(tokens), 1))
    scores = []
    for references, words in tokens:
        vectors = _tfidf(words, num_clips_with, log_clips)
        similarities = [_similarity(vectors, _tfidf(other, num_clips_with, log_clips)) for other in references]
        scores.append(10 * sum(similarities) / len(similarities))
    return scores


TfidfVectors = tuple[list[dict[tuple[str, ...], float]], list[float], int]
"""n-gram weights per order, the norm of each order's vector, and the number of bigrams."""


def _tfidf(words: Sequence[str], num_clips_with: Ngrams, log_clips: float) -> TfidfVectors:
    vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_ORDER)]
    for gram, times in _all_ngrams(words).items():
        vectors[len(gram) - 1][gram] = times * (log_clips - math.log(max(1, num_clips_with[gram])))
    norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
    return vectors, norms, max(len(words) - 1, 0)


def _similarity(prediction: TfidfVectors, reference: TfidfVectors) -> float:
    total = 0.0
    for vector, norm, ref_vector, ref_norm in zip(*prediction[:2], *reference[:2], strict=True):
        if norm and ref_norm:
            shared = [gram for gram in vector if gram in ref_vector]
            total += sum(min(vector[gram], ref_vector[gram]) * ref_vector[gram] for gram in shared) / (norm * ref_norm)
    return total / MAX_ORDER * math.exp(-((prediction[2] - reference[2]) ** 2) / (2 * CIDER_SIGMA**2))


def _ngrams(words: Sequence[str], order: int) -> Ngrams:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _all_ngrams(words: Sequence[str]) -> Ngrams:
    ngrams: Ngrams = Counter()
    for order in range(1, MAX_ORDER + 1):
        ngrams.update(_ngrams(words, order))
    return ngrams
