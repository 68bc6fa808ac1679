"""Recall of terms that matter (drugs, findings): which of those in the references are in the predictions."""

from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from voxray.text.normalize import Normalizer


class Terms:
    """A list of terms, found in texts whatever their spacing.

    Terms and texts are normalised alike. Latin letters and digits are only found whole: ``mg`` is in "5mg" but not in
    "omg". Of terms that overlap the leftmost counts, and of those the longest: "고혈압" is no "혈압".

    Args:
        terms: Words or phrases; empty ones are passed over.
        normalizer: Of the texts.
    """

    def __init__(self, terms: Iterable[str], normalizer: Normalizer) -> None:
        self._normalizer = normalizer
        found = {normalizer.normalize(term).replace(" ", ""): " ".join(term.split()) for term in terms}
        self._names = {solid: name for solid, name in found.items() if solid}
        self._lengths = sorted({len(solid) for solid in self._names}, reverse=True)

    def __len__(self) -> int:
        return len(self._names)

    def count(self, text: str) -> Counter[str]:
        """How often each term stands in a raw text."""
        words = self._normalizer.normalize(text).split()
        solid = "".join(words)
        kind = [_kind(char) for char in solid]
        starts = set(accumulate(map(len, words), initial=0))
        whole = {at for at in range(len(solid) + 1) if at in starts or not kind[at - 1] or kind[at - 1] != kind[at]}
        found: Counter[str] = Counter()
        at = 0
        while at < len(solid):
            size = next((n for n in self._lengths if at in whole and self._is_term(solid, at, n, whole)), 0)
            if size:
                found[self._names[solid[at : at + size]]] += 1
            at += size or 1
        return found

    def _is_term(self, solid: str, at: int, size: int, whole: set[int]) -> bool:
        return at + size in whole and solid[at : at + size] in self._names


def _kind(char: str) -> str:
    """Latin letters and digits make words that end where the kind changes; other characters stand alone."""
    if char.isascii() and char.isalpha():
        return "letter"
    return "digit" if char.isdigit() else ""


def recalled(wanted: Counter[str], given: Counter[str]) -> Counter[str]:
    """Of the terms in a reference, those that its prediction has, each as often as both do."""
    return wanted & given
