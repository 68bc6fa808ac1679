"""What goes wrong in answers: alignments, confusions, lost and added words, and what one run breaks of another's."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

from voxray.metrics.counts import metric_ratio
from voxray.metrics.names import headline, is_transcript

EditKind = Literal["equal", "substitute", "insert", "delete"]
MARKS: dict[EditKind, str] = {"equal": " ", "substitute": "S", "insert": "I", "delete": "D"}
GAP = "*"
LENGTHS = {
    **{"empty": 0, "1-5 chars": 5, "6-10 chars": 10, "11-20 chars": 20, "21-50 chars": 50, "51-100 chars": 100},
    "over 100 chars": float("inf"),
}
"""Names of the slices by length of the reference, and the longest in each."""


@dataclass(frozen=True)
class EditStep:
    """One step of an alignment: a unit of the reference against one of the prediction; "" where there is none."""

    kind: EditKind
    reference: str
    prediction: str


@dataclass(frozen=True)
class ErrorTally:
    """Errors by what they are.

    Attributes:
        substitutions: (reference, prediction) -> times.
        insertions: Units that are not in the reference -> times.
        deletions: Units of the reference that are missing -> times.
        num_reference: Units of all references.
    """

    substitutions: Counter[tuple[str, str]] = field(default_factory=Counter)
    insertions: Counter[str] = field(default_factory=Counter)
    deletions: Counter[str] = field(default_factory=Counter)
    num_reference: int = 0


def align(reference: Sequence[str], prediction: Sequence[str]) -> Iterator[EditStep]:
    """Align two sequences with the fewest edits, unit by unit."""
    for code in Levenshtein.opcodes(reference, prediction):
        left, right = reference[code.src_start : code.src_end], prediction[code.dest_start : code.dest_end]
        if code.tag in ("equal", "replace"):
            kind: EditKind = "equal" if code.tag == "equal" else "substitute"
            yield from (EditStep(kind, one, other) for one, other in zip(left, right, strict=True))
        else:
            yield from (EditStep("insert", "", unit) for unit in right)
            yield from (EditStep("delete", unit, "") for unit in left)


def tally(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> ErrorTally:
    """Count the errors of (reference, prediction) pairs, each a sequence of words or of characters."""
    substitutions: Counter[tuple[str, str]] = Counter()
    insertions: Counter[str] = Counter()
    deletions: Counter[str] = Counter()
    num_reference = 0
    for reference, prediction in pairs:
        num_reference += len(reference)
        for step in align(reference, prediction):
            if step.kind == "substitute":
                substitutions[step.reference, step.prediction] += 1
            elif step.kind == "insert":
                insertions[step.prediction] += 1
            elif step.kind == "delete":
                deletions[step.reference] += 1
    return ErrorTally(substitutions, insertions, deletions, num_reference)


def pieces(reference: str, prediction: str, *, by_word: bool = False) -> list[tuple[EditKind, str, str]]:
    """Two texts as runs of equal, substituted, added and missing units, for showing them in colour.

    Args:
        by_word: Align words, not characters; of answers in free text that share little the characters tell nothing.
    """
    joint = " " if by_word else ""
    steps = align(*((text.split() if by_word else text) for text in (reference, prediction)))
    found = []
    for kind, group in groupby(steps, key=lambda step: step.kind):
        run = list(group)
        texts = (joint.join(getattr(step, side) for step in run) for side in ("reference", "prediction"))
        found.append((kind, *(text.strip() if by_word else text for text in texts)))
    return found


def display_width(text: str) -> int:
    """Columns that a text takes in a terminal: Hangul and Han two each, marks that combine with a letter none."""
    return sum(_char_width(char) for char in text)


def _char_width(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def aligned_lines(reference: Sequence[str], prediction: Sequence[str], *, width: int = 100, joint: str = " ") -> str:
    """Reference, prediction and marks below each other, column by column, wrapped to a terminal.

    Args:
        reference, prediction: Words or characters.
        width: Columns of the terminal.
        joint: Between units: a space for words, nothing for characters.
    Returns:
        ``REF:``, ``HYP:`` and, where anything differs, a line with S, I and D below what they stand for.
    """
    lines: list[list[str]] = [["REF: ", "HYP: ", "     "]]
    room = whole = max(1, width - 5)
    for step in align(reference, prediction):
        units = [_cut(unit, whole) for unit in (step.reference, step.prediction)]
        size = max(*map(display_width, units), 1)
        cells = [*(_filled(unit, size) for unit in units), MARKS[step.kind].ljust(size)]
        if room < size and len(lines[-1][0]) > 5:
            lines.append(["REF: ", "HYP: ", "     "])
            room = whole
        lines[-1] = [line + cell + joint for line, cell in zip(lines[-1], cells, strict=True)]
        room -= size + len(joint)
    shown = [line.rstrip() for block in lines for line in block]
    return "\n".join(line for line in shown if line)


def _cut(unit: str, room: int) -> str:
    """A unit that is wider than a line, cut to it; its length in characters stands behind it."""
    if display_width(unit) <= room:
        return unit
    end = f"\u2026({len(unit)})"
    unit = unit[:room]
    while unit and display_width(unit + end) > room:
        unit = unit[:-1]
    return unit + end


def _filled(unit: str, size: int) -> str:
    return unit + " " * (size - display_width(unit)) if unit else GAP * size


def row_errors(task: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """How wrong answers are by their task's headline metric: 0 is right; above 1 more was said than there was to say.

    Args:
        columns: {count: array over answers}.
    """
    if is_transcript(task):
        return columns["solid_edits"] / np.maximum(columns["solid_ref"], 1)
    ratio = metric_ratio(task, headline(task), columns)
    assert ratio is not None
    return 1 - ratio.top / ratio.bottom


def length_slices(references: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Rows by the length of their reference without spaces, in the form of ``slices.slices_of``."""
    found: dict[str, list[int]] = {name: [] for name in LENGTHS}
    for at, reference in enumerate(references):
        length = len(reference.replace(" ", ""))
        found[next(name for name, most in LENGTHS.items() if length <= most)].append(at)
    return {"length": {name: places for name, places in found.items() if places}}


def changed_rows(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Row numbers by what the second run did to them.

    Args:
        first, second: The same rows of two runs, with ``error`` (see ``row_errors``) and ``exact``.
    Returns:
        broken  right in the first run, wrong in the second
        mended  the other way round
        worse, better  wrong in both, by other amounts
        each with the largest change first.
    """
    found: dict[str, list[int]] = {"broken": [], "mended": [], "worse": [], "better": []}
    for at, (before, after) in enumerate(zip(first, second, strict=True)):
        if before["exact"] != after["exact"]:
            found["broken" if before["exact"] else "mended"].append(at)
        elif before["error"] != after["error"]:
            found["worse" if after["error"] > before["error"] else "better"].append(at)
    return {
        name: sorted(rows, key=lambda at: -abs(second[at]["error"] - first[at]["error"]))
        for name, rows in found.items()
    }
