"""Voxtral's second stage: transcription into LoRA on the projector alone, between a frozen encoder and a frozen LLM."""

from pathlib import Path
from typing import Any

from voxray.batches.rank import Worker
from voxray.config.train import AsrAdapterSettings
from voxray.recipes.run_stage import Stage, TrainingData, train_stage
from voxray.training.callbacks import NO_CALLBACKS, Callbacks

STAGE = Stage(roles=("projector",), tasks=("asr",))


def build_stage(settings: AsrAdapterSettings) -> Stage:
    """What the settings ask to be trained."""
    return STAGE


def train(
    settings: AsrAdapterSettings, run_dir: Path, data: TrainingData, worker: Worker, host: Callbacks = NO_CALLBACKS
) -> dict[str, Any]:
    """Train one adapter on speech rows; every worker calls this (see ``train_stage``)."""
    return train_stage(build_stage(settings), settings, run_dir, data, worker, host)
