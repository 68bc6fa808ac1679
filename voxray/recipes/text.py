"""Voxtral's first stage: text QA into LoRA on the language model alone; projector and encoder stay as they are."""

from pathlib import Path
from typing import Any

from voxray.config.train import TextSettings
from voxray.recipes.stage import Data, Report, Stage, train_stage
from voxray.training.engine import Worker
from voxray.training.monitor import Publish

STAGE = Stage(roles=("llm",), tasks=("tqa",))


def train(
    settings: TextSettings,
    run_dir: Path,
    data: Data,
    worker: Worker,
    report: Report = lambda metrics: None,
    publish: Publish | None = None,
) -> dict[str, Any]:
    """Train one adapter on text rows; every worker calls this (see ``train_stage``)."""
    return train_stage(STAGE, settings, run_dir, data, worker, report, publish)
