"""The training recipes, one per training job. Settings, preflight, tune, prefetch and the launcher use this table.

A recipe names code by its path ``package.module:name``, because settings are a lower layer than recipes and are parsed
before torch is imported. An installed package adds recipes with the entry point group ``voxray.recipes``; each entry
point is a ``Recipe``. The package has to be installed on every machine of the cluster.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import create_model
from pydantic.fields import FieldInfo

from voxray.core.tasks import TASKS, single_turn_tasks
from voxray.core.yaml_file import read_yaml

ENTRY_POINTS = "voxray.recipes"


@dataclass(frozen=True)
class Recipe:
    """One training job.

    Attributes:
        name: Value of ``--recipe`` in preflight and tune.
        settings: Path of the settings class, a subclass of ``TrainSettings``.
        stage: Path of the function that turns the settings into a ``recipes.stages.Stage``.
        job: Name of the script in jobs/, without ``.py``; for a recipe of another package the module that
            ``python -m`` runs.
        tasks: Built-in tasks whose rows it trains on and validates with, and the kinds of own tasks (``Task.kind``).
        family: Model type of the bases that it trains, or path of a table by model type.
        assemble: Path of a function settings -> settings that the driver calls before a run. It may build the base or
            write manifests. "" calls nothing.
        sweep_metric: Metric that decides a sweep by default.
        sweep_lora_r: LoRA ranks that a sweep tries by default.
    """

    name: str
    settings: str
    stage: str
    job: str
    tasks: tuple[str, ...] = tuple(TASKS)
    family: str = "voxray.models.audio_lm.facts:FACTS"
    assemble: str = ""
    sweep_metric: str = "asr/cer_nospace"
    sweep_lora_r: tuple[int, ...] = (8, 16)

    @property
    def settings_class(self) -> type[Any]:
        return load_object(self.settings)

    @property
    def model_types(self) -> tuple[str, ...]:
        """Model types of the bases that it trains."""
        return tuple(load_object(self.family)) if ":" in self.family else (self.family,)


BUILT_IN = (
    Recipe(
        "multitask",
        "voxray.config.train:MultitaskSettings",
        "voxray.recipes.stages:multitask_stage",
        "train_multitask",
    ),
    Recipe(
        "text",
        "voxray.config.train:TextSettings",
        "voxray.recipes.stages:text_stage",
        "train_text",
        tasks=("tqa", "text_chat"),
        sweep_metric="tqa/rouge_l",
    ),
    Recipe(
        "asr_adapter",
        "voxray.config.train:AsrAdapterSettings",
        "voxray.recipes.stages:asr_adapter_stage",
        "train_asr_adapter",
        tasks=("asr",),
    ),
    Recipe(
        "whisper",
        "voxray.config.train:WhisperSettings",
        "voxray.recipes.stages:whisper_stage",
        "train_whisper",
        tasks=("asr", "ast"),
        family="voxray.models.audio_seq2seq.facts:FACTS",
        sweep_lora_r=(16, 32),
    ),
    Recipe(
        "salmonn",
        "voxray.config.salmonn:SalmonnSettings",
        "voxray.recipes.salmonn:salmonn_stage",
        "train_salmonn",
        tasks=single_turn_tasks(),
        family="salmonn",
        assemble="voxray.recipes.salmonn:assemble_inputs",
        sweep_metric="overall/macro",
    ),
)


@cache
def recipes() -> Mapping[str, Recipe]:
    """All recipes by name: those of voxray, then those of installed packages, which cannot replace them."""
    installed = [entry_point.load() for entry_point in entry_points(group=ENTRY_POINTS)]
    own = {recipe.name: recipe for recipe in BUILT_IN}
    return own | {recipe.name: recipe for recipe in installed if recipe.name not in own}


def find_recipe(settings: Any) -> Recipe:
    """Find the recipe of settings: of the training job itself, or of a sweep or preflight over it.

    Raises:
        LookupError: No recipe has this settings class.
    """
    settings_class = getattr(settings, "trains", type(settings))
    for recipe in recipes().values():
        if settings_class is recipe.settings_class:
            return recipe
    raise LookupError(f"no recipe has the settings {settings_class.__name__}")


def peek_values(argv: Sequence[str]) -> dict[str, Any]:
    """Unchecked values of flags and of the file of ``--config``, to choose the settings class that parses them.

    Flags override the file. A file that cannot be read has no values, because ``parse`` reports it.
    """
    flags: dict[str, Any] = {}
    for token, next_token in pairwise([*argv, ""]):
        name, has_value, value = token.partition("=")
        if token.startswith("--"):
            flags[name[2:].replace("-", "_")] = value if has_value else next_token
    loaded: dict[Any, Any] = {}
    if path := flags.get("config") or flags.get("cfg_path"):
        with suppress(ValueError):
            loaded = read_yaml(Path(path))
    return {str(key).replace("-", "_"): value for key, value in loaded.items()} | flags


def load_object(path: str) -> Any:
    """Import ``package.module:name``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def derive_settings(
    prefix: str, bases: tuple[type[Any], ...], recipe: Recipe, module: str, **fields: tuple[Any, FieldInfo]
) -> type[Any]:
    """Create the settings class of a job that checks or repeats a training job, with the flags of both.

    Processes that unpickle such settings look the class up in ``module`` by its name, so the module needs a
    ``__getattr__`` (see ``lookup``).

    Args:
        prefix: Prefix of the class name, before the name of the training job's settings class.
        bases: Settings classes with the job's own flags, in the order of inheritance.
        module: Name of the module in which the class is looked up.
        fields: {name: (annotation, field)} to override.
    """
    settings_class = recipe.settings_class
    field = next(base.model_fields["recipe"] for base in bases if "recipe" in base.model_fields)
    choices = (*recipes(), *([""] if field.default == "" else []))
    fields["recipe"] = (Literal[choices], field)  # type: ignore[valid-type]
    model = create_model(
        f"{prefix}{settings_class.__name__}", __base__=(*bases, settings_class), __module__=module, **cast(Any, fields)
    )
    model.trains, model.tasks = settings_class, recipe.tasks  # type: ignore[attr-defined]
    return model


def with_default(field: FieldInfo, default: Any) -> FieldInfo:
    """A copy of a field with another default."""
    field = copy(field)
    field.default = default
    return field


def lookup(derive: Callable[[Recipe], type[Any]], name: str) -> type[Any]:
    """Find a derived settings class by its name, for a module's ``__getattr__``.

    Raises:
        AttributeError: There is no such class.
    """
    for recipe in recipes().values() if name.endswith("Settings") else ():
        if name.endswith(recipe.settings.rpartition(":")[2]) and (model := derive(recipe)).__name__ == name:
            return model
    raise AttributeError(name)
