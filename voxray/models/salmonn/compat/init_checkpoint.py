"""Training that starts from an official SALMONN checkpoint (--ckpt)."""

from pathlib import Path

from peft import PeftModel

from voxray.models.adapters.init_adapter import PeftAdapter, check_rank_and_alpha
from voxray.models.interface import ModelFamily
from voxray.models.salmonn.compat.checkpoint import load_checkpoint, read_checkpoint


class OfficialCheckpoint(PeftAdapter):
    """A checkpoint of SALMONN's own trainer; ``folder`` is the path of the file."""

    @property
    def weights_file(self) -> Path:
        return self.folder

    def copy_into(self, model: PeftModel, family: ModelFamily) -> int:
        return load_checkpoint(model, read_checkpoint(self.folder)).num_loaded


def read_official(path: str, *, r: int, alpha: float) -> OfficialCheckpoint:
    """Read a checkpoint that training starts from, and check that it fits.

    Args:
        r, alpha: LoRA rank and alpha of the new training.
    Raises:
        RunError: It cannot be read.
        SettingsError: It was trained with another rank or alpha.
    """
    stored = read_checkpoint(path)
    if stored.lora_rank:
        check_rank_and_alpha(f"--ckpt {path}", (stored.lora_rank, float(stored.lora_alpha)), r, alpha)
    return OfficialCheckpoint(Path(path), ("projector", "llm"), "")
