"""Voxtral's first stage: text QA into LoRA on the language model alone; projector and encoder stay as they are."""

from pathlib import Path
from typing import Any

from voxray.batches.rank import Worker
from voxray.config.train import TextSettings
from voxray.recipes.run_stage import Stage, TrainingData, train_stage
from voxray.training.callbacks import NO_CALLBACKS, Callbacks

STAGE = Stage(roles=("llm",), tasks=("tqa",))


def build_stage(settings: TextSettings) -> Stage:
    """What the settings ask to be trained."""
    return STAGE


def train(
    settings: TextSettings, run_dir: Path, data: TrainingData, worker: Worker, host: Callbacks = NO_CALLBACKS
) -> dict[str, Any]:
    """Train one adapter on text rows; every worker calls this (see ``train_stage``)."""
    return train_stage(build_stage(settings), settings, run_dir, data, worker, host)
