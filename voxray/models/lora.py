"""LoRA by role: which parts of a model it may touch, proof that it touches nothing else, and adapters on disk.

Layer names alone do not say where a layer is: ``q_proj`` stands in the Whisper encoder as well as in the language
model.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from voxray.errors import RunError
from voxray.models.family import Family

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def target_pattern(family: Family, roles: Sequence[str]) -> str:
    """Regular expression over whole module names that matches the LoRA layers of some roles and nothing else."""
    parts = []
    for role in roles:
        within, names = ("|".join(map(re.escape, words)) for words in (family.roles[role], family.lora_targets[role]))
        parts.append(rf"(?:.*\.)?(?:{within})\.(?:.*\.)?(?:{names})")
    return "|".join(parts)


def role_of(name: str, family: Family) -> str:
    """Role of a module or parameter name; "other" if it belongs to none."""
    path = name.split(".")
    return next((role for role, within in family.roles.items() if any(word in path for word in within)), "other")


def add_lora(
    model: Any, family: Family, roles: Sequence[str], *, model_id: str, r: int, alpha: float, dropout: float
) -> PeftModel:
    """Wrap a frozen base with LoRA on the given roles.

    Args:
        roles: Such as ("projector", "llm").
        model_id: Name or folder of the base, kept in the adapter.
    Returns:
        The PEFT model; LoRA weights are float32 and the only ones that train.
    Raises:
        RunError: A role has no matching layer, or LoRA ended up outside the roles.
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT scales by any number
        lora_dropout=dropout,
        target_modules=target_pattern(family, roles),
        base_model_name_or_path=model_id,
    )
    matched = [name for name, _ in model.named_modules() if re.fullmatch(str(config.target_modules), name)]
    for role in roles:
        if not any(role_of(name, family) == role for name in matched):
            raise RunError(f"LoRA: no layer of the {role} is called {', '.join(family.lora_targets[role])}")
    wrapped = get_peft_model(model, config)
    check_lora(wrapped, family, roles)
    return wrapped


def check_lora(model: torch.nn.Module, family: Family, roles: Sequence[str]) -> None:
    """Refuse a model in which anything outside the roles trains."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and role_of(name, family) not in roles:
            raise RunError(f"LoRA: {name} would train, but only {', '.join(roles)} should")


def count_parameters(model: torch.nn.Module, family: Family) -> dict[str, dict[str, int]]:
    """{role: {"total", "trainable"}} in parameters; ``total`` counts the LoRA weights as well."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        entry = counts.setdefault(role_of(name, family), {"total": 0, "trainable": 0})
        entry["total"] += parameter.numel()
        entry["trainable"] += parameter.numel() * parameter.requires_grad
    return counts


def trainable_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Name and parameter of everything that trains, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter in PEFT's format: safetensors and a JSON configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _adapter_state(model).items()}
    save_file(dict(sorted(tensors.items())), folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config["default"]
    inference, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = inference


def _adapter_state(model: PeftModel) -> Mapping[str, torch.Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def load_adapter_weights(model: PeftModel, folder: Path, within: Callable[[str], bool] = lambda name: True) -> int:
    """Copy an adapter's tensors into a model that has the same LoRA layers.

    Args:
        within: Which of the model's LoRA tensors the adapter has to have.
    Returns:
        Tensors copied.
    Raises:
        RunError: The folder holds no readable adapter, or its tensors are not exactly the model's.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises its own types for a damaged file
        raise RunError(f"{folder / WEIGHTS}: cannot read the adapter: {error}") from None
    wanted = {name: tensor for name, tensor in _adapter_state(model).items() if within(name)}
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    wrong = sorted(name for name in set(wanted) & set(tensors) if wanted[name].shape != tensors[name].shape)
    for names, what in ((missing, "lacks"), (extra, "has, unknown to the model,"), (wrong, "has in another shape")):
        if names:
            raise RunError(
                f"{folder}: the adapter does not fit the model: it {what} {len(names)} tensors, as {names[0]}"
            )
    set_peft_model_state_dict(model, tensors)
    return len(tensors)


def load_adapter(model: Any, folder: Path) -> tuple[PeftModel, int]:
    """Wrap a base with a stored adapter, for inference.

    Returns:
        The PEFT model in eval mode and the number of tensors matched.
    """
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    num_tensors = load_adapter_weights(wrapped, folder)
    return wrapped.eval(), num_tensors


def find_adapter(path: str, flag: str = "--lora_dir") -> Path:
    """Resolve an adapter, checkpoint or run folder to the folder that holds the adapter.

    A run folder gives its final adapter, else its newest checkpoint; the older scripts' ``checkpoint-N`` folders and
    their ``lora_stage1`` and ``lora_stage2_adapter`` names, which stand for a run's ``adapter`` folder, are
    understood too.

    Raises:
        RunError: There is no adapter.
    """
    folder = Path(path)
    if folder.name in {"lora_stage1", "lora_stage2_adapter"} and not folder.exists():
        folder = folder.parent / "adapter"
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "adapter" / CONFIG).is_file():
        return folder / "adapter"
    found = [*folder.glob("checkpoints/step-*"), *folder.glob("checkpoint-*")]
    numbered = [(int(match[1]), item) for item in found if (match := re.search(r"-(\d+)$", item.name))]
    usable = sorted((number, item) for number, item in numbered if (item / CONFIG).is_file())
    if not usable:
        raise RunError(f"{flag} {path}: no adapter here (no {CONFIG}, adapter folder or checkpoint)")
    return usable[-1][1]


def roles_of_adapter(folder: Path, family: Family) -> set[str]:
    """Roles that an adapter on disk changes.

    Raises:
        RunError: It cannot be read.
    """
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:  # type: ignore[no-untyped-call]
            return {role_of(name, family) for name in file.keys()}  # noqa: SIM118  # not a dict
    except Exception as error:  # safetensors raises its own types for a damaged file
        raise RunError(f"{folder / WEIGHTS}: cannot read the adapter: {error}") from None


def base_of_adapter(folder: Path) -> str:
    """The base model that an adapter was trained on, as its configuration names it."""
    try:
        return str(json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] or "")
    except (OSError, ValueError, KeyError):
        raise RunError(f"{folder / CONFIG}: cannot read the adapter's configuration") from None
