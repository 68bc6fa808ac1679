"""Adapters that change the tiny model's answers, built without training."""

from pathlib import Path

import torch
from conftest import TINY

from voxray.models.adapters.lora import add_lora, save_adapter
from voxray.models.voxtral.family import Voxtral


def random_adapter(folder: Path, *, seed: int = 1, std: float = 0.03) -> Path:
    """Write an adapter with random weights. The answers are still words, but different ones."""
    torch.manual_seed(seed)
    base = Voxtral().load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    model = add_lora(base, Voxtral(), ("projector", "llm"), model_id=TINY, r=4, alpha=64, dropout=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    save_adapter(model, folder)
    return folder
