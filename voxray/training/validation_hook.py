"""A validation during a run: score the model, write records, show previews, report the metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from voxray.core.tasks import TASKS
from voxray.training.loop import TrainState
from voxray.training.previews import Previews, preview, read_on_all_workers
from voxray.training.records import Monitor
from voxray.training.validate import ValidationRows, validate


@dataclass(frozen=True)
class ValidationSizes:
    """Batch sizes of a validation, and the maximum length of answers.

    Attributes:
        batch_size: Rows of a batch for generation.
        loss_batch_size: Rows of a forward pass over prompt and answer.
        max_new_tokens: Maximum length of an answer, in tokens.
    """

    batch_size: int
    loss_batch_size: int
    max_new_tokens: int


@dataclass
class Validator:
    """Validates a run. Every worker has one and calls it at the same steps.

    Attributes:
        seed: Seed of the run, for sampled previews.
        num_steps: Steps of the run, for the log line.
        report: Receives the metrics and the step, on every worker.
        previews: The run's previews, on rank 0; None shows none.
    """

    state: TrainState
    held_out: ValidationRows
    sizes: ValidationSizes
    monitor: Monitor
    seed: int
    num_steps: int
    report: Callable[[dict[str, Any]], None]
    previews: Previews | None = None

    def __call__(self, step: int) -> dict[str, float]:
        """Validate after ``step`` steps.

        Returns:
            The metrics, the same on every worker; empty without rows.
        """
        metrics: dict[str, float] = {}
        state, sizes = self.state, self.sizes
        if len(self.held_out.rows):
            preview_settings = read_on_all_workers(self.previews, state.worker)
            options = {"batch_size": sizes.batch_size, "max_new_tokens": sizes.max_new_tokens}
            validation = validate(
                state.model,
                state.family,
                self.held_out,
                state.worker,
                loss_batch_size=sizes.loss_batch_size,
                own_passes=state.engine.own_passes,
                **options,
            )
            entries = preview(preview_settings, state, self.held_out, validation, seeds=(self.seed, step), **options)
            metrics = validation.metrics
            self.monitor.record("validation", step, metrics)
            self.monitor.say(f"step {step}/{self.num_steps}  {short_line(metrics)}")
            self.monitor.show_previews(step, entries)
        self.report({"step": step, **metrics})
        return metrics


def short_line(metrics: Mapping[str, float]) -> str:
    """The main metrics of a validation, in one line."""
    names = [f"{name}/{item}" for name, task in TASKS.items() for item in (*task.metrics, "perplexity")]
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in (*names, "overall/macro") if name in metrics)
