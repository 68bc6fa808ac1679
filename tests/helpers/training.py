"""Train in this process, without Ray, on existing features."""

from pathlib import Path
from typing import Any

from voxray.batches.rank import Worker
from voxray.config.train import TrainSettings
from voxray.recipes import run_stage
from voxray.recipes.run_context import RunContext
from voxray.recipes.training_data import TrainingData
from voxray.training.callbacks import NO_CALLBACKS, Callbacks


def train(
    settings: TrainSettings,
    run_dir: Path,
    data: TrainingData,
    worker: Worker | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> dict[str, Any]:
    """Train the recipe of the settings in a folder and return the result."""
    run = RunContext.create(settings, run_dir=run_dir, worker=worker, callbacks=callbacks)
    return run_stage.train(run, data)
