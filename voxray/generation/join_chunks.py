"""Texts of overlapping chunks of one recording, put together again (see ``long_audio``)."""

import math
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from functools import reduce
from typing import Any

from voxray.text.normalize import normalize_ko_v1

MIN_CHARS, MIN_WORDS = 4, 3
"""The least that is taken for the same in two chunks; a single syllable comes up everywhere."""


def join_texts(texts: Iterable[str], share: float) -> str:
    """Put the chunks' texts together where they say the same, the longest such run of words, else of characters.

    Without any, they are put side by side: something may then stand twice, but nothing is lost.

    Args:
        share: Of each chunk that overlaps with the next.
    """
    return reduce(lambda first, second: _joined(first, second, share), (text.strip() for text in texts))


def _joined(first: str, second: str, share: float) -> str:
    if not (first and second):
        return first or second
    left, right = first.split(), second.split()
    seam = _seam([normalize_ko_v1(w) for w in left], [normalize_ko_v1(w) for w in right], share)
    if seam and (seam[2] >= MIN_WORDS or len("".join(left[seam[0] - seam[2] : seam[0]])) >= MIN_CHARS):
        return " ".join([*left[: seam[0]], *right[seam[1] :]])
    places = [[at for at, char in enumerate(text) if not char.isspace()] for text in (first, second)]
    seam = _seam([first[at] for at in places[0]], [second[at] for at in places[1]], share)
    if seam and seam[2] >= MIN_CHARS:
        return first[: places[0][seam[0] - 1] + 1] + second[places[1][seam[1] - 1] + 1 :]
    return f"{first} {second}"


def _seam(left: Sequence[str], right: Sequence[str], share: float) -> tuple[int, int, int] | None:
    """The longest run that the end of one and the beginning of the other have in common.

    Speech is not evenly dense, so up to twice the overlap is searched.

    Returns:
        Where it ends in each, and its length; None if there is none.
    """
    reach_left, reach_right = (min(len(units), math.ceil(2 * share * len(units)) + 2) for units in (left, right))
    offset = len(left) - reach_left
    found = SequenceMatcher(None, left[offset:], right[:reach_right], autojunk=False).find_longest_match()
    return (offset + found.a + found.size, found.b + found.size, found.size) if found.size else None


def joined_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prediction rows with those of chunks put together to one for each recording.

    A recording of which a chunk could not be answered is left out; the ledger names the chunk.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("chunk_of"):
            groups.setdefault(row["chunk_of"], []).append(row)
    whole = [row for row in rows if not row.get("chunk_of")]
    for source, parts in groups.items():
        parts.sort(key=lambda row: row["chunk"])
        if len(parts) < parts[0]["num_chunks"]:
            continue
        text = join_texts((row["prediction"] for row in parts), parts[0]["overlap_share"])
        row = {**parts[0], "source": source, "prediction": text, "num_samples": parts[0]["whole_samples"]}
        row |= {name: sum(part[name] for part in parts) for name in ("sec", "num_new_tokens")}
        whole.append({**row, "hit_max": any(part["hit_max"] for part in parts)})
    return whole
