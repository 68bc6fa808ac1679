"""Training that starts from an official SALMONN checkpoint."""

import hashlib
from pathlib import Path
from typing import Any

from peft import PeftModel

from voxray.core.errors import SettingsError
from voxray.models.adapters.init_adapter import PeftAdapter
from voxray.models.interface import ModelFamily
from voxray.models.salmonn.checkpoint import load_trained, read_trained
from voxray.models.salmonn.loading import LORA_ALPHA


class OfficialCheckpoint(PeftAdapter):
    """A checkpoint of SALMONN's own trainer; ``folder`` is the file."""

    def described(self) -> dict[str, Any]:
        """What provenance.json says of it."""
        digest = hashlib.sha256(self.folder.read_bytes()).hexdigest()
        return {"folder": str(self.folder), "sha256": digest, "roles": list(self.roles), "base": self.base}

    def copy_into(self, model: PeftModel, family: ModelFamily) -> int:
        return load_trained(model, read_trained(self.folder)).num_loaded


def read_official(path: str, *, r: int, alpha: float) -> OfficialCheckpoint:
    """Look at a checkpoint that training is to start from.

    Args:
        r, alpha: LoRA's rank and scale in the training to come.
    Raises:
        RunError: It cannot be read.
        SettingsError: It was trained with another rank or scale.
    """
    trained = read_trained(path)
    found = (trained.lora_rank, float(trained.settings.get("lora_alpha", LORA_ALPHA)))
    if trained.lora_rank and found != (r, float(alpha)):
        raise SettingsError(
            f"--ckpt {path}: its LoRA has rank {found[0]} and alpha {found[1]:g}, this run --lora_r {r} and "
            f"--lora_alpha {alpha:g}; give --lora_r {found[0]} --lora_alpha {found[1]:g}"
        )
    return OfficialCheckpoint(Path(path), ("projector", "llm"), "")
