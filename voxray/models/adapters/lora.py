"""LoRA or full tuning of chosen roles, a check that nothing else trains, and adapters on disk.

Layer names alone do not identify a role: Whisper's encoder and the language model both have a ``q_proj``.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import filterfalse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from voxray.core.errors import RunError, SettingsError, library_errors
from voxray.models.adapters.audio_trim_record import read_base_path, write_record
from voxray.models.adapters.read_files import CONFIG, FULL, WEIGHTS, read_adapter_config, read_tensors, tensor_names
from voxray.models.adapters.tied_weights import untie
from voxray.models.hf_files import hub_id, is_inside, unwrap_peft
from voxray.models.interface import ModelFamily


def target_pattern(family: ModelFamily, roles: Sequence[str], targets: Sequence[str] = ()) -> str:
    """Regular expression that matches the full names of the layers that LoRA adapts in some roles, and nothing else.

    Args:
        targets: Names of these layers; empty for the family's own.
    """
    patterns = []
    for role in roles:
        modules = "|".join(map(re.escape, family.roles[role]))
        layers = "|".join(map(re.escape, targets or family.lora_targets[role]))
        patterns.append(rf"(?:.*\.)?(?:{modules})\.(?:.*\.)?(?:{layers})")
    return "|".join(patterns)


ALL_LINEAR = "all-linear"
"""PEFT's word for all Linear layers but the output layer, here those of the roles that train."""


def resolve_targets(model: Any, family: ModelFamily, roles: Sequence[str], targets: Sequence[str]) -> tuple[str, ...]:
    """Check the names of ``--lora_targets`` against a base.

    Args:
        model: The base, with weights or on the meta device.
        roles: Roles whose layers LoRA adapts.
    Returns:
        The names; for ``all-linear`` those of all Linear layers in the roles.
    Raises:
        SettingsError: No layer has one of the names, or a role has none of the layers.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    layers = {role: [name for name in linear if find_role(name.rpartition(".")[0], family) == role] for role in roles}
    names = {role: sorted({name.rpartition(".")[2] for name in layers[role]}) for role in roles}
    every_name = sorted({name for role in roles for name in names[role]})
    if ALL_LINEAR in targets:
        return tuple(every_name)

    def is_missing(target: str, *among: str) -> bool:
        pattern = target_pattern(family, among, (target,))
        return not any(re.fullmatch(pattern, name) for role in among for name in layers[role])

    if wrong := [target for target in targets if is_missing(target, *roles)]:
        raise SettingsError(f"--lora_targets {','.join(wrong)}: no layer is called so; layers: {', '.join(every_name)}")
    for role in roles:
        if all(is_missing(target, role) for target in targets):
            raise SettingsError(
                f"--lora_targets {','.join(targets)}: no layer of the {role} is called so; its layers: "
                f"{', '.join(names[role])}"
            )
    return tuple(targets)


def find_role(name: str, family: ModelFamily) -> str:
    """Role of a module or parameter; "other" if it belongs to none."""
    path = set(name.split("."))
    return next((role for role, modules in family.roles.items() if not path.isdisjoint(modules)), "other")


def quantized_layers(model: Any, family: ModelFamily) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The layers that ``--quantize`` quantises: all Linear layers of some roles except the output layer."""
    output_layer = unwrap_peft(model).get_output_embeddings()
    for name, module in model.named_modules():
        is_inner = isinstance(module, torch.nn.Linear) and module is not output_layer
        if is_inner and find_role(name, family) in family.quantized and not is_lora_tensor(name):
            yield name, module


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
    """Wrap a frozen base with LoRA on some roles.

    Args:
        roles: Roles that train, such as ("projector", "llm").
        model_id: Name or folder of the base, stored in the adapter.
        r, alpha, dropout: LoRA's rank, alpha and dropout.
        tuning: ``lora``, ``dora`` or ``rslora``.
        targets: Names of the layers to adapt in the roles (see ``resolve_targets``); empty for the family's own.
    Returns:
        The PEFT model. LoRA weights, in float32, and the roles' ``full_modules`` train, nothing else.
    Raises:
        RunError: A role has no matching layer, or something outside the roles would train.
        SettingsError: See ``resolve_targets``.
    """
    adapted = adapted_roles(family, roles)
    targets = resolve_targets(model, family, adapted, targets) if targets else ()
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT accepts any number
        lora_dropout=dropout,
        target_modules=target_pattern(family, adapted, targets),
        use_dora=tuning == "dora",
        use_rslora=tuning == "rslora",
        base_model_name_or_path=model_id,
    )
    matched = [name for name, _ in model.named_modules() if re.fullmatch(str(config.target_modules), name)]
    for role in adapted:
        if not any(find_role(name, family) == role for name in matched):
            raise RunError(f"LoRA: no layer of the {role} is called {', '.join(family.lora_targets[role])}")
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if find_role(name, family) in roles and is_inside(name, family.full_modules):
            parameter.requires_grad_(True)
    check_trainable(wrapped, family, roles)
    return wrapped


