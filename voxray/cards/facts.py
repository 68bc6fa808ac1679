"""What a model card says of an adapter: facts of its folder, of its base, and of the run around it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCard
from safetensors import safe_open

from voxray.core.content_hash import file_hash
from voxray.models.adapters.lora import roles_of_adapter
from voxray.models.adapters.read_files import FULL, WEIGHTS, read_adapter_config, weights_file
from voxray.models.hf_files import HUB_ID, hub_id, model_file, read_config
from voxray.models.registry import get_family
from voxray.runs.layout import CHECKPOINTS_FOLDER, PARAMETERS_FILE, RESULT_FILE, TRAINED_ROWS_FILE
from voxray.runs.run_folder import SETTINGS
from voxray.training.records import read_metrics

METHODS = {"lora": "LoRA", "dora": "DoRA", "rslora": "rank-stabilised LoRA", FULL: "full fine-tuning"}
LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseFacts:
    """The base of an adapter.

    Attributes:
        hub_id: Its id on the hub, "" if it is not known.
        name: Its name without folders.
        family: Name of its family.
        tasks: Tasks that the family can answer.
        architecture: Name of its class in transformers, "" if transformers has none.
        license: What its own card says of the license, by the keys of a card.
    """

    hub_id: str
    name: str
    family: str
    tasks: tuple[str, ...]
    architecture: str
    license: Mapping[str, str]


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter by its own files.

    Attributes:
        method: How it was tuned, a key of ``METHODS``.
        rank, alpha: Of LoRA; None for fully tuned weights.
        roles: Roles of the base that it changes, in the family's order.
        num_parameters: Numbers in its tensors; None if they are not in a safetensors file.
        weights_sha256: Hash of the file of its tensors.
    """

    method: str
    rank: int | None
    alpha: float | None
    roles: tuple[str, ...]
    num_parameters: int | None
    weights_sha256: str


@dataclass(frozen=True)
class RunFacts:
    """What a run folder records. Everything is empty if there is no run folder.

    Attributes:
        step: Step of the adapter.
        settings: Content of settings.json.
        provenance: Content of provenance.json.
        parameters: {role: {"total", "trainable"}}.
        trained_rows: See ``recipes.trained_rows``.
        validation: The validation record at the adapter's step, or else the last one before it.
    """

    step: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    trained_rows: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of the rows that it trained on."""
        return tuple(dict.fromkeys(entry["task"] for entry in self.trained_rows.get("rows", ())))


def plain_name(name: str) -> str:
    """A name of a data set or a model for others: a hub id as it is, of a path the last part only."""
    return name if HUB_ID.fullmatch(name) else PurePath(name).name


def read_base(model_id: str, adapter: Path | None = None) -> BaseFacts:
    """Read the facts of a base.

    Args:
        model_id: Folder or hub id.
        adapter: An adapter that may name the hub id of the base.
    Raises:
        RunError: The base has no configuration that can be read, or the adapter has none.
    """
    named = str(read_adapter_config(adapter).get("base_model_name_or_path") or "") if adapter else ""
    known_id = hub_id(model_id) or hub_id(named)
    family = get_family(model_id)
    architectures = read_config(model_id).get("architectures") or [""]
    return BaseFacts(
        hub_id=known_id,
        name=(known_id or model_id.rstrip("/")).rpartition("/")[2],
        family=family.name,
        tasks=tuple(family.tasks),
        architecture=str(architectures[0]) if _is_in_transformers(str(architectures[0])) else "",
        license=_read_license(model_id),
    )


def _is_in_transformers(name: str) -> bool:
    import transformers

    return name.isidentifier() and hasattr(transformers, name)


def _read_license(model_id: str) -> dict[str, str]:
    """What the base's own card, if it has one here or on the hub, says of the license."""
    with suppress(Exception):  # a card that others wrote may hold anything
        data = ModelCard.load(Path(model_file(model_id, "README.md")), ignore_metadata_errors=True).data.to_dict()
        return {key: data[key] for key in LICENSE_KEYS if isinstance(data.get(key), str)}
    return {}


def read_adapter(folder: Path, model_id: str) -> AdapterFacts:
    """Read the facts of an adapter.

    Raises:
        RunError: It cannot be read.
    """
    config, family = read_adapter_config(folder), get_family(model_id)
    method = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    is_full = config.get("tuning") == FULL
    roles = roles_of_adapter(folder, family)
    path = weights_file(folder)
    return AdapterFacts(
        method=FULL if is_full else method,
        rank=None if is_full else config.get("r"),
        alpha=None if is_full else config.get("lora_alpha"),
        roles=tuple(role for role in family.roles if role in roles),
        num_parameters=_count_numbers(path) if path.name == WEIGHTS else None,
        weights_sha256=file_hash(path),
    )


def _count_numbers(path: Path) -> int:
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # not a dict


def find_run(adapter: Path) -> tuple[Path, int] | None:
    """The run folder around an adapter or a checkpoint, and the step of its weights; None without one."""
    if adapter.parent.name == CHECKPOINTS_FOLDER and adapter.name.rpartition("-")[2].isdecimal():
        run_dir, step = adapter.parent.parent, int(adapter.name.rpartition("-")[2])
    else:
        run_dir = adapter.parent
        result = _read_json(run_dir / RESULT_FILE)
        step = result.get("adapter_step", 0) if adapter.name == "adapter" else 0
    is_run = step and (run_dir / SETTINGS).is_file() and (run_dir / PARAMETERS_FILE).is_file()
    return (run_dir, step) if is_run else None


def read_run(run_dir: Path, step: int) -> RunFacts:
    """Read the records of a run.

    Args:
        step: Step of the adapter.
    """
    settings, provenance, parameters, trained_rows = (
        _read_json(run_dir / name) for name in (SETTINGS, "provenance.json", PARAMETERS_FILE, TRAINED_ROWS_FILE)
    )
    validations = [record for record in read_metrics(run_dir, "validation") if record["step"] <= step]
    validation = validations[-1] if validations else {}
    return RunFacts(step, settings, provenance, parameters, trained_rows, validation)


def _read_json(path: Path) -> dict[str, Any]:
    """Content of a record; {} if there is none or it is damaged, so that the card says less."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}
