"""Memory of a model's weights by role and storage type, computed from a model on the meta device."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from voxray.models.adapters.lora import find_role
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import ModelFamily

BLOCK_4BIT = 64  # weights per scale (NF4)
BLOCK_SCALES = 256  # scales per second-level scale (double quantisation)
TRAINED = ", trained"
CODES_4BIT_BYTES = (16 + 256 + 1) * 4  # per layer: the tables of 4-bit and 8-bit values, and the mean of the scales


def weight_bytes(model: torch.nn.Module, family: ModelFamily, quantize: str = "none") -> dict[tuple[str, str], int]:
    """Bytes of all parameters and buffers, as {(role, storage type): bytes}.

    Args:
        model: The model; its parameters may be on the meta device.
        quantize: ``4bit`` and ``8bit`` count quantisable layers in the size that bitsandbytes stores.
    """
    sizes: dict[tuple[str, str], int] = {}
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model, family)} if quantize != "none" else {}
    for name, tensor in _tensors(model):
        role, storage = find_role(name, family), str(tensor.dtype).removeprefix("torch.")
        num_bytes = tensor.numel() * tensor.element_size()
        if id(tensor) in layers:
            storage, num_bytes = quantize, quantized_bytes(layers[id(tensor)], quantize)
        if tensor.requires_grad:
            storage += TRAINED
        sizes[role, storage] = sizes.get((role, storage), 0) + num_bytes
    return sizes


def bytes_in_training(
    parameters: Iterable[torch.nn.Parameter], model: torch.nn.Module, family: ModelFamily, quantize: str
) -> int:
    """Bytes of some parameters of a model, those that ``quantize`` applies to in their quantized size."""
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model, family)} if quantize != "none" else {}
    return sum(
        quantized_bytes(layers[id(each)], quantize) if id(each) in layers else each.numel() * each.element_size()
        for each in parameters
    )


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def quantized_layers(model: Any, family: ModelFamily) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The layers that ``--quantize`` quantises: all Linear layers of some roles except the output layer."""
    output_layer = unwrap_peft(model).get_output_embeddings()
    for name, module in model.named_modules():
        is_inner = isinstance(module, torch.nn.Linear) and module is not output_layer
        if is_inner and find_role(name, family) in family.quantized and ".lora_" not in name:
            yield name, module


def quantized_bytes(layer: torch.nn.Linear, quantize: str) -> int:
    """Bytes of one layer's weights and their scales.

    4 bits (NF4, double quantised): half a byte per weight, one byte per scale of 64 weights, four bytes per scale of
    256 scales. 8 bits (LLM.int8): one byte per weight and one float32 per output.
    """
    count = layer.weight.numel()
    if quantize == "8bit":
        return count + 4 * layer.out_features
    blocks = -(-count // BLOCK_4BIT)
    return -(-count // 2) + blocks + 4 * -(-blocks // BLOCK_SCALES) + CODES_4BIT_BYTES