def adapted_roles(family: ModelFamily, roles: Sequence[str]) -> list[str]:
    """The roles that have layers for LoRA."""
    return [role for role in roles if role in family.lora_targets]


def train_fully(model: Any, family: ModelFamily, roles: Sequence[str]) -> Any:
    """Make all weights of some roles trainable, without LoRA, except ``always_frozen`` modules.

    Raises:
        RunError: A role has no weights.
    """
    for name, parameter in model.named_parameters():
        if find_role(name, family) in roles and not is_inside(name, family.always_frozen):
            parameter.requires_grad_(True)
    counts = count_parameters(model, family)
    for role in roles:
        if not counts.get(role, {}).get("trainable"):
            raise RunError(f"--tuning full: the {role} has no weights to train")
    return model


def check_trainable(model: torch.nn.Module, family: ModelFamily, roles: Sequence[str]) -> None:
    """Raise RunError if anything outside the roles is trainable."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and find_role(name, family) not in roles:
            raise RunError(f"LoRA: {name} would train, but only {', '.join(roles)} should")


def count_parameters(model: torch.nn.Module, family: ModelFamily) -> dict[str, dict[str, int]]:
    """{role: {"total": ..., "trainable": ...}} in parameters; ``total`` includes LoRA weights."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        entry = counts.setdefault(find_role(name, family), {"total": 0, "trainable": 0})
        entry["total"] += parameter.numel()
        entry["trainable"] += parameter.numel() * parameter.requires_grad
    return counts


def trainable_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of everything trainable, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def save_adapter(model: Any, folder: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write an adapter in PEFT's format, or fully tuned weights in two files of the same names.

    The configuration of fully tuned weights has ``"tuning": "full"``, the base and the tensors' names. The base has its
    hub id there if it is known (``hub_id``). ``voxray.json`` records how to build prompts, and the base's folder.

    Args:
        tensors: An earlier result of ``adapter_tensors``; the current tensors if None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = adapter_tensors(model) if tensors is None else tensors
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(stored.items())}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    is_peft = isinstance(model, PeftModel)
    base = str((model.peft_config["default"].base_model_name_or_path if is_peft else model.config.name_or_path) or "")
    name = hub_id(base) or base
    write_record(model, folder, base if name != base else "")
    if not is_peft:
        values = {"tuning": FULL, "base_model_name_or_path": name, "tensors": list(stored)}
        (folder / CONFIG).write_text(json.dumps(values, indent=1))
        return
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = name, True
    config.save_pretrained(str(folder))


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """{name on disk: parameter} of a model's adapter or its fully tuned weights."""
    if not isinstance(model, PeftModel):
        return dict(trainable_parameters(model))
    parameters = model.state_dict(keep_vars=True)  # parameters themselves, not detached tensors
    return dict(
        get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    ) | full_module_weights(model)


def full_module_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """{name: parameter} of the trainable weights that are not LoRA's, in the model's order."""
    return {name: parameter for name, parameter in trainable_parameters(model) if not is_lora_tensor(name)}


def is_lora_tensor(name: str) -> bool:
    """Whether a tensor of an adapter belongs to LoRA and is not one of the base's own weights."""
    return "lora_" in name


def load_adapter_weights(
    model: Any, folder: Path, select: Callable[[str], bool] = lambda name: True, *, keeps_types: bool = False
) -> int:
    """Copy stored tensors into a model in which exactly these are trainable.

    Args:
        select: Which of the model's trainable tensors, by name, the adapter must have.
        keeps_types: Whole weights take the type of the stored tensors, whatever type they have in the model.
    Returns:
        Number of tensors copied.
    Raises:
        RunError: The adapter cannot be read, or its tensors are not exactly the selected ones.
    """
    expected = {name: tensor for name, tensor in adapter_tensors(model).items() if select(name)}
    stored = read_tensors(folder)
    names = present_names(stored, model)
    tensors = {names[name]: tensor for name, tensor in stored.items()}
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape)
    for names, verb in ((missing, "lacks"), (extra, "has, unknown to the model,"), (wrong, "has in another shape")):
        if names:
            raise RunError(
                f"{folder}: the adapter does not fit the model: it {verb} {len(names)} tensors, as {names[0]}"
            )
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, {name: tensor for name, tensor in tensors.items() if is_lora_tensor(name)})
    whole = full_module_weights(model) if isinstance(model, PeftModel) else dict(trainable_parameters(model))
    for name, parameter in whole.items():
        if name in tensors and keeps_types:
            parameter.data = tensors[name].to(parameter.device)
        elif name in tensors:
            parameter.data.copy_(tensors[name])
    _check_loaded(tensors, model, folder)
    return len(tensors)


