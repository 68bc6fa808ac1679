"""SALMONN: what stands between the encoders and the language model, and LoRA on that; both stages train the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from voxray.config.salmonn import SalmonnSettings
from voxray.data.annotations import as_manifests
from voxray.data.features import FeatureRow
from voxray.data.loader import Redraw
from voxray.models.salmonn.folder import write_folder
from voxray.models.salmonn.processor import SalmonnFrontEnd
from voxray.models.salmonn.prompts import read_prompts
from voxray.recipes.stage import Data, Stage, train_stage
from voxray.run_folder import anchor, make_folder
from voxray.training.engine import Worker
from voxray.training.host import HOST, Host

ROLES = ("projector", "llm")


def made_ready(settings: SalmonnSettings) -> SalmonnSettings:
    """Put the base together and write manifests of annotation files, where the settings name parts and such files.

    Returns:
        The settings with the base's folder and the manifests, all in the run folder.
    Raises:
        RunError, SettingsError: A part or a file cannot be read, or the run folder cannot be written.
    """
    run_dir = anchor(settings.output_dir, settings.storage_path, is_mirrored=True)
    make_folder(run_dir)
    changed: dict[str, Any] = {}
    for name in ("train_jsonl", "val_jsonl"):
        changed[name] = as_manifests(getattr(settings, name), run_dir / "manifests", settings.audio_prefix)
    if not settings.model_id:
        folder, whisper, llm = run_dir / "model", settings.whisper_path, settings.llama_path
        write_folder(folder, whisper=whisper, beats=settings.beats_path, llm=llm, end_sym=settings.end_sym)
        changed["model_id"] = str(folder)
    return settings.model_copy(update=changed)


def train(settings: SalmonnSettings, run_dir: Path, data: Data, worker: Worker, host: Host = HOST) -> dict[str, Any]:
    """Train one stage on rows of all tasks; every worker calls this (see ``train_stage``)."""
    redraw = drawn_prompts(settings) if settings.prompts else None
    return train_stage(Stage(ROLES, redraw=redraw), settings, run_dir, data, worker, host)


def drawn_prompts(settings: SalmonnSettings) -> Redraw:
    """Give every row one of its task's prompts, drawn by (seed, epoch, row).

    Raises:
        RunError: The file of prompts cannot be read.
    """
    front_end = SalmonnFrontEnd(settings.model_id, prompts=read_prompts(settings.prompts))

    def redraw(row: FeatureRow, epoch: int) -> FeatureRow:
        ids = front_end.drawn_prompt_ids(row, seed=settings.seed, epoch=epoch)
        return replace(row, prompt_ids=np.asarray(ids, np.int32))

    return redraw
