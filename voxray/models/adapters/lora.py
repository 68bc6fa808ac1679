"""What trains, by role: LoRA or the weights themselves, proof that nothing else does, and the result on disk.

Layer names alone do not say where a layer is: ``q_proj`` stands in the Whisper encoder as well as in the language
model.
"""

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import filterfalse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from voxray.core.errors import RunError
from voxray.models.adapters.audio_trim_record import write_record
from voxray.models.interface import ModelFamily

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FULL = "full"


def target_pattern(family: ModelFamily, roles: Sequence[str], targets: Sequence[str] = ()) -> str:
    """Regular expression over whole module names that matches the LoRA layers of some roles and nothing else.

    Args:
        targets: Names of these layers; empty takes the family's own.
    """
    parts = []
    for role in roles:
        words = (family.roles[role], targets or family.lora_targets[role])
        within, names = ("|".join(map(re.escape, some)) for some in words)
        parts.append(rf"(?:.*\.)?(?:{within})\.(?:.*\.)?(?:{names})")
    return "|".join(parts)


def find_role(name: str, family: ModelFamily) -> str:
    """Role of a module or parameter name; "other" if it belongs to none."""
    path = name.split(".")
    return next((role for role, within in family.roles.items() if any(word in path for word in within)), "other")


def add_lora(
    model: Any,
    family: ModelFamily,
    roles: Sequence[str],
    *,
    model_id: str,
    r: int,
    alpha: float,
    dropout: float,
    tuning: str = "lora",
    targets: Sequence[str] = (),
) -> PeftModel:
    """Wrap a frozen base with LoRA on the given roles.

    Args:
        roles: Such as ("projector", "llm").
        model_id: Name or folder of the base, kept in the adapter.
        tuning: ``lora``, ``dora`` or ``rslora``.
        targets: Names of the layers to adapt within the roles; empty takes the family's own.
    Returns:
        The PEFT model; LoRA weights are float32 and the only ones that train, beside what the family trains whole.
    Raises:
        RunError: A role has no matching layer, or LoRA ended up outside the roles.
    """
    adapted = [role for role in roles if role in family.lora_targets]
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT scales by any number
        lora_dropout=dropout,
        target_modules=target_pattern(family, adapted, targets),
        use_dora=tuning == "dora",
        use_rslora=tuning == "rslora",
        base_model_name_or_path=model_id,
    )
    matched = [name for name, _ in model.named_modules() if re.fullmatch(str(config.target_modules), name)]
    for role in adapted:
        if not any(find_role(name, family) == role for name in matched):
            raise RunError(f"LoRA: no layer of the {role} is called {', '.join(targets or family.lora_targets[role])}")
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if find_role(name, family) in roles and any(f".{whole}." in f".{name}." for whole in family.full_modules):
            parameter.requires_grad_(True)
    check_lora(wrapped, family, roles)
    return wrapped


def train_fully(model: Any, family: ModelFamily, roles: Sequence[str]) -> Any:
    """Let all weights of the given roles train, without LoRA.

    Raises:
        RunError: A role has no weights.
    """
    for name, parameter in model.named_parameters():
        if find_role(name, family) in roles and not any(f".{fixed}." in f".{name}." for fixed in family.always_frozen):
            parameter.requires_grad_(True)
    counts = count_parameters(model, family)
    for role in roles:
        if not counts.get(role, {}).get("trainable"):
            raise RunError(f"--tuning full: the {role} has no weights to train")
    return model


def check_lora(model: torch.nn.Module, family: ModelFamily, roles: Sequence[str]) -> None:
    """Refuse a model in which anything outside the roles trains."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and find_role(name, family) not in roles:
            raise RunError(f"LoRA: {name} would train, but only {', '.join(roles)} should")


def count_parameters(model: torch.nn.Module, family: ModelFamily) -> dict[str, dict[str, int]]:
    """{role: {"total", "trainable"}} in parameters; ``total`` counts the LoRA weights as well."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        entry = counts.setdefault(find_role(name, family), {"total": 0, "trainable": 0})
        entry["total"] += parameter.numel()
        entry["trainable"] += parameter.numel() * parameter.requires_grad
    return counts


