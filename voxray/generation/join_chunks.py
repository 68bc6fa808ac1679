"""Join the texts of overlapping chunks of one recording (see ``long_audio``)."""

import math
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from functools import reduce
from typing import Any, NamedTuple

from voxray.text.normalize import normalize_ko_v1

MIN_CHARS, MIN_WORDS = 4, 3
"""Shortest match between two chunks that counts as the same speech. A single syllable occurs everywhere."""


class _Match(NamedTuple):
    """A run that two chunks share: the indices after its last unit in each chunk, and its length in units."""

    left_end: int
    right_end: int
    size: int


def join_texts(texts: Iterable[str], share: float) -> str:
    """Join the chunks' texts at the longest run of words that neighbours share, else at the longest run of characters.

    Texts that share no run are joined with a space: words may then appear twice, but none is lost.

    Args:
        share: Share of each chunk that overlaps with the next.
    """
    return reduce(lambda first, second: _join(first, second, share), (text.strip() for text in texts))


def _join(first: str, second: str, share: float) -> str:
    if not (first and second):
        return first or second
    left, right = first.split(), second.split()
    match = _longest_match([normalize_ko_v1(w) for w in left], [normalize_ko_v1(w) for w in right], share)
    if match:
        num_chars = sum(map(len, left[match.left_end - match.size : match.left_end]))
        if match.size >= MIN_WORDS or num_chars >= MIN_CHARS:
            return " ".join([*left[: match.left_end], *right[match.right_end :]])
    left_at, right_at = ([index for index, char in enumerate(text) if not char.isspace()] for text in (first, second))
    match = _longest_match([first[index] for index in left_at], [second[index] for index in right_at], share)
    if match and match.size >= MIN_CHARS:
        return first[: left_at[match.left_end - 1] + 1] + second[right_at[match.right_end - 1] + 1 :]
    return f"{first} {second}"


def _longest_match(left: Sequence[str], right: Sequence[str], share: float) -> _Match | None:
    """The longest run that the end of ``left`` shares with the beginning of ``right``; None without any.

    The density of speech varies, so up to twice the overlap is searched.
    """
    left_reach, right_reach = (min(len(units), math.ceil(2 * share * len(units)) + 2) for units in (left, right))
    offset = len(left) - left_reach
    block = SequenceMatcher(None, left[offset:], right[:right_reach], autojunk=False).find_longest_match()
    return _Match(offset + block.a + block.size, block.b + block.size, block.size) if block.size else None


def join_chunk_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prediction rows in which the chunks of each recording are joined into one row.

    A recording with a missing chunk is left out; the ledger names the chunk.
    """
    chunks_by_source: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("chunk_of"):
            chunks_by_source.setdefault(row["chunk_of"], []).append(row)
    joined = [row for row in rows if not row.get("chunk_of")]
    for source, chunks in chunks_by_source.items():
        chunks.sort(key=lambda row: row["chunk"])
        first = chunks[0]
        if len(chunks) < first["num_chunks"]:
            continue
        text = join_texts((row["prediction"] for row in chunks), first["overlap_share"])
        row = {**first, "source": source, "prediction": text, "num_samples": first["whole_samples"]}
        row |= {name: sum(chunk[name] for chunk in chunks) for name in ("sec", "num_new_tokens")}
        joined.append({**row, "hit_max": any(chunk["hit_max"] for chunk in chunks)})
    return joined
