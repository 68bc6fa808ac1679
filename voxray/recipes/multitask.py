"""Voxtral's third stage: ASR, spoken QA and text QA together into one LoRA on projector and language model."""

from pathlib import Path
from typing import Any

from voxray.config.train import MultitaskSettings
from voxray.data.plan import Phase
from voxray.recipes.stage import Data, Report, Stage, train_stage
from voxray.training.engine import Worker
from voxray.training.monitor import Publish


def train(
    settings: MultitaskSettings,
    run_dir: Path,
    data: Data,
    worker: Worker,
    report: Report = lambda metrics: None,
    publish: Publish | None = None,
) -> dict[str, Any]:
    """Train one adapter on rows of all tasks; every worker calls this (see ``train_stage``)."""
    roles = ("projector", "llm") if settings.freeze_whisper else ("encoder", "projector", "llm")
    curriculum = tuple(Phase(*phase) for phase in settings.curriculum)
    stage = Stage(roles, task_weights=settings.task_weights, per_task_bsz=settings.per_task_bsz, curriculum=curriculum)
    return train_stage(stage, settings, run_dir, data, worker, report, publish)
