"""Errors of answers: alignments, confusions, inserted and deleted words, and what changes between two runs."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

from voxray.metrics.counts import metric_ratio
from voxray.metrics.names import headline, is_transcript, is_translation
from voxray.metrics.rows import PredictionRow, row_references
from voxray.metrics.texts import score_texts

EditKind = Literal["equal", "substitute", "insert", "delete"]
KINDS: dict[str, EditKind] = {"equal": "equal", "replace": "substitute", "insert": "insert", "delete": "delete"}
"""Kind of edit by rapidfuzz's tag."""
MARKS: dict[EditKind, str] = {"equal": " ", "substitute": "S", "insert": "I", "delete": "D"}
GAP = "*"
LENGTHS = {
    **{"empty": 0, "1-5 chars": 5, "6-10 chars": 10, "11-20 chars": 20, "21-50 chars": 50, "51-100 chars": 100},
    "over 100 chars": float("inf"),
}
"""Names of the slices by length of the reference, and the largest length in each."""


@dataclass(frozen=True)
class EditStep:
    """One step of an alignment: a unit of the reference and one of the prediction; "" on the side that has none."""

    kind: EditKind
    reference: str
    prediction: str


@dataclass(frozen=True)
class ErrorTally:
    """Numbers of errors.

    Attributes:
        substitutions: (reference, prediction) -> times.
        insertions: Units that are not in the reference -> times.
        deletions: Units of the reference that are missing -> times.
        num_reference: Number of units of all references.
    """

    substitutions: Counter[tuple[str, str]] = field(default_factory=Counter)
    insertions: Counter[str] = field(default_factory=Counter)
    deletions: Counter[str] = field(default_factory=Counter)
    num_reference: int = 0


def _edits(
    reference: Sequence[str], prediction: Sequence[str]
) -> Iterator[tuple[EditKind, Sequence[str], Sequence[str]]]:
    """Align two sequences with the fewest edits: (kind, units of the reference, units of the prediction) per edit.

    jiwer has the same alignments (test_confusions_are_jiwers), but strips texts and takes 2 to 5 times as long.
    """
    for edit in Levenshtein.opcodes(reference, prediction):
        yield KINDS[edit.tag], reference[edit.src_start : edit.src_end], prediction[edit.dest_start : edit.dest_end]


def align(reference: Sequence[str], prediction: Sequence[str]) -> Iterator[EditStep]:
    """Align two sequences with the fewest edits, unit by unit."""
    for kind, left, right in _edits(reference, prediction):
        yield from (EditStep(kind, one, other) for one, other in zip_longest(left, right, fillvalue=""))


