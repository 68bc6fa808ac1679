"""Draws -> packs: which rows share a forward pass.

Three ways, all pure functions of lengths and a seed:

fixed   rows as they were drawn, so many at a time
length  rows of similar length together, as many as their task allows (per-task batch sizes)
packed  rows one after the other in packs of a token budget, filled by best fit

Packs come back in random order, so that no stretch of an epoch has long rows only. Source of best fit decreasing:
Johnson 1973, "Near-optimal bin packing algorithms".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from voxray.core.errors import SettingsError
from voxray.core.tasks import TASKS

WINDOW_ROWS = 16_384  # rows that are sorted by length or packed at a time


@dataclass(frozen=True)
class Batching:
    """How rows are put together.

    Attributes:
        kind: See the module.
        pack_size: Rows of a pack (``fixed``, ``length``).
        pack_tokens: Token budget of a pack (``packed``).
        per_task: {task: rows of a pack} for ``length``; packs then hold one task each.
    """

    kind: Literal["fixed", "length", "packed"] = "fixed"
    pack_size: int = 1
    pack_tokens: int = 0
    per_task: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Packs:
    """Packs of an epoch, in order.

    Attributes:
        rows: Row numbers of all packs, one after the other.
        ends: Place in ``rows`` after each pack's last.
    """

    rows: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def pack(self, number: int) -> np.ndarray:
        return self.rows[self.ends[number - 1] if number else 0 : self.ends[number]]


def make_packs(
    rows: np.ndarray, tokens: np.ndarray, task: np.ndarray, how: Batching, rng: np.random.Generator
) -> Packs:
    """Put drawn rows into packs.

    Args:
        rows: Row numbers in the order drawn.
        tokens: Tokens of every drawn row (prompt, audio, answer).
        task: Task code of every drawn row.
        rng: Where the order of packs is drawn from; ``fixed`` needs none.
    Raises:
        SettingsError: A row is longer than a pack.
    """
    if how.kind == "fixed":
        ends = np.append(np.arange(how.pack_size, len(rows), how.pack_size), len(rows))
        return Packs(rows, ends)
    if how.kind == "packed":
        if len(tokens) and tokens.max() > how.pack_tokens:
            raise SettingsError(f"--pack_tokens {how.pack_tokens}: a row of {tokens.max()} tokens does not fit")
        order, ends = _best_fit(tokens, how.pack_tokens)
    else:
        order, ends = _by_length(tokens, task, how)
    return _shuffled(rows[order], ends, rng)


def _by_length(tokens: np.ndarray, task: np.ndarray, how: Batching) -> tuple[np.ndarray, np.ndarray]:
    """Sort windows of rows by length (with per-task sizes: by task, then length) and cut them into packs."""
    orders, sizes = [], []
    for start in range(0, len(tokens), WINDOW_ROWS):
        window = slice(start, start + WINDOW_ROWS)
        groups = task[window] if how.per_task else np.zeros_like(task[window])
        order = np.lexsort((tokens[window], groups))
        orders.append(start + order)
        for code, count in zip(*np.unique(groups, return_counts=True), strict=True):
            size = how.per_task.get(list(TASKS)[code], how.pack_size) if how.per_task else how.pack_size
            full, rest = divmod(int(count), size)
            sizes += [size] * full + ([rest] if rest else [])
    return np.concatenate([*orders, np.empty(0, np.int64)]), np.cumsum(np.array(sizes, np.int64))


def _best_fit(tokens: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Put every row into the fullest pack that still has room for it, longest rows of a window first.

    Packs with room are kept by how many tokens they have left. Which of these numbers occur is one large integer with
    a bit for each, so that finding the smallest that suffices is a shift and a count, a microsecond for any budget.
    Packs that a window leaves with room take rows of the next one.
    """
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]  # packs by the tokens that they have left
    occurring, num_packs = 0, 0
    pack_of = np.empty(len(tokens), np.int32)
    for start in range(0, len(tokens), WINDOW_ROWS):
        window = tokens[start : start + WINDOW_ROWS]
        order, numbers = np.argsort(-window, kind="stable"), []
        for length in window[order].tolist():
            fitting = occurring >> length
            if fitting:
                left = length + (fitting & -fitting).bit_length() - 1
                number = with_room[left].pop()
                if not with_room[left]:
                    occurring ^= 1 << left
            else:
                left, number = budget, num_packs
                num_packs += 1
            numbers.append(number)
            left -= length
            if left:
                if not with_room[left]:
                    occurring |= 1 << left
                with_room[left].append(number)
        pack_of[start + order] = numbers
    ends = np.cumsum(np.bincount(pack_of, minlength=num_packs))
    return np.argsort(pack_of, kind="stable"), ends


def _shuffled(rows: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> Packs:
    """The same packs in random order."""
    sizes = np.diff(ends, prepend=0)
    order = rng.permutation(len(ends))
    starts, sizes = (ends - sizes)[order], sizes[order]
    new_ends = np.cumsum(sizes)
    # place i of the result comes from the start of its pack plus its place within the pack
    within = np.arange(len(rows)) - np.repeat(new_ends - sizes, sizes)
    return Packs(rows[np.repeat(starts, sizes) + within], new_ends)
