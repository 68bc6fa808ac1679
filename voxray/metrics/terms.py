"""Recall of important terms, such as drugs and findings: how many of those in the references are in the predictions."""

from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from voxray.text.normalize import Normalizer


class Terms:
    """A list of terms that can be counted in texts, regardless of spacing.

    Terms and texts are normalised alike. Latin letters and digits match only as whole words: ``mg`` is in "5mg" but not
    in "omg". Of overlapping terms the leftmost counts, and at the same position the longest: "고혈압" is no "혈압".

    Args:
        terms: Words or phrases; empty ones are ignored.
        normalizer: Of the texts.
    """

    def __init__(self, terms: Iterable[str], normalizer: Normalizer) -> None:
        self._normalizer = normalizer
        names = {normalizer.normalize(term).replace(" ", ""): " ".join(term.split()) for term in terms}
        self._names = {solid: name for solid, name in names.items() if solid}
        self._lengths = sorted({len(solid) for solid in self._names}, reverse=True)

    def __len__(self) -> int:
        return len(self._names)

    def count(self, text: str) -> Counter[str]:
        """How often each term occurs in a raw text."""
        words = self._normalizer.normalize(text).split()
        solid = "".join(words)
        kinds = [_kind(char) for char in solid]
        word_starts = set(accumulate(map(len, words), initial=0))
        boundaries = {
            index
            for index in range(len(solid) + 1)
            if index in word_starts or not kinds[index - 1] or kinds[index - 1] != kinds[index]
        }
        counts: Counter[str] = Counter()
        start = 0
        while start < len(solid):
            ends = (start + length for length in self._lengths) if start in boundaries else ()
            end = next((end for end in ends if end in boundaries and solid[start:end] in self._names), 0)
            if end:
                counts[self._names[solid[start:end]]] += 1
            start = end or start + 1
        return counts


def _kind(char: str) -> str:
    """Characters of the kinds "letter" and "digit" form words, up to the next change of kind; others stand alone."""
    if char.isascii() and char.isalpha():
        return "letter"
    return "digit" if char.isdigit() else ""
