"""References with two readings, such as ``(70%)/(칠십 퍼센트)``: the better reading of every span is used.

A model may write numbers and Latin words as spelled or as spoken, and may switch within a sentence. Choosing the better
of the two whole sentences would still count half of such a prediction as wrong.
"""

import numpy as np
from rapidfuzz.distance import Levenshtein

_EDIT = 1 << 32
"""Cost of an edit. Every reference character reduces the cost by 1, so the longest of equally good paths wins."""


def spans(spelling: str, phonetic: str) -> list[tuple[str, ...]]:
    """Cut two readings of a sentence into spans.

    Words that both readings share are spans with one text. The words between them are alternatives, word by word if
    both readings have the same number of words there.

    Args:
        spelling, phonetic: Normalised texts.
    Returns:
        For each span one text, or two different ones, without spaces.
    """
    left, right = spelling.split(), phonetic.split()
    result: list[tuple[str, ...]] = []
    left_start = right_start = 0
    blocks = Levenshtein.editops(left, right).as_matching_blocks()
    for block in blocks:  # the last block is empty and marks the end of both readings
        left_words, right_words = left[left_start : block.a], right[right_start : block.b]
        if len(left_words) == len(right_words):
            result += zip(left_words, right_words, strict=True)
        else:
            result.append(("".join(left_words), "".join(right_words)))
        result += [(word,) for word in left[block.a : block.a + block.size]]
        left_start, right_start = block.a + block.size, block.b + block.size
    return result


def best_of_readings(spelling: str, phonetic: str, solid_prediction: str) -> tuple[int, int]:
    """Fewest edits between the prediction and a path that takes one reading of every span.

    Args:
        spelling, phonetic: Normalised texts.
        solid_prediction: Normalised text without spaces.
    Returns:
        Edits, and the path's length in characters without spaces; the longest of paths with equally few edits.
    """
    pred_chars = _code_points(solid_prediction)
    costs = np.arange(len(pred_chars) + 1, dtype=np.int64) * _EDIT
    for choices in spans(spelling, phonetic):
        costs = np.minimum.reduce([_advance(costs, text, pred_chars) for text in choices])
    edits = -(-int(costs[-1]) // _EDIT)
    return edits, edits * _EDIT - int(costs[-1])


def _advance(costs: np.ndarray, text: str, pred_chars: np.ndarray) -> np.ndarray:
    """Advance one row of the edit table (costs of all prefixes of the prediction) by characters of the reference."""
    insertions = np.arange(len(costs), dtype=np.int64) * _EDIT
    for char in _code_points(text):
        new = costs + (_EDIT - 1)  # deletion: the prediction lacks the character
        np.minimum(new[1:], costs[:-1] + np.where(pred_chars == char, -1, _EDIT - 1), out=new[1:])
        costs = np.minimum.accumulate(new - insertions) + insertions
    return costs


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
