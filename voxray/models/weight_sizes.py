"""Memory of a model's weights by role and storage type, computed from a model on the meta device."""

from collections.abc import Iterator
from pathlib import Path

import torch

from voxray.models.adapters.lora import PEFT_PREFIX, find_role, is_lora_tensor, quantized_layers
from voxray.models.adapters.read_files import tensor_names
from voxray.models.hf_files import stored_dtype
from voxray.models.interface import ModelFamily
from voxray.models.shared_conversion import shared_bytes

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
    quantized = {id(layer.weight) for _, layer in quantized_layers(model, family)} if quantize != "none" else set()
    stored = stored_bytes(model, family, quantize)
    for name, tensor in _tensors(model):
        role, num_bytes = find_role(name, family), stored[id(tensor)]
        storage = quantize if id(tensor) in quantized else str(tensor.dtype).removeprefix("torch.")
        if tensor.requires_grad:
            storage += TRAINED
        sizes[role, storage] = sizes.get((role, storage), 0) + num_bytes
    return sizes


def loaded_bytes(
    family: ModelFamily,
    model_id: str,
    *,
    dtype: torch.dtype,
    quantize: str = "none",
    role: str = "",
    adapter: str = "",
    merges_adapter: bool = False,
    num_processes: int = 1,
) -> int:
    """Memory that each process takes for the weights of a base, beside those that processes of a node share.

    Args:
        dtype: Type of the weights and of the computation.
        role: The only role to load; "" loads the whole base.
        adapter: Folder of an adapter. Weights of the base that it replaces are not shared.
        merges_adapter: Whether its LoRA is added to the weights of the base.
        num_processes: Processes of the job that load the whole base on a CPU (see ``shared_conversion``).
    Raises:
        RunError: The base has no readable configuration, or the adapter cannot be read.
    """
    can_share = quantize == "none" and not role
    is_shared = can_share and (stored_dtype(model_id) is dtype or shared_bytes(model_id, dtype, num_processes) > 0)
    names = tensor_names(Path(adapter)) if adapter else []
    replaced = {name.removeprefix(PEFT_PREFIX) for name in names if not is_lora_tensor(name)}
    if merges_adapter:
        lora = (name.removeprefix(PEFT_PREFIX) for name in names if is_lora_tensor(name))
        replaced |= {f"{name.partition('.lora_')[0]}.weight" for name in lora}
    if is_shared and not replaced:
        return 0
    model = family.build_on_meta(model_id, dtype=dtype)
    sizes, total = stored_bytes(model, family, quantize), 0
    for name, tensor in _tensors(model):
        is_private = name in replaced if is_shared else not role or find_role(name, family) == role
        total += sizes[id(tensor)] * is_private
    return total


def stored_bytes(model: torch.nn.Module, family: ModelFamily, quantize: str = "none") -> dict[int, int]:
    """{id of a parameter or buffer: bytes}, with those that ``quantize`` applies to in their quantized size."""
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model, family)} if quantize != "none" else {}
    sizes = {id(tensor): tensor.numel() * tensor.element_size() for _, tensor in _tensors(model)}
    return sizes | {key: quantized_bytes(layer, quantize) for key, layer in layers.items()}


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


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
