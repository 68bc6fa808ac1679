"""Settings of jobs/preflight.py: those of one training job, and a few of its own."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from voxray.config.flag_groups import SALMONN_PARTS, VOXTRAL
from voxray.config.parse import Settings, read_yaml
from voxray.config.salmonn import SalmonnSettings
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings, TrainSettings, WhisperSettings
from voxray.core.tasks import TASKS, detect_task

LOOKED_AT_ROWS = 200
"""Rows of every manifest by which a recipe is chosen."""
MAX_LINE_BYTES = 1 << 20


class PreflightFlags(Settings):
    """What every preflight takes.

    Attributes:
        trains: Settings of the job that is got ready.
    """

    trains: ClassVar[type[TrainSettings]]
    recipe: Literal["", "multitask", "text", "asr_adapter", "whisper", "salmonn"] = ""
    """Training job that is got ready; its flags are the preflight's. Without it the model and the tasks of the rows
    decide, and it is said."""
    tune: bool = True
    """Change batch sizes, accumulation, workers and --grad_ckpt to what fits and is quick; --no_tune only checks."""
    price_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """What a worker's machine or GPU costs an hour; with it the cost of the run is told, in the same currency."""
    autorun: bool = False
    """Start the training at the end, by the very command that was printed, unless something has to be put right."""
    memory_gib: Annotated[float, Field(ge=0)] = 0.0
    """Memory that one worker may take, GiB: that of the GPU that will train, where this machine is not the one; 0 looks
    at this machine."""


class PreflightMultitaskSettings(PreflightFlags, MultitaskSettings):
    trains = MultitaskSettings


class PreflightTextSettings(PreflightFlags, TextSettings):
    trains = TextSettings


class PreflightAsrAdapterSettings(PreflightFlags, AsrAdapterSettings):
    trains = AsrAdapterSettings


class PreflightWhisperSettings(PreflightFlags, WhisperSettings):
    trains = WhisperSettings


class PreflightSalmonnSettings(PreflightFlags, SalmonnSettings):
    trains = SalmonnSettings


RECIPES: dict[str, type[PreflightFlags]] = {
    "multitask": PreflightMultitaskSettings,
    "text": PreflightTextSettings,
    "asr_adapter": PreflightAsrAdapterSettings,
    "whisper": PreflightWhisperSettings,
    "salmonn": PreflightSalmonnSettings,
}


def preflight_settings(argv: Sequence[str]) -> tuple[type[Any], str]:
    """The settings class of the recipe that flags or the file of ``--config`` name, else the one that data and model
    ask for; faults are left to ``parse``.

    Returns:
        The class, and why it was chosen, for people; "" if it was named.
    """
    if not argv or {"--help", "-h"} & set(argv):
        return PreflightMultitaskSettings, ""
    given = _given(argv)
    recipe = str(given.get("recipe", ""))
    if recipe in RECIPES:
        return RECIPES[recipe], ""
    recipe, why = _chosen(given)
    return RECIPES[recipe], f"{recipe}, because {why}; --recipe names another"


def _given(argv: Sequence[str]) -> dict[str, Any]:
    """Flags and keys that choosing looks at, under their own names; flags hold over the file."""
    named: dict[str, Any] = {}
    for token, value in itertools.pairwise([*argv, ""]):
        name, has_value, own = token.partition("=")
        if token.startswith("--"):
            named[name[2:].replace("-", "_")] = own if has_value else value
    loaded: dict[Any, Any] = {}
    if path := named.get("config") or named.get("cfg_path"):
        try:
            loaded = read_yaml(Path(path))
        except ValueError:
            loaded = {}
    both = {**{str(key).replace("-", "_"): value for key, value in loaded.items()}, **named}
    for old in ("base_model", "model_name_or_path"):
        both.setdefault("model_id", both.get(old, ""))
    return both


def _chosen(given: dict[str, Any]) -> tuple[str, str]:
    """A recipe and the reason for it."""
    model_id = str(given.get("model_id") or "")
    parts = [name for name in SALMONN_PARTS if given.get(name)]
    nested = "cfg_path" in given or isinstance(given.get("model"), dict)  # a file of SALMONN's own trainer
    kind = "salmonn" if parts or nested else _kind_of(model_id)
    if kind in ("whisper", "salmonn"):
        return kind, f"the model is a {kind} one" if not parts else f"--{parts[0]} is given"
    found = _tasks_of(given.get("train_jsonl") or "")
    if not found:
        return "multitask", "no row could be read to choose one by"
    if found <= {"tqa"}:
        return "text", "all rows looked at are text questions"
    if found <= {"asr"}:
        return "asr_adapter", "all rows looked at are transcriptions"
    return "multitask", f"the rows are of {', '.join(name for name in TASKS if name in found)}"


def _kind_of(model_id: str) -> str:
    """Model type of a folder, or what a hub id's name says; Voxtral if that is nothing."""
    path = Path(model_id).expanduser() / "config.json"
    if path.is_file():
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""
    name = (model_id or VOXTRAL).lower()
    return next((kind for kind in ("whisper", "salmonn") if kind in name.rpartition("/")[2]), "voxtral")


def _tasks_of(manifests: Any) -> set[str]:
    """Tasks of the first rows of some manifests; what cannot be read counts for nothing."""
    paths = manifests.split(",") if isinstance(manifests, str) else list(manifests)
    found: set[str] = set()
    for path in filter(None, (str(path).strip() for path in paths)):
        try:
            with open(Path(path).expanduser(), "rb") as file:
                for _ in range(LOOKED_AT_ROWS):
                    line = file.readline(MAX_LINE_BYTES)
                    if not line:
                        break
                    row = _row(line)
                    if row is not None:
                        found.add(row)
        except OSError:
            continue
    return found


def _row(line: bytes) -> str | None:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        return detect_task(row).name if isinstance(row, dict) else None
    except (ValueError, RecursionError):
        return None
