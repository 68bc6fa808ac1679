"""References with two readings, ``(70%)/(칠십 퍼센트)``: the better one of every span counts.

A model may write numbers and Latin words as they are spelled or as they are said, and change between the two within a
sentence; the better one of two whole sentences would still call half of such a prediction wrong.
"""

import numpy as np
from rapidfuzz.distance import Levenshtein

_EDIT = 1 << 32
"""Cost of an edit. A character of the reference takes 1 off, so that of equally good paths the longest is found."""


def spans(spelling: str, phonetic: str) -> list[tuple[str, ...]]:
    """Cut two readings of a sentence into spans.

    Words that both have belong to both; between them stand the alternatives, word by word where there are as many on
    either side.

    Args:
        spelling, phonetic: Normalised texts.
    Returns:
        One text, or two that differ, for each span, without spaces.
    """
    left, right = spelling.split(), phonetic.split()
    found: list[tuple[str, ...]] = []
    start_left = start_right = 0
    blocks = Levenshtein.editops(left, right).as_matching_blocks()
    for block in blocks:  # the last one is empty and marks the ends
        a, b = left[start_left : block.a], right[start_right : block.b]
        if len(a) == len(b):
            found += zip(a, b, strict=True)
        else:
            found.append(("".join(a), "".join(b)))
        found += [(word,) for word in left[block.a : block.a + block.size]]
        start_left, start_right = block.a + block.size, block.b + block.size
    return found


def best_of_readings(spelling: str, phonetic: str, solid_prediction: str) -> tuple[int, int]:
    """Fewest edits that make some path through the spans the prediction, and the length of that path.

    Args:
        spelling, phonetic: Normalised texts.
        solid_prediction: Normalised text without spaces.
    Returns:
        Edits and characters of the reference, spaces left out; of paths with equally few edits the longest.
    """
    letters = np.frombuffer(solid_prediction.encode("utf-32-le", "surrogatepass"), np.uint32)
    row = np.arange(len(letters) + 1, dtype=np.int64) * _EDIT
    for choices in spans(spelling, phonetic):
        row = np.minimum.reduce([_advanced(row, text, letters) for text in choices])
    edits = -(-int(row[-1]) // _EDIT)
    return edits, edits * _EDIT - int(row[-1])


def _advanced(row: np.ndarray, text: str, letters: np.ndarray) -> np.ndarray:
    """Costs of the prediction's beginnings after some more characters of the reference (one row of the edit table)."""
    steps = np.arange(len(row), dtype=np.int64) * _EDIT
    for letter in np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32):
        through = row + (_EDIT - 1)  # the letter is missing in the prediction
        np.minimum(through[1:], row[:-1] + np.where(letters == letter, -1, _EDIT - 1), out=through[1:])
        row = np.minimum.accumulate(through - steps) + steps  # letters that the prediction has too many
    return row
