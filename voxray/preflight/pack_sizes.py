"""Batch sizes that keep the global batch, the largest that fits, and the largest planned pack of a size.

Sizes are sorted and a size fits only if all smaller ones do, so the largest that fits is found by bisection.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from voxray.batches.packing import Microbatches
from voxray.batches.plan import Plan
from voxray.config.train import TrainSettings
from voxray.preflight.memory import MemoryModel, MemoryNeed
from voxray.preflight.rows import RunRows
from voxray.preflight.shapes import PackShape

MAX_ENLARGEMENT = 16
"""Largest factor by which a pack may exceed the size in the settings."""
EPOCHS_CHECKED = 3


@dataclass(frozen=True)
class BatchSize:
    """Size of a forward pass, and their number per step.

    Attributes:
        flag: ``per_device_bsz`` or ``pack_tokens``.
        amount: Value of that flag.
        grad_accum: Forward passes of a worker per step.
    """

    flag: str
    amount: int
    grad_accum: int

    def apply(self, settings: TrainSettings) -> TrainSettings:
        """The settings with this size."""
        return settings.model_copy(update={self.flag: self.amount, "grad_accum": self.grad_accum})


def current_size(settings: TrainSettings) -> BatchSize:
    """The size in the settings."""
    flag = "pack_tokens" if settings.batching == "packed" else "per_device_bsz"
    return BatchSize(flag, getattr(settings, flag), settings.grad_accum)


def sizes(settings: TrainSettings, longest: int) -> list[BatchSize]:
    """All sizes with the same global batch, in ascending order.

    Args:
        longest: Positions of the longest row, which a pack must be able to hold.
    """
    current = current_size(settings)
    if getattr(settings, "per_task_bsz", None):
        return [current]  # only the user can weigh the sizes of several tasks against each other
    is_packed, total = current.flag == "pack_tokens", current.amount * current.grad_accum
    candidates = {current}
    for accum in range(1, (MAX_ENLARGEMENT * current.grad_accum if is_packed else total) + 1):
        amount, remainder = divmod(total, accum)
        holds_longest = amount >= longest if is_packed else amount >= 1
        if not remainder and holds_longest and amount <= current.amount * MAX_ENLARGEMENT:
            candidates.add(BatchSize(current.flag, amount, accum))
    return sorted(candidates, key=lambda size: size.amount)


def largest_fitting(candidates: Sequence[BatchSize], fits: Callable[[BatchSize], bool]) -> int:
    """Index of the largest size that fits, -1 if none does. A size fits only if all smaller ones fit."""
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
        shape: The pack's shape.
        need: Memory of a process that trains on it.
        flops: Floating-point operations of a step on it.
    """

    rows: np.ndarray
    shape: PackShape
    need: MemoryNeed
    flops: float


def largest_pack(rows: RunRows, settings: TrainSettings, plan: Plan, memory: MemoryModel) -> PlannedPack:
    """The pack of the first epochs that needs the most memory, validation included."""
    packed, candidates = settings.batching == "packed", list[PlannedPack]()
    epochs = plan.curriculum_epochs if rows.run.stage.curriculum else settings.epochs
    validation = validation_shape(rows, settings)
    for epoch in range(min(epochs, max(EPOCHS_CHECKED, len(rows.run.stage.curriculum)))):
        microbatches = plan.epoch_microbatches(epoch)
        for index in sorted(set(_extremes(rows, microbatches, packed=packed))):
            shape = rows.shape(microbatches[index], packed=packed)
            need = memory.need(shape, validation, settings.eval_max_new_tokens)
            candidates.append(PlannedPack(microbatches[index], shape, need, memory.step_flops(shape)))
    return max(candidates, key=lambda pack: pack.need.peak_bytes)


def average_pack(rows: RunRows, plan: Plan) -> np.ndarray:
    """Rows of the pack whose number of tokens is closest to the mean."""
    microbatches = plan.epoch_microbatches(0)
    tokens = np.add.reduceat(rows.train.num_tokens[microbatches.rows], _starts(microbatches))
    return microbatches[int(np.abs(tokens - tokens.mean()).argmin())]


def validation_shape(rows: RunRows, settings: TrainSettings) -> PackShape | None:
    """Shape of the prompts of the largest validation batch; None without validation rows."""
    held_out, indices = rows.held_out, rows.held_out_rows
    if not len(indices):
        return None
    order = np.argsort(-held_out.num_prompt_tokens[indices], kind="stable")
    batch = indices[order][: validation_batch_size(settings)]
    longest = int(held_out.num_prompt_tokens[batch].max())
    windows = int(held_out.num_windows[batch].sum())
    return PackShape(len(batch), len(batch) * longest, longest, windows, len(batch))


def validation_batch_size(settings: TrainSettings) -> int:
    """Rows that validation answers together (see ``recipes.run_stage``)."""
    return max(8, settings.per_device_bsz)


def _starts(packs: Microbatches) -> np.ndarray:
    return np.concatenate([[0], packs.ends[:-1]])


def _extremes(rows: RunRows, packs: Microbatches, *, packed: bool) -> Iterator[int]:
    """Indices of the packs with the most positions, windows, answer tokens, and rows times tokens squared."""
    lengths, starts = rows.train, _starts(packs)
    counts = np.diff(packs.ends, prepend=0)
    longest = np.maximum.reduceat(lengths.num_tokens[packs.rows], starts)
    tokens = np.add.reduceat(lengths.num_tokens[packs.rows], starts)
    windows = np.add.reduceat(lengths.num_windows[packs.rows], starts)
    answers = np.add.reduceat(lengths.num_labels(packs.rows), starts)
    positions = tokens if packed else counts * longest
    for column in (positions, windows, answers, counts * longest**2):
        yield int(column.argmax())
