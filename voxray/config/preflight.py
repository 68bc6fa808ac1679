"""Settings of jobs/preflight.py: the flags of one training job and a few of its own."""

import json
from collections.abc import Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from voxray.config.flag_groups import SALMONN_PARTS, VOXTRAL
from voxray.config.own_tasks import load_own_tasks
from voxray.config.parse import HELP, Settings
from voxray.config.recipes import Recipe, derive_settings, lookup, peek_values, recipes
from voxray.config.train import TrainSettings
from voxray.core.tasks import TASKS, detect_task

MODEL_ID_FLAGS = ("model_id", "base_model", "model_name_or_path")
HUB_NAMES = {"coheretranscribe": "cohere_asr"}
"""{part of a hub id without marks: model type}, where the type is not in the name."""
MAX_ROWS_READ = 200
"""Rows of every manifest that are read to choose a recipe."""
MAX_LINE_BYTES = 1 << 20


class PreflightFlags(Settings):
    """Flags of every preflight.

    Attributes:
        trains: Settings class of the training job that is checked.
    """

    trains: ClassVar[type[TrainSettings]]
    recipe: str = ""
    """Training job to check; preflight accepts its flags. By default it is chosen by the model and the tasks of the
    rows, and the choice is printed."""
    tune: bool = True
    """Change batch sizes, gradient accumulation, workers and --grad_ckpt to the fastest settings that fit into memory;
    --no_tune only checks."""
    price_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of one worker's machine or GPU per hour. If set, the cost of the run is printed, in the same currency."""
    autorun: bool = False
    """Start the training at the end with the printed command, unless there are problems to fix first."""
    gpu: Literal["", "h200", "h100", "a100-80", "a100-40", "l4", "t4"] = ""
    """GPU of the machines that will train, one per worker, to compute the memory for it on a machine without one. No
    step is tried then."""
    memory_gib: Annotated[float, Field(ge=0)] = 0.0
    """Memory that one worker may use, in GiB; 0 uses that of --gpu, or the free memory of this machine."""

    @model_validator(mode="after")
    def _gpus_are_elsewhere(self) -> "PreflightFlags":
        if not self.gpu:
            return self
        if self.autorun:
            raise ValueError(
                f"--gpu {self.gpu}: names a GPU of other machines, where --autorun cannot start the training"
            )
        if getattr(self, "strategy", "ddp") != "ddp" and getattr(self, "num_workers", "") == "auto":
            raise ValueError(f"--gpu {self.gpu}: how much a worker holds depends on --num_workers; give a number")
        return self


@cache
def derive_preflight(recipe: Recipe) -> type[Any]:
    """Create the settings class of a preflight of a recipe."""
    return derive_settings("Preflight", (PreflightFlags,), recipe, __name__)


def __getattr__(name: str) -> type[Any]:
    return lookup(derive_preflight, name)


def preflight_settings(argv: Sequence[str]) -> tuple[type[Any], str]:
    """The settings class of the recipe in the flags or in the file of --config, or of the recipe that fits the data.

    Errors in the flags or the file are ignored here, because ``parse`` reports them.

    Returns:
        The class, and the reason for the choice to show to users; "" if the recipe was set.
    """
    if not argv or HELP & set(argv):
        return derive_preflight(recipes()["multitask"]), ""
    values = peek_values(argv)
    recipe = str(values.get("recipe", ""))
    if recipe in recipes():
        return derive_preflight(recipes()[recipe]), ""
    load_own_tasks(values)
    recipe, reason = _choose_recipe(values)
    return derive_preflight(recipes()[recipe]), f"{recipe}, because {reason}; --recipe selects another"


def _choose_recipe(values: dict[str, Any]) -> tuple[str, str]:
    """Choose a recipe for a base and manifests; returns its name and the reason."""
    parts = [name for name in SALMONN_PARTS if values.get(name)]
    if parts:
        return "salmonn", f"--{parts[0]} is given"
    is_salmonn_file = "cfg_path" in values or isinstance(values.get("model"), dict)  # of SALMONN's own trainer
    model_id = next((str(values[name]) for name in MODEL_ID_FLAGS if values.get(name)), VOXTRAL)
    family = "salmonn" if is_salmonn_file else _guess_family(model_id)
    fitting = [recipe.name for recipe in recipes().values() if family in recipe.model_types]
    if len(fitting) == 1:
        return fitting[0], f"the model is a {family} model"
    tasks = _read_tasks(values.get("train_jsonl") or "")
    if not tasks:
        return "multitask", "no row could be read to choose a recipe by"
    kinds = {TASKS[name].kind for name in tasks}
    if kinds <= {"tqa"}:
        return "text", "all rows that were read are text questions"
    if kinds <= {"asr"}:
        return "asr_adapter", "all rows that were read are transcriptions"
    return "multitask", f"the rows are of the tasks {', '.join(name for name in TASKS if name in tasks)}"


def _guess_family(model_id: str) -> str:
    """Model type of a folder, "" if it cannot be read; for a hub id, the type in its name, else voxtral."""
    path = Path(model_id).expanduser() / "config.json"
    if path.is_file():
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""
    name = _without_marks(model_id.rpartition("/")[2])
    for part, model_type in HUB_NAMES.items():
        if part in name:
            return model_type
    types = (model_type for recipe in recipes().values() for model_type in recipe.model_types)
    return next((model_type for model_type in types if _without_marks(model_type) in name), "voxtral")


def _without_marks(name: str) -> str:
    """``Qwen3-ASR-1.7B`` -> ``qwen3asr17b``."""
    return "".join(filter(str.isalnum, name.lower()))


def _read_tasks(manifests: Any) -> set[str]:
    """Tasks of the first rows of every manifest. Unreadable files and rows are skipped."""
    paths = manifests.split(",") if isinstance(manifests, str) else list(manifests)
    tasks: set[str] = set()
    for path in filter(None, (str(path).strip() for path in paths)):
        try:
            with open(Path(path).expanduser(), "rb") as file:
                lines = iter(partial(file.readline, MAX_LINE_BYTES), b"")
                tasks.update(filter(None, map(_detect_task, islice(lines, MAX_ROWS_READ))))
        except OSError:
            continue
    return tasks


def _detect_task(line: bytes) -> str | None:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        return detect_task(row).name if isinstance(row, dict) else None
    except (ValueError, RecursionError):
        return None
