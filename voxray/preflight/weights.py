"""Bytes of a model's weights, by role and by how they are held, from its outline alone."""

from collections.abc import Iterator
from typing import Any

import torch

from voxray.models.adapters.lora import find_role
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import ModelFamily

BLOCK_4BIT = 64  # weights that share a scale (NF4)
BLOCK_SCALES = 256  # scales that share a scale, since they are quantised again
CODES_4BIT_BYTES = (16 + 256 + 1) * 4  # of every layer: the values of 4 and of 8 bits, and the scales' mean
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def weight_bytes(model: torch.nn.Module, family: ModelFamily, quantize: str = "none") -> dict[tuple[str, str], int]:
    """{(role, how they are held): bytes} of all parameters and buffers that train or not.

    Args:
        model: Its parameters may lie on the meta device.
        quantize: ``4bit`` and ``8bit`` count the layers that would be quantised as bitsandbytes stores them.
    """
    found: dict[tuple[str, str], int] = {}
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model, family)} if quantize != "none" else {}
    for name, tensor in _tensors(model):
        role, held = find_role(name, family), NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        num_bytes = tensor.numel() * tensor.element_size()
        if id(tensor) in layers:
            held, num_bytes = quantize, quantized_bytes(layers[id(tensor)], quantize)
        if tensor.requires_grad:
            held = f"{held}, trained"
        found[role, held] = found.get((role, held), 0) + num_bytes
    return found


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def quantized_layers(model: Any, family: ModelFamily) -> Iterator[tuple[str, torch.nn.Linear]]:
    """The layers that ``--quantize`` holds in fewer bits: all Linear ones of some roles, but not the output layer."""
    output = unwrap_peft(model)
    for name, module in model.named_modules():
        plain = isinstance(module, torch.nn.Linear) and module is not output.get_output_embeddings()
        if plain and find_role(name, family) in family.quantized and ".lora_" not in name:
            yield name, module


def quantized_bytes(layer: torch.nn.Linear, quantize: str) -> int:
    """Bytes of one layer's weights and their scales.

    4 bits (NF4, double quantised): half a byte a weight, a byte for the scale of every 64, and four for that of every
    256 scales. 8 bits (LLM.int8): a byte a weight and a float32 for every output.
    """
    count = layer.weight.numel()
    if quantize == "8bit":
        return count + 4 * layer.out_features
    blocks = -(-count // BLOCK_4BIT)
    return -(-count // 2) + blocks + 4 * -(-blocks // BLOCK_SCALES) + CODES_4BIT_BYTES