def trainable_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Name and parameter of everything that trains, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def save_adapter(model: Any, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write what trains: an adapter in PEFT's format, or fully tuned weights in the same two files.

    The configuration of fully tuned weights has ``"tuning": "full"``, the base and the tensors' names. What else is
    needed to use them as they were trained stands in ``voxray.json`` (see ``trimming``).

    Args:
        tensors: What ``adapter_tensors`` gave at some time; those of now if left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = adapter_tensors(model) if tensors is None else tensors
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(stored.items())}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    write_record(model, folder)
    if not isinstance(model, PeftModel):
        described = {"tuning": FULL, "base_model_name_or_path": model.config.name_or_path, "tensors": list(stored)}
        (folder / CONFIG).write_text(json.dumps(described, indent=1))
        return
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of a model's adapter, or its fully tuned weights, by the names they have on disk."""
    if not isinstance(model, PeftModel):
        return dict(trainable_parameters(model))
    own = model.state_dict(keep_vars=True)  # not copies of their data as it is now
    return dict(get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=False)) | whole_weights(model)


def whole_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """Weights that train themselves, beside LoRA, in the model's order."""
    return {name: parameter for name, parameter in trainable_parameters(model) if not is_lora(name)}


def is_lora(name: str) -> bool:
    """Whether a tensor of an adapter is one of LoRA's layers, and not one of the base's own weights."""
    return "lora_" in name


def load_adapter_weights(model: Any, folder: Path, within: Callable[[str], bool] = lambda name: True) -> int:
    """Copy stored tensors into a model in which just these train: LoRA layers, or the weights themselves.

    Args:
        within: Which of the model's tensors the adapter has to have.
    Returns:
        Tensors copied.
    Raises:
        RunError: The folder holds no readable adapter, or its tensors are not exactly the model's.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors raises its own types for a damaged file
        raise RunError(f"{folder / WEIGHTS}: cannot read the adapter: {error}") from None
    wanted = {name: tensor for name, tensor in adapter_tensors(model).items() if within(name)}
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    wrong = sorted(name for name in set(wanted) & set(tensors) if wanted[name].shape != tensors[name].shape)
    for names, what in ((missing, "lacks"), (extra, "has, unknown to the model,"), (wrong, "has in another shape")):
        if names:
            raise RunError(
                f"{folder}: the adapter does not fit the model: it {what} {len(names)} tensors, as {names[0]}"
            )
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, {name: tensor for name, tensor in tensors.items() if is_lora(name)})
        for name, parameter in whole_weights(model).items():
            if name in tensors:
                parameter.data.copy_(tensors[name])
    else:
        for name, parameter in trainable_parameters(model):
            parameter.data.copy_(tensors[name])
    return len(tensors)


def load_adapter(model: Any, folder: Path) -> tuple[Any, int]:
    """Wrap a base with a stored adapter, or put fully tuned weights in the place of its own, for inference.

    Returns:
        The model in eval mode and the number of tensors matched.
    Raises:
        RunError: What is stored cannot be read or does not fit the base.
    """
    described = _read_config(folder)
    if described.get("tuning") == FULL:
        names = set(described.get("tensors", ()))
        for name, parameter in model.named_parameters():
            if name in names and not parameter.is_floating_point():
                raise RunError(
                    f"{folder}: holds fully tuned weights, which no quantised base takes; leave out --quantize"
                )
            parameter.requires_grad_(name in names)
        num_tensors = load_adapter_weights(model, folder)
        return model.requires_grad_(False).eval(), num_tensors
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    if getattr(model, "trained_whole", ()):
        whole = set(filterfalse(is_lora, tensor_names(folder)))
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in whole)
    num_tensors = load_adapter_weights(wrapped, folder)
    return wrapped.requires_grad_(False).eval(), num_tensors


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


def roles_of_adapter(folder: Path, family: ModelFamily) -> set[str]:
    """Roles that an adapter on disk changes.

    Raises:
        RunError: It cannot be read.
    """
    return {find_role(name, family) for name in tensor_names(folder)}


def tensor_names(folder: Path) -> list[str]:
    """Names of an adapter's tensors.

    Raises:
        RunError: It cannot be read.
    """
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:  # type: ignore[no-untyped-call]
            return list(file.keys())
    except Exception as error:  # safetensors raises its own types for a damaged file
        raise RunError(f"{folder / WEIGHTS}: cannot read the adapter: {error}") from None


def base_of_adapter(folder: Path) -> str:
    """The base model that an adapter was trained on, as its configuration names it."""
    return str(_read_config(folder)["base_model_name_or_path"] or "")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        described = json.loads((folder / CONFIG).read_text())
        described["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{folder / CONFIG}: cannot read the adapter's configuration") from None
    return described