def _check_loaded(tensors: Mapping[str, torch.Tensor], model: Any, folder: Path) -> None:
    """Raise RunError if a tensor of an adapter is not in the model now."""
    loaded = adapter_tensors(model)
    for name, tensor in tensors.items():
        if not torch.equal(loaded[name].detach(), tensor.to(loaded[name])):
            raise RunError(f"{folder}: the adapter does not fit the model: {name} would not be used")


OLD_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("audio_tower.", "model.audio_tower."),
)
"""How modules were called in models of transformers 4, and how they are called now."""
PEFT_PREFIX = "base_model.model."


def present_names(names: Iterable[str], model: Any) -> dict[str, str]:
    """{name of an adapter's tensor: its name in the model}. They differ for adapters of transformers 4."""
    modules = {name for name, _ in unwrap_peft(model).named_modules()}
    moved = [pair for pair in OLD_PREFIXES if pair[0].rstrip(".") not in modules and pair[1].rstrip(".") in modules]
    present = {}
    for name in names:
        prefixes = (pair for pair in moved if name.startswith(PEFT_PREFIX + pair[0]))
        old, new = next(prefixes, ("", ""))
        present[name] = PEFT_PREFIX + new + name.removeprefix(PEFT_PREFIX + old) if old else name
    return present


def _adapted_layer(name: str) -> str:
    """Name in the base of the layer to which a tensor of LoRA belongs."""
    return name.removeprefix(PEFT_PREFIX).partition(".lora_")[0]


def load_adapter(model: Any, folder: Path) -> tuple[Any, int]:
    """Add a stored adapter to a base, or replace its weights by fully tuned ones, for inference.

    Returns:
        The model in eval mode, and the number of tensors loaded.
    Raises:
        RunError: The adapter cannot be read, is of another kind than LoRA, or does not fit the base.
    """
    stored = read_adapter_config(folder)
    if stored.get("tuning") == FULL:
        names = set(stored.get("tensors", ()))
        for name, parameter in model.named_parameters():
            if name in names and not parameter.is_floating_point():
                raise RunError(
                    f"{folder}: holds fully tuned weights, which no quantised base takes; leave out --quantize"
                )
            parameter.requires_grad_(name in names)
        num_tensors = load_adapter_weights(model, folder)
        return model.requires_grad_(False).eval(), num_tensors
    names = present_names(tensor_names(folder), model)
    with library_errors(f"{folder}: the adapter does not fit the model"):
        config: Any = LoraConfig.from_pretrained(str(folder))
        config.inference_mode = True
        config.base_model_name_or_path = None  # PEFT sets it, and warns if it had another name
        # Whole modules that were saved beside LoRA are copied into the base's own parameters.
        config.modules_to_save = None
        if any(old != new for old, new in names.items()):  # the configuration's patterns are for the old names, too
            layers = {_adapted_layer(name) for name in names.values() if is_lora_tensor(name)}
            config.target_modules, config.exclude_modules = sorted(layers), None
        wrapped = get_peft_model(model, config)
    full_names = set(filterfalse(is_lora_tensor, names.values()))
    untie(wrapped, full_names, unless_all=bool(stored.get("ensure_weight_tying")))
    for name, parameter in wrapped.named_parameters():
        if name in full_names and not parameter.is_floating_point():
            raise RunError(f"{folder}: holds {name} as a whole, which no quantised base takes; leave out --quantize")
        parameter.requires_grad_(parameter.requires_grad or name in full_names)
    num_tensors = load_adapter_weights(wrapped, folder)
    return wrapped.requires_grad_(False).eval(), num_tensors


def find_adapter(path: str, flag: str = "--lora_dir") -> Path:
    """Resolve an adapter, checkpoint or run folder to the folder that holds the adapter.

    In a run folder that is the final adapter, else the newest checkpoint. Older scripts' ``checkpoint-N`` folders work
    too, and so do their names ``lora_stage1`` and ``lora_stage2_adapter`` for a run's ``adapter`` folder.

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
    checkpoints = [
        (int(match[1]), path)
        for path in (*folder.glob("checkpoints/step-*"), *folder.glob("checkpoint-*"))
        if (match := re.search(r"-(\d+)$", path.name)) and (path / CONFIG).is_file()
    ]
    if not checkpoints:
        raise RunError(f"{flag} {path}: no adapter here (no {CONFIG}, adapter folder or checkpoint)")
    return max(checkpoints)[1]


def roles_of_adapter(folder: Path, family: ModelFamily) -> set[str]:
    """Roles that an adapter on disk changes.

    Raises:
        RunError: It cannot be read.
    """
    return {find_role(name, family) for name in tensor_names(folder)}


def base_of_adapter(folder: Path) -> str:
    """The base that an adapter was trained on: its folder as long as it exists, else as the configuration names it.

    Raises:
        RunError: The configuration cannot be read.
    """
    config = read_adapter_config(folder)
    return read_base_path(folder) or str(config.get("base_model_name_or_path") or "")
