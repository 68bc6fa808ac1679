"""Whisper: transcription into LoRA on encoder and decoder, or on the decoder alone."""

from pathlib import Path
from typing import Any

from voxray.batches.rank import Worker
from voxray.config.train import WhisperSettings
from voxray.recipes.run_stage import Stage, TrainingData, train_stage
from voxray.training.callbacks import NO_CALLBACKS, Callbacks


def build_stage(settings: WhisperSettings) -> Stage:
    """What the settings ask to be trained."""
    roles = ("decoder",) if settings.freeze_encoder else ("encoder", "decoder")
    return Stage(roles, tasks=("asr",), lora_targets=settings.lora_targets)


def train(
    settings: WhisperSettings, run_dir: Path, data: TrainingData, worker: Worker, host: Callbacks = NO_CALLBACKS
) -> dict[str, Any]:
    """Train one adapter on speech rows; every worker calls this (see ``train_stage``)."""
    return train_stage(build_stage(settings), settings, run_dir, data, worker, host)