def tally(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> ErrorTally:
    """Count the errors of (reference, prediction) pairs, each a sequence of words or of characters."""
    substitutions: Counter[tuple[str, str]] = Counter()
    insertions: Counter[str] = Counter()
    deletions: Counter[str] = Counter()
    num_reference = 0
    for reference, prediction in pairs:
        num_reference += len(reference)
        for kind, left, right in _edits(reference, prediction):
            if kind == "substitute":
                substitutions.update(zip(left, right, strict=True))
            elif kind == "insert":
                insertions.update(right)
            elif kind == "delete":
                deletions.update(left)
    return ErrorTally(substitutions, insertions, deletions, num_reference)


def pieces(reference: str, prediction: str, *, by_word: bool = False) -> list[tuple[EditKind, str, str]]:
    """Split two texts into equal, substituted, inserted and deleted pieces, for showing them in colour.

    Args:
        by_word: Align words, not characters: in free text answers that share little, aligned characters say nothing.
    """
    if by_word:
        edits = _edits(reference.split(), prediction.split())
        return [(kind, " ".join(left), " ".join(right)) for kind, left, right in edits]
    return [(kind, "".join(left), "".join(right)) for kind, left, right in _edits(reference, prediction)]


def display_width(text: str) -> int:
    """Width of a text in terminal columns: Hangul and Han take two, combining marks none."""
    return sum(_char_width(char) for char in text)


def _char_width(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def aligned_lines(reference: Sequence[str], prediction: Sequence[str], *, width: int = 100, joint: str = " ") -> str:
    """Show reference, prediction and marks below each other, aligned by column and wrapped to a terminal.

    Args:
        reference, prediction: Words or characters.
        width: Columns of the terminal.
        joint: Separator of the units: a space for words, nothing for characters.
    Returns:
        ``REF:``, ``HYP:`` and, where anything differs, a line with S, I and D below the units that differ.
    """
    lines: list[list[str]] = [["REF: ", "HYP: ", "     "]]
    free = line_width = max(1, width - 5)
    for step in align(reference, prediction):
        units = [_truncate(unit, line_width) for unit in (step.reference, step.prediction)]
        size = max(*map(display_width, units), 1)
        cells = [*(_pad(unit, size) for unit in units), MARKS[step.kind].ljust(size)]
        if free < size and len(lines[-1][0]) > 5:
            lines.append(["REF: ", "HYP: ", "     "])
            free = line_width
        lines[-1] = [line + cell + joint for line, cell in zip(lines[-1], cells, strict=True)]
        free -= size + len(joint)
    shown = [line.rstrip() for block in lines for line in block]
    return "\n".join(line for line in shown if line)


def _truncate(unit: str, max_width: int) -> str:
    """Cut a unit that is wider than a line; its number of characters is appended."""
    if display_width(unit) <= max_width:
        return unit
    end = f"\u2026({len(unit)})"
    unit = unit[:max_width]
    while unit and display_width(unit + end) > max_width:
        unit = unit[:-1]
    return unit + end


def _pad(unit: str, size: int) -> str:
    return unit + " " * (size - display_width(unit)) if unit else GAP * size


def row_errors(task: str, rows: Sequence[PredictionRow], columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Error of every answer by its task's headline metric: 0 is correct, above 1 means more edits than reference units.

    Of a translation it is 1 - chrF / 100, because BLEU is 0 for most single sentences.

    Args:
        rows: The answers.
        columns: {count: array over answers}.
    """
    if is_transcript(task):
        return columns["solid_edits"] / np.maximum(columns["solid_ref"], 1)
    if is_translation(task):
        chrf = score_texts(task, [(row_references(row), row["prediction"]) for row in rows])[0]["chrf"]
        return 1 - chrf.from_sums(chrf.columns) / 100
    ratio = metric_ratio(task, headline(task), columns)
    assert ratio is not None
    return 1 - ratio.numerator / ratio.denominator


def length_slices(references: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Rows by the length of their reference without spaces, in the form of ``slices.slice_rows``."""
    rows_by_length: dict[str, list[int]] = {name: [] for name in LENGTHS}
    for index, reference in enumerate(references):
        length = len(reference.replace(" ", ""))
        rows_by_length[next(name for name, limit in LENGTHS.items() if length <= limit)].append(index)
    return {"length": {name: rows for name, rows in rows_by_length.items() if rows}}


def changed_rows(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Rows whose answers differ between two runs, by the kind of change.

    Args:
        first, second: The same rows of two runs, with ``error`` (see ``row_errors``) and ``exact``.
    Returns:
        Row indices, the largest change first:
        broken  correct in the first run, wrong in the second
        mended  wrong in the first run, correct in the second
        worse, better  wrong in both, with a larger or smaller error in the second
    """
    changes: dict[str, list[int]] = {"broken": [], "mended": [], "worse": [], "better": []}
    for index, (before, after) in enumerate(zip(first, second, strict=True)):
        if before["exact"] != after["exact"]:
            changes["broken" if before["exact"] else "mended"].append(index)
        elif before["error"] != after["error"]:
            changes["worse" if after["error"] > before["error"] else "better"].append(index)
    return {
        name: sorted(rows, key=lambda index: -abs(second[index]["error"] - first[index]["error"]))
        for name, rows in changes.items()
    }
