"""Merges LoRA into a base of any type, layer by layer in float32, without holding the base in float32."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from voxray.models.adapters.lora import is_lora_tensor
from voxray.models.adapters.tied_weights import untie
from voxray.models.hf_files import unwrap_peft
from voxray.models.parts.layer_units import LayerUnit, around_forward, find_units, is_single_layer
from voxray.models.safetensors_files import LazyTensor

MergeLayers = Mapping[str, LoraLayer]
"""{name in the base: layer with LoRA to merge}."""


@contextmanager
def in_float32(model: Any, layers: MergeLayers | None = None) -> Iterator[None]:
    """Within this context a model computes in float32, whatever the type of its weights.

    Only one transformer layer at a time, or the token embeddings or the output layer, is held in float32.

    Args:
        layers: Layers that compute with merged weights.
    """
    base = unwrap_peft(model)
    merged = set((layers or {}).values())
    large = [unit for unit in find_units(model) if _is_large(unit, base)]
    in_large = {parameter for unit in large for parameter in unit.parameters}
    rest = LayerUnit((base,), tuple(parameter for parameter in base.parameters() if parameter not in in_large))
    in_units = {module for unit in large for layer in unit.modules for module in layer.modules()}
    hooks = []
    with ExitStack() as stack:
        stack.enter_context(_converted(rest, merged - in_units))
        for unit in large:
            inside = {layer for module in unit.modules for layer in module.modules()}
            hooks += around_forward(unit, partial(_converted, unit, merged & inside))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _is_large(unit: LayerUnit, base: Any) -> bool:
    """Whether a unit is a transformer layer, the token embeddings or the output layer, and not another single layer."""
    module = unit.modules[0]
    return not is_single_layer(module) or module is base.get_output_embeddings()


@contextmanager
def _converted(unit: LayerUnit, layers: set[Any]) -> Iterator[None]:
    """Within this context a unit has float32 weights, and some of its layers merged ones."""
    stored = {parameter: parameter.data for parameter in unit.parameters}
    for parameter, data in stored.items():
        parameter.data = data.float() if data.is_floating_point() else data
    for layer in layers:
        layer.merge(safe_merge=True, adapter_names=["default"])
    try:
        yield
    finally:
        for layer in layers:
            layer.merged_adapters.clear()
        for parameter, data in stored.items():
            parameter.data = data


def merged_tensors(base: Any, layers: MergeLayers, dtype: torch.dtype) -> list[LazyTensor]:
    """The weights of a base in one type, merged when they are written, under the names that its files have.

    Args:
        layers: All layers of the base that have LoRA.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors: dict[str, LazyTensor] = {}
    known: set[int] = set()
    for name, tensor in base.state_dict(keep_vars=True).items():
        if is_lora_tensor(name) or id(tensor) in known:  # tied weights are stored once
            continue
        known.add(id(tensor))
        module, _, attribute = name.rpartition(".")
        layer = layers.get(module.removesuffix(".base_layer")) if attribute == "weight" else None
        target = dtype if tensor.is_floating_point() else tensor.dtype
        compute = partial(_merged_weight, layer, target) if layer else partial(_as_type, tensor, target)
        clean = name.replace(".base_layer.", ".")
        tensors[clean] = LazyTensor(clean, tuple(tensor.shape), target, compute)
    placeholders = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    names = {id(tensor): name for name, tensor in placeholders.items()}
    on_disk = revert_weight_conversion(base, placeholders)
    return [
        LazyTensor(name, *(getattr(tensors[names[id(tensor)]], field) for field in ("shape", "dtype", "compute")))
        for name, tensor in on_disk.items()
    ]


@torch.no_grad()
def merge_into_base(model: PeftModel) -> Any:
    """Add LoRA to the weights of its base, in float32, and return the base. The weights keep their type."""
    base: Any = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    untie(base, {f"{name}.base_layer.weight" for name in layers})
    for layer in layers.values():
        weight: Any = layer.get_base_layer().weight
        weight.data = _merged_weight(layer, weight.dtype)
    return model.unload()


def _as_type(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(dtype)


def _merged_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight of a layer with its LoRA added in float32."""
    weight = layer.get_base_layer().weight
    with _converted(LayerUnit((layer,), (weight,)), {layer}):
        return weight.detach().to(dtype)
