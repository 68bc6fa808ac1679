"""Calls from a training process into the program that runs it, such as a Ray Train worker."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from voxray.batches.rank import Worker
from voxray.config.flag_groups import as_range
from voxray.training.records import Publish


@dataclass(frozen=True)
class Callbacks:
    """Functions that the training loop calls. The defaults are for a process without Ray and do nothing.

    Attributes:
        report: Receives the metrics and the step of each validation. Every worker calls it.
        is_leaving: Whether the machine of any worker is about to be taken away. Every worker calls it at the same step.
        publish: Receives every value that rank 0 records; None publishes nothing.
    """

    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    is_leaving: Callable[[], bool] = lambda: False
    publish: Publish | None = None


NO_CALLBACKS = Callbacks()


def planned_workers(num_workers: str | int, worker: Worker) -> int:
    """Number of workers that a step is planned for: the maximum of an elastic range, else the actual number."""
    return as_range(num_workers)[1] if ":" in str(num_workers) else worker.world_size
