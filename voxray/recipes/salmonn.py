"""SALMONN's recipe: build its base from parts, read its annotation files, sample prompts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from voxray.config.salmonn import SalmonnSettings
from voxray.core.console import console
from voxray.core.tasks import TASKS, single_turn_tasks
from voxray.corpora.importers.salmonn import OTHER_CAPTION_REQUEST
from voxray.features.reader import FeatureRow
from voxray.models.salmonn.assemble import assemble_salmonn
from voxray.models.salmonn.compat.annotations import MANIFESTS, as_manifests
from voxray.models.salmonn.front_end import SalmonnFrontEnd
from voxray.models.salmonn.prompts import read_prompts
from voxray.recipes.stages import Stage
from voxray.runs.run_folder import make_folder, resolve_output_dir

ROLES = ("projector", "llm")
ANY_QUESTION = "What is it?"


def assemble_inputs(settings: SalmonnSettings) -> SalmonnSettings:
    """Build the base from its parts, and manifests from annotation files, if the settings name such parts or files.

    Returns:
        The settings with the paths of the base and the manifests, which are in the run folder.
    Raises:
        RunError, SettingsError: A part or a file cannot be read, or the run folder cannot be written.
    """
    run_dir = resolve_output_dir(settings.output_dir, settings.storage_path, is_mirrored=True)
    make_folder(run_dir)
    if settings.prompts and (left_out := read_prompts(settings.prompts).left_out):
        console.print(f"{settings.prompts}: {len(left_out)} left out: {'; '.join(left_out)}", markup=False)
    manifests = iter(as_manifests(settings.manifests, run_dir / MANIFESTS, settings.audio_prefix))
    changed: dict[str, Any] = {
        name: tuple(islice(manifests, len(getattr(settings, name))))
        for name in ("train_jsonl", "replay_jsonl", "val_jsonl")
    }
    if not settings.model_id:
        parts = {"whisper": settings.whisper_path, "beats": settings.beats_path, "llm": settings.llama_path}
        changed["model_id"] = assemble_salmonn(run_dir, **parts, end_sym=settings.end_sym)
    return settings.model_copy(update=changed)


def salmonn_stage(settings: SalmonnSettings) -> Stage:
    """SALMONN stages 1 and 2: all weights between the encoders and the language model, and LoRA on the latter."""
    sampler = SampledPrompts(settings.model_id, settings.prompts, settings.seed) if settings.prompts else None
    return Stage(ROLES, single_turn_tasks(), prompt_sampler=sampler)


class SampledPrompts:
    """A ``PromptSampler`` that picks one of the task's prompts for every row, by (seed, epoch, row).

    Args:
        path: File with the prompts of every task.
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
        ids = self._front_end.sampled_prompt_ids(row, seed=self._seed, epoch=epoch)
        if len(ids) > len(row.prompt_ids) + self.max_extra_prompt_tokens.get(row.task, 0):
            return row  # a question may merge with the words around it into other tokens than were counted
        return replace(row, prompt_ids=np.asarray(ids, np.int32))


def _max_extra_prompt_tokens(stored: SalmonnFrontEnd, sampled: SalmonnFrontEnd) -> Iterator[tuple[str, int]]:
    """(task, tokens by which the longest prompt in the file exceeds the stored one), at least 0."""
    for task in (TASKS[name] for name in single_turn_tasks() if TASKS[name].has_audio):
        extra = [0]
        for question in (task.default_prompt, OTHER_CAPTION_REQUEST, ANY_QUESTION):
            ids = stored.render_ids(stored.prompts.default(task.name, question), question, 1)
            choices = sampled.prompts.choices(task.name, question)
            extra += [len(sampled.render_ids(prompt, question, 1)) - len(ids) for prompt in choices]
        yield task.name, max(extra)
