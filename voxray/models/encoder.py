"""A model's audio encoder by itself: which weights it has, loading it alone, what stands in its place, and when not.

Shape letters: W windows, F mel bins, T mel frames of a window, P encoder frames of a window, D width.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from voxray.errors import RunError, SettingsError
from voxray.models.family import AudioPath, Family, weights_below


class PassThrough(torch.nn.Module):
    """Stands where the encoder was, and gives its stored outputs on."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, input_features: torch.Tensor, **options: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=input_features.to(self.dtype))


class Outputs(torch.nn.Module):
    """An encoder of which only the outputs are taken, for compiling: mel_WFT -> states_WPD."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, mel_WFT: torch.Tensor) -> torch.Tensor:
        return self.encoder(mel_WFT, return_dict=True).last_hidden_state


def hear_through(encoder: Any, run: AudioPath) -> None:
    """Let an encoder's outputs come from elsewhere, and free the memory of its layers.

    The encoder itself stays: transformers reads the strides of its convolutions when it divides a long recording.
    """
    from transformers.modeling_outputs import BaseModelOutput

    def forward(input_features: torch.Tensor, *args: Any, **options: Any) -> Any:
        return BaseModelOutput(last_hidden_state=run(input_features))  # type: ignore[arg-type]

    encoder.forward = forward
    encoder.layers = torch.nn.ModuleList()


def refuse_changed_outputs(family: Family, store: str, quantize: str, adapter: Path | None) -> None:
    """Refuse stored outputs of an encoder that, as it would be used, has others.

    Args:
        store: What feature shards hold.
        quantize: How many bits the base is held in.
        adapter: That is used, if any.
    Raises:
        SettingsError: With the reason.
    """
    from voxray.models.lora import roles_of_adapter  # peft takes seconds to import, which front ends do without

    if store != "encoder":
        return
    if adapter and "encoder" in roles_of_adapter(adapter, family):
        raise SettingsError(f"--store encoder: the adapter in {adapter} changes the encoder, so its outputs differ")
    if quantize != "none" and "encoder" in family.quantized:
        raise SettingsError(
            f"--store encoder: --quantize {quantize} holds the encoder of {family.name} in fewer bits, so its outputs "
            "differ; leave one of the two out"
        )


def weights_fingerprint(model_id: str, module: str) -> str:
    """Hash of one module's weights as they are stored."""
    return tensors_fingerprint(weights_below(model_id, module))


def tensors_fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of tensors and their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def load_alone(
    encoder_class: Any, config: Any, model_id: str, module: str, *, dtype: torch.dtype, device: torch.device
) -> Any:
    """Load one module of a model as the whole model's loading would.

    Args:
        encoder_class: The module's class in transformers.
        config: Its configuration.
        module: Its name within the model.
    Raises:
        RunError: Its weights are missing or do not fit the configuration.
    """
    encoder: Any = encoder_class._from_config(config, dtype=dtype)
    try:
        encoder.load_state_dict({name: tensor.to(dtype) for name, tensor in weights_below(model_id, module).items()})
    except RuntimeError as error:
        raise RunError(f"--model_id {model_id}: {' '.join(str(error).split())[:300]}") from None
    return encoder.to(device).requires_grad_(False).eval()


@torch.inference_mode()
def encode(encoder: Any, mel_WFT: torch.Tensor) -> torch.Tensor:
    """Outputs of an encoder for whole windows.

    Returns:
        states_WPD.
    """
    return encoder(mel_WFT, return_dict=True).last_hidden_state
