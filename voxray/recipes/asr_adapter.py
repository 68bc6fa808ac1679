"""Voxtral's second stage: transcription into LoRA on the projector alone, between a frozen encoder and a frozen LLM."""

from pathlib import Path
from typing import Any

from voxray.config.train import AsrAdapterSettings
from voxray.recipes.stage import Data, Report, Stage, train_stage
from voxray.training.engine import Worker
from voxray.training.monitor import Publish

STAGE = Stage(roles=("projector",), tasks=("asr",))


def train(
    settings: AsrAdapterSettings,
    run_dir: Path,
    data: Data,
    worker: Worker,
    report: Report = lambda metrics: None,
    publish: Publish | None = None,
) -> dict[str, Any]:
    """Train one adapter on speech rows; every worker calls this (see ``train_stage``)."""
    return train_stage(STAGE, settings, run_dir, data, worker, report, publish)
