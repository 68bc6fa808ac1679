"""A model's audio encoder by itself: which weights it has, loading it alone, what stands in its place, and when not.

Shape letters: W windows, F mel bins, T mel frames of a window, P encoder frames of a window, D width.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from voxray.core.errors import RunError, one_line
from voxray.models.hf_files import weights_below
from voxray.models.interface import AudioPath


class PassThrough(torch.nn.Module):
    """Stands where the encoder was, and gives its stored outputs on."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, input_features: torch.Tensor, **options: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=input_features.to(self.dtype))


class EncoderOutputs(torch.nn.Module):
    """An encoder of which only the outputs are taken, for compiling: mel_WFT -> states_WPD."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, mel_WFT: torch.Tensor) -> torch.Tensor:
        return self.encoder(mel_WFT, return_dict=True).last_hidden_state


def replace_audio_encoder(encoder: Any, run: AudioPath) -> None:
    """Let an encoder's outputs come from elsewhere, and free the memory of its layers.

    The encoder itself stays: transformers reads the strides of its convolutions when it divides a long recording.
    """
    from transformers.modeling_outputs import BaseModelOutput

    def forward(input_features: torch.Tensor, *args: Any, **options: Any) -> Any:
        return BaseModelOutput(last_hidden_state=run(input_features))  # type: ignore[arg-type]

    encoder.forward = forward
    encoder.layers = torch.nn.ModuleList()


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
        raise RunError(f"--model_id {model_id}: {one_line(error, 300)}") from None
    return encoder.to(device).requires_grad_(False).eval()


@torch.inference_mode()
def encode(encoder: Any, mel_WFT: torch.Tensor) -> torch.Tensor:
    """Outputs of an encoder for whole windows.

    Returns:
        states_WPD.
    """
    return encoder(mel_WFT, return_dict=True).last_hidden_state
