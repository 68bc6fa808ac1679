"""The context of a training run: settings, recipe, model family, remote copy, rank.

``RunContext`` resolves these once per process; every function of a run takes them from it.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from voxray.batches.rank import Worker
from voxray.config.flag_groups import MaskFlags
from voxray.config.recipes import Recipe, find_recipe, load_object, recipes
from voxray.config.train import TrainSettings
from voxray.core.errors import SettingsError
from voxray.core.tasks import with_own_tasks
from voxray.models.front_end import FrontEnd
from voxray.models.interface import ModelFamily
from voxray.models.parts.arithmetic import chooses_type, with_default_dtype
from voxray.models.registry import get_family
from voxray.recipes.stages import Stage
from voxray.runs.remote_sync import RemoteSync
from voxray.runs.run_folder import SETTINGS
from voxray.training.callbacks import NO_CALLBACKS, Callbacks


@dataclass(frozen=True)
class RunContext:
    """A training run, seen from one process.

    Attributes:
        settings: The run's settings.
        recipe: Recipe of the settings.
        family: Family of the base model.
        remote: Copy of the run folder at a URL; does nothing for a local run.
        run_dir: Local folder of the run.
        worker: Rank and device of this process.
        callbacks: Calls into the program around the loop, such as Ray Train.
    """

    settings: TrainSettings
    recipe: Recipe
    family: ModelFamily
    remote: RemoteSync
    run_dir: Path
    worker: Worker = field(default_factory=Worker)
    callbacks: Callbacks = NO_CALLBACKS

    @classmethod
    def create(
        cls,
        settings: TrainSettings,
        *,
        run_dir: Path | None = None,
        worker: Worker | None = None,
        callbacks: Callbacks = NO_CALLBACKS,
    ) -> "RunContext":
        """Resolve the settings of a run.

        Args:
            run_dir: Folder to use instead of ``--output_dir``, for tests and benchmarks.
        Raises:
            RunError: The base has no readable configuration.
            SettingsError: The recipe trains another family, or no file system is known for a URL.
        """
        remote = RemoteSync.from_settings(settings)
        recipe, family = find_recipe(settings), require_family(settings)
        return cls(settings, recipe, family, remote, run_dir or remote.folder, worker or Worker(), callbacks)

    @cached_property
    def front_end(self) -> FrontEnd:
        return self.family.front_end(self.settings.model_id)

    @cached_property
    def stage(self) -> Stage:
        """Roles and tasks of the run."""
        stage = load_object(self.recipe.stage)(self.settings)
        return replace(stage, tasks=with_own_tasks(stage.tasks))


def require_family(settings: TrainSettings) -> ModelFamily:
    """Find the family of the base, which has to be the one that the recipe trains.

    Raises:
        SettingsError: It is another family. The message names the job that trains it.
    """
    family, recipe = get_family(settings.model_id), find_recipe(settings)
    if family.name not in recipe.model_types:
        others = [other.job for other in recipes().values() if family.name in other.model_types]
        advice, own = f"; {others[0]} trains it" if others else "", ", ".join(recipe.model_types)
        raise SettingsError(f"--model_id {settings.model_id}: a {family.name} model, and this job trains {own}{advice}")
    if family.reads_samples and isinstance(settings, MaskFlags) and settings.freq_masks:
        raise SettingsError(f"--freq_masks: a {family.name} model reads samples, which have no frequencies to mask")
    if family.reads_samples and settings.shards_weights and settings.store != "encoder":
        reason = f"a {family.name} model encodes clip by clip, and all workers must call the same layers equally often"
        flag, other = (
            ("--strategy fsdp", "--strategy ddp") if settings.strategy == "fsdp" else ("--zero_stage 3", "stage 2")
        )
        raise SettingsError(f"{flag}: {reason}; use {other}")
    return family


def with_run_dtype(settings: TrainSettings, run_dir: Path, **options: Any) -> TrainSettings:
    """The settings with a type to compute in: that of the run in a folder, or else the default.

    A run keeps its type when it resumes on other GPUs, or on none for now.

    Args:
        run_dir: Folder of the run, which may hold an earlier part of it.
        options: Arguments of ``with_default_dtype``.
    """
    if not settings.overwrite and not chooses_type(settings):
        with suppress(OSError, ValueError, LookupError, TypeError):
            stored = json.loads((run_dir / SETTINGS).read_text(encoding="utf-8"))
            return settings.model_copy(update={name: bool(stored[name]) for name in ("bf16", "fp16")})
    return with_default_dtype(settings, settings.model_id, **options)


def assemble_inputs(settings: TrainSettings) -> TrainSettings:
    """Let the recipe build its base and manifests, if it does so (SALMONN from parts); returns the changed settings."""
    recipe = find_recipe(settings)
    return load_object(recipe.assemble)(settings) if recipe.assemble else settings
