"""What the program around a training process offers it: Ray's workers do, a plain process has little to offer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from voxray.batches.rank import Worker
from voxray.config.flag_groups import as_range
from voxray.training.records import Publish


@dataclass(frozen=True)
class Callbacks:
    """Calls into the program around the loop.

    Attributes:
        report: Takes each validation's metrics and the step; every worker calls it.
        is_leaving: Whether the machine of any worker is about to be taken away; every worker calls it at the same step.
        publish: Takes every figure that rank 0 records; None if nobody watches.
    """

    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    is_leaving: Callable[[], bool] = lambda: False
    publish: Publish | None = None


NO_CALLBACKS = Callbacks()


def planned_workers(num_workers: str | int, worker: Worker) -> int:
    """Processes that a step is planned for: the most of a range, else as many as there are."""
    return as_range(num_workers)[1] if ":" in str(num_workers) else worker.world_size
