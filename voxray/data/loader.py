"""Reads a rank's packs ahead of the model."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from voxray.data.collate import Batch, collate_training
from voxray.data.plan import Pack, Plan
from voxray.data.shards import Features
from voxray.models.family import FrontEnd
from voxray.training.engine import Worker

STEPS_AHEAD = 2


class Loader:
    """Iterates over a run's steps, giving (step, [(pack, batch)]) for one rank.

    Reading is a memory map and a copy, which release the interpreter lock, so threads are enough.

    Args:
        loader_workers: Threads that read ahead; 0 reads when asked.
        pin_memory: Put batches into page-locked memory, for quick copies to a GPU.
    """

    def __init__(
        self,
        features: Features,
        front_end: FrontEnd,
        plan: Plan,
        worker: Worker,
        loader_workers: int,
        *,
        pin_memory: bool,
    ) -> None:
        self.features, self.front_end, self.plan, self.worker = features, front_end, plan, worker
        self.loader_workers, self.pin_memory = loader_workers, pin_memory

    def steps(self, start: int, end: int) -> Iterator[tuple[int, list[tuple[Pack, Batch]]]]:
        """Steps ``start`` to ``end`` - 1."""
        if not self.loader_workers:
            for step in range(start, end):
                yield step, [(pack, self._batch(pack)) for pack in self._packs(step)]
            return
        waiting: deque[tuple[int, list[tuple[Pack, Future[Batch]]]]] = deque()
        with ThreadPoolExecutor(self.loader_workers, thread_name_prefix="loader") as pool:
            try:
                for step in range(start, end):
                    waiting.append((step, [(pack, pool.submit(self._batch, pack)) for pack in self._packs(step)]))
                    if len(waiting) > STEPS_AHEAD:
                        yield self._ready(*waiting.popleft())
                while waiting:
                    yield self._ready(*waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    @staticmethod
    def _ready(step: int, packs: list[tuple[Pack, "Future[Batch]"]]) -> tuple[int, list[tuple[Pack, Batch]]]:
        return step, [(pack, future.result()) for pack, future in packs]

    def _packs(self, step: int) -> list[Pack]:
        return self.plan.rank_packs(step, self.worker.rank, self.worker.world_size)

    def _batch(self, pack: Pack) -> Batch:
        batch = collate_training([self.features.row(number) for number in pack.rows], self.front_end)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin_memory else batch
