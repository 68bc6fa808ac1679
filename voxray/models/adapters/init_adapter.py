"""Training that starts from an earlier adapter (--init_adapter).

The new adapter covers the roles of the earlier one and those that train now, so it needs only the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import checksum
from voxray.models.adapters.audio_trim_record import read_trim_record
from voxray.models.adapters.lora import (
    ALL_LINEAR,
    find_adapter,
    find_role,
    is_lora_tensor,
    load_adapter_weights,
    roles_of_adapter,
)
from voxray.models.adapters.read_files import read_adapter_config, tensor_names, weights_file
from voxray.models.interface import InitAdapter, ModelFamily

PEFT_OPTIONS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
"""Options of PEFT, beside rank and alpha, that determine what an adapter's tensors do."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in PEFT's format to start training from (see ``InitAdapter``).

    Attributes:
        folder: Its folder.
        roles: Roles of the model that it changes, in the family's order.
        base: The base it was trained on, as its configuration names it.
        trims_audio: Whether it was trained without the audio tokens of padding; None if trained without audio.
    """

    folder: Path
    roles: tuple[str, ...]
    base: str
    trims_audio: bool | None = None

    @property
    def weights_file(self) -> Path:
        return weights_file(self.folder)

    def provenance(self) -> dict[str, Any]:
        """JSON values that identify the adapter in provenance.json."""
        digest = checksum(self.weights_file)
        return {"folder": str(self.folder), "sha256": digest, "roles": list(self.roles), "base": self.base}

    def copy_into(self, model: PeftModel, family: ModelFamily) -> int:
        """Copy all tensors of the adapter into a model whose LoRA covers at least its roles.

        Returns:
            Number of tensors copied.
        Raises:
            RunError: The model's LoRA has other options.
        """
        stored, config = read_adapter_config(self.folder), model.peft_config["default"]
        for name in PEFT_OPTIONS:
            if (stored.get(name) or None) != (getattr(config, name) or None):
                raise RunError(f"{self.folder}: the adapter has {name} {stored.get(name)}, not {getattr(config, name)}")
        return load_adapter_weights(model, self.folder, lambda name: find_role(name, family) in self.roles)


def read_init_adapter(
    path: str,
    family: ModelFamily,
    *,
    r: int,
    alpha: float,
    store: str,
    trims_audio: bool | None = None,
    targets: Sequence[str] = (),
) -> PeftAdapter | None:
    """Find the adapter of ``--init_adapter`` and check that training can start from it.

    Args:
        path: A run, adapter or checkpoint folder; "" returns None.
        r, alpha: LoRA rank and alpha of the new training.
        store: What its feature shards hold.
        trims_audio: Whether it omits the audio tokens of padding; None if it has no audio.
        targets: Names of the layers that LoRA adapts in the new training; empty for the family's own.
    Raises:
        RunError: There is no adapter, or it cannot be read.
        SettingsError: It has another rank or alpha, LoRA on other layers, or trained biases; it changes an encoder
            whose outputs are stored; or it was trained with other audio tokens.
    """
    if not path:
        return None
    folder = find_adapter(path, "--init_adapter")
    config = read_adapter_config(folder)
    check_rank_and_alpha(f"--init_adapter {path}", (config.get("r"), float(config.get("lora_alpha") or 0)), r, alpha)
    roles = roles_of_adapter(folder, family)
    if unknown := roles - set(family.roles):
        raise RunError(f"--init_adapter {path}: has tensors of no known part of {family.name} ({', '.join(unknown)})")
    if (bias := config.get("bias") or "none") != "none":
        raise SettingsError(f"--init_adapter {path}: was trained with bias {bias}, and voxray trains no biases")
    _check_layers(path, folder, family, targets)
    if store == "encoder" and "encoder" in roles:
        raise SettingsError(f"--store encoder: --init_adapter {path} changes the encoder, so its outputs differ")
    was_trimmed = read_trim_record(folder)
    if None not in (was_trimmed, trims_audio) and was_trimmed != trims_audio:
        difference = "with it; give it here too" if was_trimmed else "without it"
        raise SettingsError(f"--trim_audio_tokens: the adapter of --init_adapter {path} was trained {difference}")
    ordered = tuple(role for role in family.roles if role in roles)
    return PeftAdapter(folder, ordered, str(config.get("base_model_name_or_path") or ""), was_trimmed)


def _check_layers(path: str, folder: Path, family: ModelFamily, targets: Sequence[str]) -> None:
    """Raise SettingsError if an adapter has LoRA on layers with other names than the new training."""
    layers: dict[str, set[str]] = {}
    for name in filter(is_lora_tensor, tensor_names(folder)):
        layers.setdefault(find_role(name, family), set()).add(name.partition(".lora_")[0].rpartition(".")[2])
    for role, names in layers.items() if ALL_LINEAR not in targets else ():
        expected = {target.rpartition(".")[2] for target in targets or family.lora_targets.get(role, ())}
        if names != expected:
            advice = f"; give --lora_targets {','.join(sorted(names))}" if targets else ""
            raise SettingsError(
                f"--init_adapter {path}: has LoRA on {', '.join(sorted(names))} of the {role}, this run on "
                f"{', '.join(sorted(expected)) or 'none of its layers'}{advice}"
            )


def check_rank_and_alpha(source: str, stored: tuple[int | None, float], r: int, alpha: float) -> None:
    """Raise SettingsError if stored LoRA weights have another rank or alpha than the new training.

    Args:
        source: Flag and path of the weights.
        stored: Their rank and alpha.
    """
    if stored != (r, float(alpha)):
        flags = f"--lora_r {stored[0]} --lora_alpha {stored[1]:g}"
        raise SettingsError(
            f"{source}: its LoRA has rank {stored[0]} and alpha {stored[1]:g}, this run --lora_r {r} and "
            f"--lora_alpha {alpha:g}; give {flags}, or train it again with these values"
        )


def load_init_adapter(model: PeftModel, family: ModelFamily, init_adapter: InitAdapter, roles: Sequence[str]) -> int:
    """Copy an earlier adapter into LoRA that covers at least its roles, and freeze everything outside ``roles``.

    Returns:
        Number of tensors copied.
    Raises:
        RunError: See ``InitAdapter.copy_into``.
    """
    num_tensors = init_adapter.copy_into(model, family)
    for name, parameter in model.named_parameters():
        if find_role(name, family) not in roles:
            parameter.requires_grad_(False)
    return num_tensors
