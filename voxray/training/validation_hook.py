"""A validation in the middle of a run: scores, previews, their records, and the news of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxray.core.tasks import TASKS
from voxray.features.reader import Features
from voxray.models.interface import FrontEnd
from voxray.training.loop import TrainState
from voxray.training.previews import Previews, agreed, preview
from voxray.training.records import Monitor
from voxray.training.validate import validate


@dataclass(frozen=True)
class ValidationSizes:
    """How much a validation computes at a time.

    Attributes:
        batch_size: Rows generated together.
        loss_batch_size: Rows of a forward pass over prompt and answer.
        max_new_tokens: Longest answer.
    """

    batch_size: int
    loss_batch_size: int
    max_new_tokens: int


@dataclass
class Validator:
    """Validates a run; every worker has one and calls it at the same steps.

    Attributes:
        rows: Row numbers of ``features`` to validate on; none is fine.
        seed: Of the run, for previews that are drawn.
        num_steps: Of the run, for the line that people read.
        report: Takes the metrics and the step, on every worker.
        previews: On rank 0; None shows none.
    """

    trainee: TrainState
    front_end: FrontEnd
    features: Features
    rows: np.ndarray
    sizes: ValidationSizes
    monitor: Monitor
    seed: int
    num_steps: int
    report: Callable[[dict[str, Any]], None]
    previews: Previews | None = None

    def __call__(self, step: int) -> dict[str, float]:
        """Score, record, show and report.

        Returns:
            The metrics, the same on every worker; empty without rows.
        """
        metrics: dict[str, float] = {}
        if len(self.rows):
            how, sizes = agreed(self.previews, self.trainee.worker), self.sizes
            answering = {"batch_size": sizes.batch_size, "max_new_tokens": sizes.max_new_tokens}
            held_out = (self.front_end, self.features, self.rows)
            model, family, worker = self.trainee.model, self.trainee.family, self.trainee.worker
            with self.trainee.engine.whole_model():
                found = validate(model, family, *held_out, worker, loss_batch_size=sizes.loss_batch_size, **answering)
                shown = preview(how, self.trainee, *held_out, found, step=step, seed=self.seed, **answering)
            metrics = found.metrics
            self.monitor.record("validation", step, metrics)
            self.monitor.say(f"step {step}/{self.num_steps}  {told(metrics)}")
            self.monitor.show_previews(step, shown)
        self.report({"step": step, **metrics})
        return metrics


def told(metrics: Mapping[str, float]) -> str:
    """The figures of a validation that a line for people has room for."""
    names = [f"{name}/{item}" for name, task in TASKS.items() for item in (*task.metrics, "perplexity")]
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in (*names, "overall/macro") if name in metrics)
