"""Adapters that change the tiny model's answers, built without training."""

from pathlib import Path

import torch
from conftest import TINY

from voxray.models.adapters.lora import add_lora, save_adapter, train_fully
from voxray.models.voxtral.family import Voxtral


def random_adapter(folder: Path, *, seed: int = 1, std: float = 0.03, tuning: str = "lora") -> Path:
    """Write an adapter with random weights, or the fully tuned weights of a base that has not changed. The answers of
    LoRA are still words, but different ones."""
    torch.manual_seed(seed)
    base = Voxtral().load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    roles = ("projector", "llm")
    if tuning == "full":
        save_adapter(train_fully(base, Voxtral(), roles), folder)
        return folder
    model = add_lora(base, Voxtral(), roles, model_id=TINY, r=4, alpha=64, dropout=0, tuning=tuning)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    save_adapter(model, folder)
    return folder
