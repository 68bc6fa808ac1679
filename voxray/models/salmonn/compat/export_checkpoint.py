"""Export of trained weights as a checkpoint that SALMONN's own code loads."""

from pathlib import Path
from typing import Any

from peft import PeftModel

from voxray.core.errors import RunError, SettingsError
from voxray.models.adapters.lora import add_lora
from voxray.models.interface import ModelFamily
from voxray.models.salmonn.audio_path import TRAINED_MODULES
from voxray.models.salmonn.compat.checkpoint import (
    load_checkpoint,
    official_name,
    official_tensors,
    read_checkpoint,
    write_checkpoint,
)
from voxray.models.salmonn.config import SalmonnConfig

CHECKPOINT = "salmonn_v1.pth"
ROLES = ("projector", "llm")


def write_official(model: Any, folder: Path, base: SalmonnConfig) -> tuple[Path, int]:
    """Write a model's adapter as ``salmonn_v1.pth``.

    Args:
        model: Base with adapter.
        base: Configuration of the base.
    Returns:
        Path of the file and the number of tensors in it.
    Raises:
        RunError: The base names a checkpoint with LoRA, which the file could not hold as well.
        SettingsError: SALMONN's code does not support this kind of adapter.
    """
    config: Any = model.peft_config["default"] if isinstance(model, PeftModel) else None
    if config is None or config.use_dora or config.use_rslora:
        raise SettingsError("--format official: SALMONN's own code reads plain LoRA only (--tuning lora)")
    checkpoint = (base.parts or {}).get("checkpoint")
    if checkpoint and read_checkpoint(checkpoint).lora_rank:
        raise RunError(
            f"--format official: {checkpoint}, which the base names, holds LoRA of its own; train on with --ckpt"
        )
    tensors = official_tensors(
        (name, weight)
        for name, weight in model.named_parameters()
        if ".lora_" in name or official_name(name).split(".")[0] in TRAINED_MODULES
    )
    settings = {
        "lora": True,
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "prompt_template": base.prompt_template,
        "end_sym": base.end_sym,
        "num_speech_query_token": base.num_query,
        "second_per_window": base.seconds_per_window,
        "second_stride": base.seconds_per_stride,
    }
    write_checkpoint(tensors, folder / CHECKPOINT, settings)
    return folder / CHECKPOINT, len(tensors)


def load_official(base: Any, family: ModelFamily, path: Path) -> Any:
    """Load what ``write_official`` wrote into a base without adapter; returns the model in eval mode."""
    stored = read_checkpoint(path)
    options: dict[str, Any] = {"r": stored.lora_rank, "alpha": stored.lora_alpha, "targets": stored.lora_layers}
    model = add_lora(base, family, ROLES, model_id="", dropout=0.0, **options)
    load_checkpoint(model, stored)
    return model.eval()
