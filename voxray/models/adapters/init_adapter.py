"""Training that starts from an earlier adapter: what it has, whether it fits, and its tensors in the new LoRA.

The new adapter covers the earlier one's roles and those that train now, so it stands on the plain base by itself.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from voxray.core.errors import RunError, SettingsError
from voxray.models.adapters.audio_trim_record import read_record
from voxray.models.adapters.lora import CONFIG, WEIGHTS, find_adapter, find_role, load_adapter_weights, roles_of_adapter
from voxray.models.interface import InitAdapter, ModelFamily

SHAPING = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
"""Options of PEFT, beside rank and alpha, that decide what an adapter's tensors do."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter to start from.

    Attributes:
        folder: Where it is.
        roles: Parts of the model that it changes, in the family's order.
        base: The base it was trained on, as it names it.
        trims_audio: Whether it was trained without the audio tokens of padding; None if without audio.
    """

    folder: Path
    roles: tuple[str, ...]
    base: str
    trims_audio: bool | None = None

    def described(self) -> dict[str, Any]:
        """What provenance.json says of it."""
        digest = hashlib.sha256((self.folder / WEIGHTS).read_bytes()).hexdigest()
        return {"folder": str(self.folder), "sha256": digest, "roles": list(self.roles), "base": self.base}

    def copy_into(self, model: PeftModel, family: ModelFamily) -> int:
        """Copy it into LoRA that covers its roles and maybe more.

        Returns:
            Tensors copied, all that it has.
        Raises:
            RunError: The model's LoRA over those roles is of another make.
        """
        stored, config = _read_config(self.folder), model.peft_config["default"]
        for name in SHAPING:
            if (stored.get(name) or None) != (getattr(config, name) or None):
                raise RunError(f"{self.folder}: the adapter has {name} {stored.get(name)}, not {getattr(config, name)}")
        return load_adapter_weights(model, self.folder, lambda name: find_role(name, family) in self.roles)


def read_init_adapter(
    path: str, family: ModelFamily, *, r: int, alpha: float, store: str, trims_audio: bool | None = None
) -> PeftAdapter | None:
    """Find the adapter of ``--init_adapter`` and check that training can go on from it.

    Args:
        path: A run, adapter or checkpoint folder; None comes back for "".
        r, alpha: Rank and scale of the training to come.
        store: What its feature shards hold.
        trims_audio: Whether it leaves out the audio tokens of padding; None if it has no audio.
    Raises:
        RunError: There is no adapter, or it cannot be read.
        SettingsError: It has another rank or alpha, changes an encoder whose outputs are stored, or was trained on
            other audio tokens.
    """
    if not path:
        return None
    folder = find_adapter(path, "--init_adapter")
    stored = _read_config(folder)
    found = (stored.get("r"), float(stored.get("lora_alpha") or 0))
    if found != (r, float(alpha)):
        raise SettingsError(
            f"--init_adapter {path}: its LoRA has rank {found[0]} and alpha {found[1]:g}, this run --lora_r {r} and "
            f"--lora_alpha {alpha:g}; give --lora_r {found[0]} --lora_alpha {found[1]:g}, or train it with other ones"
        )
    roles = roles_of_adapter(folder, family)
    if unknown := roles - set(family.roles):
        raise RunError(f"--init_adapter {path}: has tensors of no known part of {family.name} ({', '.join(unknown)})")
    if store == "encoder" and "encoder" in roles:
        raise SettingsError(f"--store encoder: --init_adapter {path} changes the encoder, so its outputs differ")
    trained = read_record(folder)
    if None not in (trained, trims_audio) and trained != trims_audio:
        kind = "with it; give it here too" if trained else "without it"
        raise SettingsError(f"--trim_audio_tokens: the adapter of --init_adapter {path} was trained {kind}")
    ordered = tuple(role for role in family.roles if role in roles)
    return PeftAdapter(folder, ordered, str(stored.get("base_model_name_or_path") or ""), trained)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        stored = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        raise RunError(f"{folder / CONFIG}: cannot read the adapter's configuration")
    return stored


def load_init_adapter(model: PeftModel, family: ModelFamily, earlier: InitAdapter, roles: Sequence[str]) -> int:
    """Copy an earlier adapter into LoRA that covers its roles and maybe more; what is outside ``roles`` is frozen.

    Returns:
        Tensors copied.
    Raises:
        RunError: See ``InitAdapter.copy_into``.
    """
    copied = earlier.copy_into(model, family)
    for name, parameter in model.named_parameters():
        if find_role(name, family) not in roles:
            parameter.requires_grad_(False)
    return copied
