"""Terms, such as drugs and findings: how many are recognised, and how many answers take from their prompts."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from voxray.core.context import split_terms
from voxray.core.errors import RunError
from voxray.core.manifest import open_regular
from voxray.core.tasks import TASKS
from voxray.metrics.rows import PredictionRow, row_normalizer, row_readings, row_references
from voxray.text.normalize import Normalizer, Normalizers

RowTerms = tuple[Counter[str], Counter[str]]
"""How often each term is in a row's reference, and how often of these in its prediction."""


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


def count_terms(
    rows: Sequence[PredictionRow], terms: Sequence[str], normalizers: Normalizers
) -> tuple[list[RowTerms], dict[str, np.ndarray]]:
    """Count terms in the transcripts of rows.

    Args:
        terms: Terms whose recall is measured; if empty, those of the context in each row's own prompt.
    Returns:
        The terms of every row, and {count: (rows,)}: ``terms_ref`` and ``terms_found``, terms in the reference and
        those of them in the prediction; ``terms_absent`` and ``terms_leaked``, terms of the prompt that the reference
        does not have and those of them in the prediction. Both are empty without any terms.
    """
    contexts = [_context_terms(row) for row in rows]
    if not terms and not any(contexts):
        return [], {}
    term_list = cache(Terms)
    row_terms: list[RowTerms] = []
    absent, leaked = np.zeros((2, len(rows)), int)
    for number, (row, context) in enumerate(zip(rows, contexts, strict=True)):
        normalizer, references = row_normalizer(row, normalizers), row_references(row)
        readings = row_readings(row) if len(references) == 1 else references
        texts = (readings[0], row["prediction"])
        in_reference, in_prediction = map(term_list(tuple(terms) or context, normalizer).count, texts)
        row_terms.append((in_reference, in_reference & in_prediction))
        spoken = [_solid(text, normalizer) for text in readings]
        not_said = tuple(term for term in context if not any(_solid(term, normalizer) in text for text in spoken))
        in_prediction = term_list(not_said, normalizer).count(row["prediction"])
        absent[number], leaked[number] = len(not_said), len(in_prediction)
    totals = np.array([[counter.total() for counter in pair] for pair in row_terms])
    columns = {"terms_ref": totals[:, 0], "terms_found": totals[:, 1], "terms_absent": absent, "terms_leaked": leaked}
    return row_terms, columns


def _context_terms(row: PredictionRow) -> tuple[str, ...]:
    """Terms in the prompt of a transcription. Prompts of other tasks are requests."""
    if TASKS[row["task"]].template != "transcription":
        return ()
    return split_terms(row.get("context") or row.get("prompt") or "")


def _solid(text: str, normalizer: Normalizer) -> str:
    return normalizer.normalize(text).replace(" ", "")


def read_terms(path: str | Path) -> tuple[str, ...]:
    """Read terms from a text file, one per line. Blank lines and lines that begin with # are ignored.

    Raises:
        RunError: The file cannot be read or has no term.
    """
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot read the list of terms: {error}") from None
    terms = tuple(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")))
    if not terms:
        raise RunError(f"{path}: no term in this list; write one per line")
    return terms


def _kind(char: str) -> str:
    """Characters of the kinds "letter" and "digit" form words, up to the next change of kind; others stand alone."""
    if char.isascii() and char.isalpha():
        return "letter"
    return "digit" if char.isdigit() else ""
