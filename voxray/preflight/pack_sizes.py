"""How large a forward pass may be: sizes that keep the global batch, and the largest pack of each.

What is asked for is one question, whether a size fits, and sizes are in order, so it is answered by bisection.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from voxray.batches.packing import Packs
from voxray.batches.plan import Plan
from voxray.config.train import TrainSettings
from voxray.preflight.memory import MemoryModel, MemoryNeed
from voxray.preflight.rows import RunRows
from voxray.preflight.shapes import PackShape

MOST_TIMES_LARGER = 16
"""Packs are not made larger than so many times what was asked for."""
EPOCHS_LOOKED_AT = 3


@dataclass(frozen=True)
class BatchSize:
    """How much a forward pass holds, and how many of them a step takes.

    Attributes:
        flag: ``per_device_bsz`` or ``pack_tokens``.
        amount: Its value.
        grad_accum: Forward passes of a worker and step.
    """

    flag: str
    amount: int
    grad_accum: int

    def put_into(self, settings: TrainSettings) -> TrainSettings:
        return settings.model_copy(update={self.flag: self.amount, "grad_accum": self.grad_accum})


def current_size(settings: TrainSettings) -> BatchSize:
    """The size that settings ask for."""
    flag = "pack_tokens" if settings.batching == "packed" else "per_device_bsz"
    return BatchSize(flag, getattr(settings, flag), settings.grad_accum)


def sizes(settings: TrainSettings, longest: int) -> list[BatchSize]:
    """All sizes with the same global batch, in ascending order.

    Args:
        longest: Positions of the longest row, which a pack has to hold.
    """
    asked = current_size(settings)
    if getattr(settings, "per_task_bsz", None):
        return [asked]  # every task has a size of its own, which only its user can weigh against the others
    total = asked.amount * asked.grad_accum
    found = []
    for accum in range(1, (MOST_TIMES_LARGER * asked.grad_accum if asked.flag == "pack_tokens" else total) + 1):
        amount, rest = divmod(total, accum)
        holds = amount >= longest if asked.flag == "pack_tokens" else amount >= 1
        if not rest and holds and amount <= asked.amount * MOST_TIMES_LARGER:
            found.append(BatchSize(asked.flag, amount, accum))
    return sorted({*found, asked}, key=lambda size: size.amount)


def largest_fitting(candidates: Sequence[BatchSize], fits: Callable[[BatchSize], bool]) -> int:
    """Place of the largest size that fits, -1 if none does; sizes that are larger than one that does not, do not."""
    low, high = -1, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class PlannedPack:
    """A pack of the plan.

    Attributes:
        rows: Row numbers.
        shape: Its sizes.
        need: What a process needs for it.
    """

    rows: np.ndarray
    shape: PackShape
    need: MemoryNeed


def largest_pack(rows: RunRows, settings: TrainSettings, plan: Plan, memory: MemoryModel) -> PlannedPack:
    """The pack of the first epochs for which a process needs most; a validation counts to the need."""
    packed, found = settings.batching == "packed", list[PlannedPack]()
    epochs = plan.curriculum_epochs if rows.stage.curriculum else settings.epochs
    validation = validation_shape(rows, settings)
    for epoch in range(min(epochs, max(EPOCHS_LOOKED_AT, len(rows.stage.curriculum)))):
        packs = plan.epoch_packs(epoch)
        for number in sorted(set(_extremes(rows, packs, packed=packed))):
            numbers = packs.pack(number)
            shape = rows.shape(numbers, packed=packed)
            need = memory.of(shape, validation, settings.eval_max_new_tokens)
            found.append(PlannedPack(numbers, shape, need))
    return max(found, key=lambda pack: pack.need.peak_bytes)


def average_pack(rows: RunRows, plan: Plan) -> np.ndarray:
    """Rows of the pack whose tokens come nearest to the mean."""
    packs = plan.epoch_packs(0)
    tokens = np.add.reduceat(rows.train.num_tokens[packs.rows], _starts(packs))
    return packs.pack(int(np.abs(tokens - tokens.mean()).argmin()))


def validation_shape(rows: RunRows, settings: TrainSettings) -> PackShape | None:
    """Prompts of the largest batch that a validation answers, None without validation rows."""
    held_out, numbers = rows.held_out, rows.held_out_rows
    if not len(numbers):
        return None
    batch = numbers[np.argsort(-held_out.num_prompt_tokens[numbers], kind="stable")][: answered_together(settings)]
    longest = int(held_out.num_prompt_tokens[batch].max())
    windows = int(held_out.num_windows[batch].sum())
    return PackShape(len(batch), len(batch) * longest, longest, windows, len(batch))


def answered_together(settings: TrainSettings) -> int:
    """Rows that a validation answers at a time (see ``recipes.stage``)."""
    return max(8, settings.per_device_bsz)


def _starts(packs: Packs) -> np.ndarray:
    return np.concatenate([[0], packs.ends[:-1]])


def _extremes(rows: RunRows, packs: Packs, *, packed: bool) -> Iterator[int]:
    """Packs with most of anything that takes memory: positions, windows, answers, and rows times tokens squared."""
    lengths, starts = rows.train, _starts(packs)
    counts = np.diff(packs.ends, prepend=0)
    longest = np.maximum.reduceat(lengths.num_tokens[packs.rows], starts)
    tokens = np.add.reduceat(lengths.num_tokens[packs.rows], starts)
    windows = np.add.reduceat(lengths.num_windows[packs.rows], starts)
    answers = np.add.reduceat(lengths.num_target_tokens[packs.rows], starts)
    positions = tokens if packed else counts * longest
    for column in (positions, windows, answers, counts * longest**2):
        yield int(column.argmax())
