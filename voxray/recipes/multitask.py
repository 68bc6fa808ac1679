"""Voxtral's third stage: ASR, spoken QA and text QA together into one LoRA on projector and language model."""

from pathlib import Path
from typing import Any

from voxray.batches.plan import Phase
from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.recipes.run_stage import Stage, TrainingData, train_stage
from voxray.training.callbacks import NO_CALLBACKS, Callbacks


def build_stage(settings: MultitaskSettings) -> Stage:
    """What the settings ask to be trained."""
    roles = ("projector", "llm") if settings.freeze_whisper else ("encoder", "projector", "llm")
    curriculum = tuple(Phase(*phase) for phase in settings.curriculum)
    return Stage(roles, task_weights=settings.task_weights, per_task_bsz=settings.per_task_bsz, curriculum=curriculum)


def train(
    settings: MultitaskSettings, run_dir: Path, data: TrainingData, worker: Worker, host: Callbacks = NO_CALLBACKS
) -> dict[str, Any]:
    """Train one adapter on rows of all tasks; every worker calls this (see ``train_stage``)."""
    return train_stage(build_stage(settings), settings, run_dir, data, worker, host)
