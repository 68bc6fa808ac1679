"""Loads a rank's microbatches ahead of the model."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from voxray.audio.augment import SpecAugment, spec_augment
from voxray.batches.collate import Masks, answer_rows, collate_packed, collate_training, pinned
from voxray.batches.context_sampler import ContextSampler
from voxray.batches.plan import Microbatch, Plan
from voxray.batches.rank import Worker
from voxray.features.reader import FeatureRow, Features
from voxray.models.front_end import FrontEnd
from voxray.models.interface import Batch

STEPS_AHEAD = 2
SPEC_AUGMENT_STREAM = 1  # separates the random numbers of a microbatch's masks from those of its dropout


class PromptSampler(Protocol):
    """Replaces the prompt of a row by one sampled for the epoch.

    Attributes:
        fingerprint: Hash of the prompts. A run can only resume with the same prompts.
        max_extra_prompt_tokens: {task: largest number of tokens by which a sampled prompt exceeds the stored one}.
    """

    fingerprint: str
    max_extra_prompt_tokens: Mapping[str, int]

    def __call__(self, row: FeatureRow, epoch: int) -> FeatureRow: ...


@dataclass(frozen=True)
class Masking:
    """SpecAugment on the clips of a microbatch, drawn from (seed, step, microbatch). It has no state to resume."""

    options: SpecAugment
    seed: int

    def for_microbatch(self, step: int, number: int) -> Masks:
        """Function that masks the clips of one microbatch, called in the order of its rows; None without masks."""
        if not self.options:
            return None
        rng = np.random.default_rng([self.seed, step, number, SPEC_AUGMENT_STREAM])
        return lambda mel_KF: spec_augment(mel_KF, self.options, rng)


class Loader:
    """Iterates over a run's steps and yields (step, [(microbatch, batch)]) for one rank.

    Reading is a memory map and a copy, both of which release the interpreter lock, so threads are enough.

    Args:
        loader_workers: Threads that read ahead; 0 reads each step when it is requested.
        masking: SpecAugment masks on the features of training clips.
        prompt_sampler: Samples a prompt for every row in each epoch; None keeps the stored prompts.
        context_sampler: Samples the contexts of transcriptions in each step; None keeps the stored ones.
        pin_memory: Put batches into page-locked memory, for fast copies to a GPU.
    """

    def __init__(
        self,
        features: Features,
        front_end: FrontEnd,
        plan: Plan,
        worker: Worker,
        loader_workers: int,
        masking: Masking,
        prompt_sampler: PromptSampler | None = None,
        context_sampler: ContextSampler | None = None,
        *,
        pin_memory: bool,
    ) -> None:
        self.features, self.front_end, self.plan, self.worker = features, front_end, plan, worker
        self.loader_workers, self.masking, self.pin_memory = loader_workers, masking, pin_memory
        self.prompt_sampler, self.context_sampler = prompt_sampler, context_sampler

    def steps(self, start: int, end: int) -> Iterator[tuple[int, list[tuple[Microbatch, Batch]]]]:
        """Steps ``start`` to ``end`` - 1."""
        if not self.loader_workers:
            for step in range(start, end):
                yield step, [(each, self._batch(step, each)) for each in self._microbatches(step)]
            return
        pending: deque[tuple[int, list[tuple[Microbatch, Future[Batch]]]]] = deque()
        with ThreadPoolExecutor(self.loader_workers, thread_name_prefix="loader") as pool:
            try:
                for step in range(start, end):
                    futures = [(each, pool.submit(self._batch, step, each)) for each in self._microbatches(step)]
                    pending.append((step, futures))
                    if len(pending) > STEPS_AHEAD:
                        yield self._wait(*pending.popleft())
                while pending:
                    yield self._wait(*pending.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    @staticmethod
    def _wait(
        step: int, futures: list[tuple[Microbatch, "Future[Batch]"]]
    ) -> tuple[int, list[tuple[Microbatch, Batch]]]:
        return step, [(microbatch, future.result()) for microbatch, future in futures]

    def _microbatches(self, step: int) -> list[Microbatch]:
        return self.plan.rank_microbatches(step, self.worker.rank, self.worker.world_size)

    def row(self, number: int, step: int) -> FeatureRow:
        """A row with its prompt for a step."""
        row, (epoch, _) = self.features.row(number), self.plan.locate(step)
        row = self.context_sampler(row, step) if self.context_sampler else row
        return self.prompt_sampler(row, epoch) if self.prompt_sampler else row

    def _batch(self, step: int, microbatch: Microbatch) -> Batch:
        rows = [self.row(number, step) for number in microbatch.rows]
        collate = collate_packed if self.plan.batching.kind == "packed" else collate_training
        batch = collate(rows, self.front_end, self.masking.for_microbatch(step, microbatch.number))
        if self.features.first_replay < len(self.features):
            is_replayed = microbatch.rows >= self.features.first_replay
            batch["is_replayed"] = torch.from_numpy(is_replayed[answer_rows(batch)])
        return pinned(batch) if self.pin_memory else batch
