"""SALMONN: what stands between the encoders and the language model, and LoRA on that; both stages train the same."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from voxray.batches.rank import Worker
from voxray.config.salmonn import SalmonnSettings
from voxray.core.console import console
from voxray.core.tasks import TASKS
from voxray.corpora.importers.salmonn import OTHER_CAPTION_REQUEST
from voxray.features.reader import FeatureRow
from voxray.models.salmonn.assemble import assemble_salmonn
from voxray.models.salmonn.compat.annotations import MANIFESTS, as_manifests
from voxray.models.salmonn.front_end import SalmonnFrontEnd
from voxray.models.salmonn.prompts import read_prompts
from voxray.recipes.run_stage import Stage, TrainingData, train_stage
from voxray.runs.run_folder import make_folder, resolve_output_dir
from voxray.training.callbacks import NO_CALLBACKS, Callbacks

ROLES = ("projector", "llm")
ANY_QUESTION = "What is it?"


def assemble_inputs(settings: SalmonnSettings) -> SalmonnSettings:
    """Put the base together and write manifests of annotation files, where the settings name parts and such files.

    Returns:
        The settings with the base's folder and the manifests, all in the run folder.
    Raises:
        RunError, SettingsError: A part or a file cannot be read, or the run folder cannot be written.
    """
    run_dir = resolve_output_dir(settings.output_dir, settings.storage_path, is_mirrored=True)
    make_folder(run_dir)
    if settings.prompts and (left_out := read_prompts(settings.prompts).left_out):
        console.print(f"{settings.prompts}: {len(left_out)} left out: {'; '.join(left_out)}", markup=False)
    paths = (*settings.train_jsonl, *settings.val_jsonl)
    manifests = as_manifests(paths, run_dir / MANIFESTS, settings.audio_prefix)
    num_train = len(settings.train_jsonl)
    changed: dict[str, Any] = {"train_jsonl": manifests[:num_train], "val_jsonl": manifests[num_train:]}
    if not settings.model_id:
        parts = {"whisper": settings.whisper_path, "beats": settings.beats_path, "llm": settings.llama_path}
        changed["model_id"] = assemble_salmonn(run_dir, **parts, end_sym=settings.end_sym)
    return settings.model_copy(update=changed)


def build_stage(settings: SalmonnSettings) -> Stage:
    """What the settings ask to be trained."""
    redraw = SampledPrompts(settings.model_id, settings.prompts, settings.seed) if settings.prompts else None
    return Stage(ROLES, redraw=redraw)


def train(
    settings: SalmonnSettings, run_dir: Path, data: TrainingData, worker: Worker, host: Callbacks = NO_CALLBACKS
) -> dict[str, Any]:
    """Train one stage on rows of all tasks; every worker calls this (see ``train_stage``)."""
    return train_stage(build_stage(settings), settings, run_dir, data, worker, host)


class SampledPrompts:
    """Gives every row one of its task's prompts, drawn by (seed, epoch, row); a ``data.loader.Redraw``.

    Args:
        path: File of prompts.
    Raises:
        RunError: The file cannot be read.
    """

    def __init__(self, model_id: str, path: str, seed: int) -> None:
        self._front_end, self._seed = SalmonnFrontEnd(model_id, prompts=read_prompts(path)), seed
        self.fingerprint = self._front_end.prompts.fingerprint
        self.max_extra_prompt_tokens: Mapping[str, int] = dict(
            _max_extra_prompt_tokens(SalmonnFrontEnd(model_id), self._front_end)
        )

    def __call__(self, row: FeatureRow, epoch: int) -> FeatureRow:
        ids = self._front_end.drawn_prompt_ids(row, seed=self._seed, epoch=epoch)
        if len(ids) > len(row.prompt_ids) + self.max_extra_prompt_tokens.get(row.task, 0):
            return row  # where a question meets the words around it, there may be more tokens than was reckoned with
        return replace(row, prompt_ids=np.asarray(ids, np.int32))


def _max_extra_prompt_tokens(stored: SalmonnFrontEnd, drawn: SalmonnFrontEnd) -> Iterator[tuple[str, int]]:
    """By task, how many tokens the longest prompt that may be drawn has beyond the stored one."""
    for task in (task for task in TASKS.values() if task.has_audio):
        beyond = [0]
        for question in (task.default_prompt, OTHER_CAPTION_REQUEST, ANY_QUESTION):
            now = stored.ids_around(stored.prompts.fixed(task.name, question), question, 1)
            choices = drawn.prompts.choices(task.name, question)
            beyond += [len(drawn.ids_around(prompt, question, 1)) - len(now) for prompt in choices]
        yield task.name, max(beyond)
