"""A model's audio encoder on its own: hash it, load it alone, run it, and replace it in the model.

Shape letters: W windows, F mel bins, T mel frames of a window, P encoder positions of a window, D width.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from voxray.core.content_hash import combined_hash
from voxray.core.errors import library_errors
from voxray.models.hf_files import module_weights, unwrap_peft
from voxray.models.interface import AudioPath

NAMES_WITHOUT_EFFECT = ("transformers_version", "_name_or_path", "architectures", "dtype")
"""Entries of a configuration that change no output."""


class EncoderMethods:
    """The encoder methods of ``ModelFamily``, for families whose audio encoder is one module of transformers.

    Attributes:
        encoder_name: Name of the encoder in the base's ``model`` and in its weight files.
    """

    encoder_name: str

    def encoder_class(self, model_id: str) -> tuple[Any, Any]:
        """The encoder's class in transformers, and its configuration in a base."""
        raise NotImplementedError

    def encoder_fingerprint(self, model_id: str) -> str:
        """Hash of the audio encoder's stored weights and its configuration."""
        weights = hash_tensors(module_weights(model_id, self.encoder_name)).hexdigest()
        return combined_hash([weights, config_hash(self.encoder_class(model_id)[1])])

    def load_encoder(self, model_id: str, *, dtype: torch.dtype, device: torch.device) -> Any:
        """Load the audio encoder alone, with the same weights that ``load_model`` gives it.

        Raises:
            RunError: Its weights are missing or do not fit the configuration.
        """
        encoder_class, config = self.encoder_class(model_id)
        return load_module(encoder_class, config, model_id, self.encoder_name, dtype=dtype, device=device)

    @torch.inference_mode()
    def encode(self, encoder: Any, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Run the encoder on whole windows; returns states_WPD."""
        return encoder(features_WFT, return_dict=True).last_hidden_state

    def skip_encoder(self, model: Any) -> None:
        """Make a model accept encoder outputs as ``input_features``, and free the encoder's memory."""
        base = unwrap_peft(model)
        setattr(base.model, self.encoder_name, PassThrough(base))


class PassThrough(torch.nn.Module):
    """Takes the encoder's place in a model and returns its stored outputs.

    Args:
        base: The model. Its type and device may change later.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple, because a module's attribute would become a part of it

    @property
    def dtype(self) -> torch.dtype:
        return self._base[0].dtype

    @property
    def device(self) -> torch.device:
        return self._base[0].device

    def forward(self, input_features: torch.Tensor, **options: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(last_hidden_state=input_features.to(self.dtype))


class EncoderOutputs(torch.nn.Module):
    """An encoder that returns a plain tensor, for compiling: mel_WFT -> states_WPD."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, mel_WFT: torch.Tensor) -> torch.Tensor:
        return self.encoder(mel_WFT, return_dict=True).last_hidden_state


def replace_audio_encoder(encoder: Any, module: Any, method: str, output: str, run: AudioPath) -> None:
    """Make a method that runs the encoder call ``run`` instead, and free the memory of the encoder's layers.

    The encoder module itself stays: transformers reads its convolutions' strides when it splits a long recording.

    Args:
        encoder: The encoder.
        module: Owner of the method.
        method: Name of the method, which takes the features as ``input_features``.
        output: Field of its result, a ``BaseModelOutputWithPooling``, that holds what ``run`` returns.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def replacement(input_features: torch.Tensor, *args: Any, **options: Any) -> Any:
        return BaseModelOutputWithPooling(**{output: run(input_features)})  # type: ignore[arg-type]

    setattr(module, method, replacement)
    encoder.layers = torch.nn.ModuleList()


def first_columns(count_W: torch.Tensor, length: int) -> torch.Tensor:
    """True in the first ``count`` of ``length`` columns of every row."""
    return torch.arange(length, device=count_W.device) < count_W[:, None]


def config_hash(config: Any) -> str:
    """Hash of the values of a configuration that differ from its class's defaults."""
    values = {name: value for name, value in config.to_diff_dict().items() if name not in NAMES_WITHOUT_EFFECT}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> Any:
    """SHA-256 object (see ``hashlib``) over tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest


def load_module(
    module_class: Any, config: Any, model_id: str, module: str, *, dtype: torch.dtype, device: torch.device
) -> Any:
    """Load one module of a model as loading the whole model would, frozen and in eval mode.

    Args:
        module_class: The module's class in transformers.
        config: Its configuration.
        module: Its name in the model.
    Raises:
        RunError: Its weights are missing or do not fit the configuration.
    """
    with library_errors(f"--model_id {model_id}: cannot load its {module}"):
        loaded: Any = module_class._from_config(config, dtype=dtype)
        loaded.load_state_dict({name: tensor.to(dtype) for name, tensor in module_weights(model_id, module).items()})
    return loaded.to(device).requires_grad_(False).eval()
