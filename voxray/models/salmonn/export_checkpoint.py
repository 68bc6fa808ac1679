"""What was trained, as a checkpoint that SALMONN's own code loads."""

from pathlib import Path
from typing import Any

from peft import PeftModel

from voxray.core.errors import RunError, SettingsError
from voxray.models.adapters.lora import add_lora
from voxray.models.interface import ModelFamily
from voxray.models.salmonn.audio_path import TRAINED
from voxray.models.salmonn.checkpoint import load_trained, official_name, official_tensors, read_trained, write_trained
from voxray.models.salmonn.folder import read_folder

CHECKPOINT = "salmonn_v1.pth"
ROLES = ("projector", "llm")


def write_official(model: Any, folder: Path, model_id: str) -> tuple[Path, int]:
    """Write a model's adapter as ``salmonn_v1.pth``.

    Args:
        model: Base and adapter.
        model_id: The base.
    Returns:
        The file, and how many tensors it holds.
    Raises:
        RunError: The base has LoRA of its own in the language model, which the file could not hold as well.
        SettingsError: The adapter is of a kind that SALMONN does not know.
    """
    config: Any = model.peft_config["default"] if isinstance(model, PeftModel) else None
    if config is None or config.use_dora or config.use_rslora:
        raise SettingsError("--format official: SALMONN's code knows plain LoRA alone (--tuning lora)")
    base = read_folder(model_id)
    named = (base.parts or {}).get("checkpoint")
    if named and read_trained(named).lora_rank:
        raise RunError(f"--format official: {named}, which the base names, holds LoRA of its own; train on with --ckpt")
    kept = official_tensors(
        (name, weight)
        for name, weight in model.named_parameters()
        if ".lora_" in name or official_name(name).split(".")[0] in TRAINED
    )
    settings = {
        "lora": True,
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
    }
    settings |= {"prompt_template": base.prompt_template, "end_sym": base.end_sym}
    settings |= {"num_speech_query_token": base.num_query}
    settings |= {"second_per_window": base.seconds_per_window, "second_stride": base.seconds_per_stride}
    write_trained(kept, folder / CHECKPOINT, settings)
    return folder / CHECKPOINT, len(kept)


def read_official_model(base: Any, family: ModelFamily, path: Path) -> Any:
    """A plain base with what ``write_official`` wrote, in eval mode."""
    trained = read_trained(path)
    alpha = float(trained.settings["lora_alpha"])
    layers = trained.lora_layers
    model = add_lora(base, family, ROLES, model_id="", r=trained.lora_rank, alpha=alpha, dropout=0.0, targets=layers)
    load_trained(model, trained)
    return model.eval()
