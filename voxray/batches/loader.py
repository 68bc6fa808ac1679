"""Reads a rank's packs ahead of the model."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from voxray.audio.augment import SpecAugment, spec_augment
from voxray.batches.collate import Masks, collate_packed, collate_training
from voxray.batches.plan import Microbatch, Plan
from voxray.batches.rank import Worker
from voxray.features.reader import FeatureRow, Features
from voxray.models.interface import Batch, FrontEnd

STEPS_AHEAD = 2
MASK_STREAM = 1  # so that the masks of a pack are drawn from other numbers than its dropout


class PromptSampler(Protocol):
    """Gives rows another prompt in every epoch.

    Attributes:
        fingerprint: Hash of the prompts; a run that resumes must find the same.
        max_extra_prompt_tokens: {task: the most tokens by which a sampled prompt is longer than the stored one}.
    """

    fingerprint: str
    max_extra_prompt_tokens: Mapping[str, int]

    def __call__(self, row: FeatureRow, epoch: int) -> FeatureRow: ...


@dataclass(frozen=True)
class Masking:
    """SpecAugment on the clips of a pack, drawn from (seed, step, pack): nothing is carried from one to the next."""

    how: SpecAugment
    seed: int

    def of(self, step: int, pack: int) -> Masks:
        """Masks for the clips of one pack, in the order of its rows; None if there are none."""
        if not self.how:
            return None
        rng = np.random.default_rng([self.seed, step, pack, MASK_STREAM])
        return lambda mel_KF: spec_augment(mel_KF, self.how, rng)


class Loader:
    """Iterates over a run's steps, giving (step, [(pack, batch)]) for one rank.

    Reading is a memory map and a copy, which release the interpreter lock, so threads are enough.

    Args:
        loader_workers: Threads that read ahead; 0 reads when asked.
        masking: Masks on the features of training clips.
        redraw: Gives every row another prompt in each epoch; None leaves it the stored one.
        pin_memory: Put batches into page-locked memory, for quick copies to a GPU.
    """

    def __init__(
        self,
        features: Features,
        front_end: FrontEnd,
        plan: Plan,
        worker: Worker,
        loader_workers: int,
        masking: Masking,
        redraw: PromptSampler | None = None,
        *,
        pin_memory: bool,
    ) -> None:
        self.features, self.front_end, self.plan, self.worker = features, front_end, plan, worker
        self.loader_workers, self.masking, self.pin_memory = loader_workers, masking, pin_memory
        self.redraw = redraw

    def steps(self, start: int, end: int) -> Iterator[tuple[int, list[tuple[Microbatch, Batch]]]]:
        """Steps ``start`` to ``end`` - 1."""
        if not self.loader_workers:
            for step in range(start, end):
                yield step, [(pack, self._batch(step, pack)) for pack in self._packs(step)]
            return
        waiting: deque[tuple[int, list[tuple[Microbatch, Future[Batch]]]]] = deque()
        with ThreadPoolExecutor(self.loader_workers, thread_name_prefix="loader") as pool:
            try:
                for step in range(start, end):
                    waiting.append((step, [(pack, pool.submit(self._batch, step, pack)) for pack in self._packs(step)]))
                    if len(waiting) > STEPS_AHEAD:
                        yield self._ready(*waiting.popleft())
                while waiting:
                    yield self._ready(*waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    @staticmethod
    def _ready(
        step: int, packs: list[tuple[Microbatch, "Future[Batch]"]]
    ) -> tuple[int, list[tuple[Microbatch, Batch]]]:
        return step, [(pack, future.result()) for pack, future in packs]

    def _packs(self, step: int) -> list[Microbatch]:
        return self.plan.rank_packs(step, self.worker.rank, self.worker.world_size)

    def row(self, number: int, epoch: int) -> FeatureRow:
        """A row as it is in an epoch."""
        row = self.features.row(number)
        return self.redraw(row, epoch) if self.redraw else row

    def _batch(self, step: int, pack: Microbatch) -> Batch:
        epoch, _ = self.plan.locate(step)
        rows = [self.row(number, epoch) for number in pack.rows]
        collate = collate_packed if self.plan.batching.kind == "packed" else collate_training
        batch = collate(rows, self.front_end, self.masking.of(step, pack.number))
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch
