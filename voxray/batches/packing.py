"""Drawn rows -> microbatches: which rows share a forward pass.

Three ways, all pure functions of lengths and a seed:

fixed   rows in the order drawn, a fixed number per microbatch
length  rows of similar length together, up to the batch size of their task
packed  rows one after the other in packs of a token budget, filled by best fit

Microbatches come back in random order, so that no stretch of an epoch has long rows only. Source of best fit
decreasing: Johnson 1973, "Near-optimal bin packing algorithms".
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
    """How rows are grouped into microbatches.

    Attributes:
        kind: See the module.
        microbatch_size: Rows of a microbatch (``fixed``, ``length``).
        pack_tokens: Token budget of a pack (``packed``).
        per_task: {task: rows of a microbatch} for ``length``; each microbatch then holds rows of one task only.
    """

    kind: Literal["fixed", "length", "packed"] = "fixed"
    microbatch_size: int = 1
    pack_tokens: int = 0
    per_task: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Microbatches:
    """All microbatches of an epoch, in order; an item is the row numbers of one microbatch.

    Attributes:
        rows: Row numbers of all microbatches, one after the other.
        ends: End offset of each microbatch in ``rows``.
    """

    rows: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.rows[self.ends[number - 1] if number else 0 : self.ends[number]]


def make_microbatches(
    rows: np.ndarray, tokens: np.ndarray, task: np.ndarray, batching: Batching, rng: np.random.Generator
) -> Microbatches:
    """Group drawn rows into microbatches.

    Args:
        rows: Row numbers in the order drawn.
        tokens: Tokens of every drawn row (prompt, audio, answer).
        task: Task code of every drawn row.
        rng: Draws the order of the microbatches; not used for ``fixed``.
    Raises:
        SettingsError: A row is longer than a pack.
    """
    if batching.kind == "fixed":
        size = batching.microbatch_size
        return Microbatches(rows, np.append(np.arange(size, len(rows), size), len(rows)))
    if batching.kind == "packed":
        if len(tokens) and tokens.max() > batching.pack_tokens:
            raise SettingsError(f"--pack_tokens {batching.pack_tokens}: a row of {tokens.max()} tokens does not fit")
        order, ends = _best_fit(tokens, batching.pack_tokens)
    else:
        order, ends = _by_length(tokens, task, batching)
    return _shuffled(rows[order], ends, rng)


def _by_length(tokens: np.ndarray, task: np.ndarray, batching: Batching) -> tuple[np.ndarray, np.ndarray]:
    """Sort windows of rows by length (with per-task sizes: by task, then length) and cut them into microbatches.

    Returns:
        Order of the rows, and the end offset of each microbatch in it.
    """
    orders, sizes = [], []
    per_task, names = batching.per_task or {}, list(TASKS)
    for start in range(0, len(tokens), WINDOW_ROWS):
        window = slice(start, start + WINDOW_ROWS)
        groups = task[window] if per_task else np.zeros_like(task[window])
        orders.append(start + np.lexsort((tokens[window], groups)))
        for code, count in zip(*np.unique(groups, return_counts=True), strict=True):
            size = per_task.get(names[code], batching.microbatch_size)
            full, rest = divmod(int(count), size)
            sizes += [size] * full + ([rest] if rest else [])
    return np.concatenate([*orders, np.empty(0, np.int64)]), np.cumsum(np.array(sizes, np.int64))


def _best_fit(tokens: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Put every row into the fullest pack that it still fits into, longest rows of a window first.

    Open packs are grouped by their free tokens. One large integer has a bit set for each number of free tokens that
    occurs, so that finding the smallest sufficient one is a shift and a count. Rows of equal length go together: of the
    packs with that many free tokens, each takes as many of them as fit before the next one does.
    Packs that a window leaves open take rows of the next one.

    Returns:
        Order of the rows, and the end offset of each pack in it.
    """
    open_packs: list[list[int]] = [[] for _ in range(budget + 1)]  # pack numbers by free tokens, the last one first
    free_bits, num_packs = 0, 0
    pack_numbers = np.empty(len(tokens), np.int32)

    def leave_open(free: int, packs: list[int]) -> int:
        """Put packs back; returns ``free_bits`` with theirs."""
        if not free or not packs:
            return free_bits
        open_packs[free] += packs
        return free_bits | 1 << free

    for start in range(0, len(tokens), WINDOW_ROWS):
        window = tokens[start : start + WINDOW_ROWS]
        order, numbers = np.argsort(-window, kind="stable"), []
        lengths, counts = np.unique(window, return_counts=True)
        for length, count in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
            while count:
                fitting = free_bits >> length
                free = length + (fitting & -fitting).bit_length() - 1 if fitting else budget
                per_pack = free // length if length else count
                num_used = -(-count // per_pack)
                if fitting:
                    waiting = open_packs[free]
                    packs = waiting[: -num_used - 1 : -1]
                    del waiting[len(waiting) - len(packs) :]
                    if not waiting:
                        free_bits ^= 1 << free
                else:
                    packs = list(range(num_packs, num_packs + num_used))
                    num_packs += num_used
                num_full = min(len(packs), count // per_pack)
                rest = count - num_full * per_pack if len(packs) > num_full else 0
                numbers += [number for number in packs[:num_full] for _ in range(per_pack)]
                numbers += packs[num_full:] * rest
                free_bits = leave_open(free - length * per_pack, packs[:num_full])
                free_bits = leave_open(free - length * rest, packs[num_full:])
                count -= num_full * per_pack + rest
        pack_numbers[start + order] = numbers
    ends = np.cumsum(np.bincount(pack_numbers, minlength=num_packs))
    return np.argsort(pack_numbers, kind="stable"), ends


def _shuffled(rows: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> Microbatches:
    """The same microbatches in random order."""
    sizes = np.diff(ends, prepend=0)
    order = rng.permutation(len(ends))
    starts, sizes = (ends - sizes)[order], sizes[order]
    new_ends = np.cumsum(sizes)
    # a row moves as far as the start of its microbatch does
    source = np.arange(len(rows))
    source += np.repeat(starts - (new_ends - sizes), sizes)
    return Microbatches(rows[source], new_ends)
