"""A model with a share of its LoRA, or with none of it: between the base and what was trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer

from voxray.core.errors import SettingsError
from voxray.models.adapters.lora import is_lora_tensor, trainable_parameters
from voxray.models.adapters.read_files import tensor_names


@contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """Within this context a model computes what its base computes, in eval mode."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    training = [module for module in model.modules() if module.training]
    model.eval()
    for layer in layers:  # PEFT's disable_adapter would make LoRA trainable afterwards that this run keeps frozen
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        for module in training:
            module.training = True


def check_base_is_there(model: Any, flag: str) -> None:
    """Check that a model in training still holds its base.

    Raises:
        SettingsError: Other weights than LoRA train.
    """
    others = sorted(name for name, _ in trainable_parameters(model) if not is_lora_tensor(name))
    if others:
        raise SettingsError(f"{flag}: {others[0]} trains as a whole, so there is no base left to compare with")


def scale_lora(model: Any, adapter: Path, flag: str, scale: float) -> None:
    """Multiply what LoRA adds to the weights by a factor.

    Args:
        adapter: Folder that it was loaded from.
        flag: The flag with its value, for messages.
        scale: 0 gives the base, 1 what was trained.
    Raises:
        SettingsError: The adapter holds other weights than LoRA, or DoRA, which does more than add to the weights.
    """
    others = [name for name in tensor_names(adapter) if not is_lora_tensor(name)]
    if others:
        raise SettingsError(f"{flag}: {adapter} holds {min(others)} as a whole; only LoRA can be scaled")
    config: Any = model.peft_config["default"]
    if config.use_dora:
        raise SettingsError(f"{flag}: DoRA changes the length of the weights, which cannot be scaled")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: value * scale for name, value in module.scaling.items()}
