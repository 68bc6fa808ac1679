"""Weights that are sharded over the workers: by which modules, in which type, and how validation runs with them.

A unit is a module whose weights the workers gather together just before its forward pass, and free after it. All
workers have to gather the same units in the same order. In training they do, because every worker makes the same
passes. In a validation the workers answer different rows in different numbers of passes, so they take turns (see
``OwnPasses``).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from voxray.models.adapters.lora import PEFT_PREFIX, quantized_layers
from voxray.models.interface import ModelFamily
from voxray.models.parts.layer_units import LayerUnit
from voxray.models.parts.quantize import quantization_config, stabilize_quantized_layers

TURN_TIMEOUT = timedelta(hours=2)
"""Longest time that a worker waits for the passes of another."""


def use_4bit_layers(base: Any, family: ModelFamily, dtype: torch.dtype) -> None:
    """Replace the layers that ``--quantize 4bit`` stores in 4 bits, without quantizing their weights yet.

    ``convert`` quantizes one after the other, so that no worker holds all of them.

    Args:
        dtype: Type of the computation.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    config = quantization_config("4bit", dtype, ())
    for name, module in list(quantized_layers(base, family)):
        kind = {"quant_type": config.bnb_4bit_quant_type, "compress_statistics": config.bnb_4bit_use_double_quant}
        with torch.device("meta"):
            layer = Linear4bit(module.in_features, module.out_features, False, dtype, **kind)
        layer.weight = Params4bit(module.weight.data, **kind)
        layer.weight.module, layer.bias = layer, module.bias
        base.set_submodule(name, layer.train(module.training))
    base.is_loaded_in_4bit = True  # PEFT chooses its LoRA layers by it
    stabilize_quantized_layers(base)


def compute_dtypes(
    model: torch.nn.Module, family: ModelFamily, model_id: str, dtype: torch.dtype
) -> dict[torch.nn.Parameter, torch.dtype]:
    """{parameter of the base: the type that it has in a run with ``dtype``}, whatever type it was read in."""
    targets = _types_by_name(family, model_id, dtype)
    names = {name: name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".") for name, _ in model.named_parameters()}
    return {tensor: targets[names[name]] for name, tensor in model.named_parameters() if names[name] in targets}


@lru_cache(maxsize=1)  # for LoRA's initial weights, and for the engine
def _types_by_name(family: ModelFamily, model_id: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
    return {name: each.dtype for name, each in family.build_on_meta(model_id, dtype=dtype).named_parameters()}


@contextmanager
def shown_in_types(dtypes: Mapping[torch.nn.Parameter, torch.dtype]) -> Iterator[None]:
    """Within this context parameters have the types of the training, and no values.

    PEFT rounds the initial weights of LoRA to the type of the base's weights.
    """
    stored = {parameter: parameter.data for parameter in dtypes}
    for parameter, dtype in dtypes.items():
        shown = torch.uint8 if needs_quantizing(parameter) else dtype
        parameter.data = torch.zeros((), dtype=shown).expand(parameter.shape)
    try:
        yield
    finally:
        for parameter, data in stored.items():
            parameter.data = data


def needs_quantizing(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is to be stored in 4 bits and is not yet."""
    return not getattr(parameter, "bnb_quantized", True)  # of bitsandbytes' Params4bit


def convert(parameter: torch.nn.Parameter, device: torch.device, dtype: torch.dtype | None) -> None:
    """Move a parameter to its device and type, in place. A weight for 4 bits is quantized there."""
    parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None).contiguous()
    if needs_quantizing(parameter):
        parameter._quantize(device)  # type: ignore[attr-defined]


class OwnPasses:
    """Lets every worker run a model with sharded weights on its own, though all workers gather a unit together.

    Before the forward pass of a unit, a worker announces the unit's number. The lowest number of all workers comes
    first: the workers that announced it compute with the unit, and the others only take part in gathering it. A worker
    without passes left takes part until all are done. Workers that wait at the same unit go on together, so passes of
    the same kind share their gathering.

    Args:
        units: In the order of a forward pass, as far as there is one. Any order is correct.
        take_part: Gathers the weights of a unit and frees them.
    """

    def __init__(self, units: list[LayerUnit], take_part: Callable[[LayerUnit], None]) -> None:
        self.units, self._take_part = units, take_part
        self._group = dist.new_group(backend="gloo", timeout=TURN_TIMEOUT)  # on the CPU, so no GPU is waited for

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within this context a worker may run the model any number of times. It must not train or communicate."""
        hooks = [
            unit.modules[0].register_forward_pre_hook(self._before(number), prepend=True)
            for number, unit in enumerate(self.units)
        ]
        try:
            yield
            self._wait_for_turn(len(self.units))  # not after an error, which ends all workers
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, number: int) -> Callable[..., None]:
        def announce(module: torch.nn.Module, inputs: Any) -> None:
            self._wait_for_turn(number)

        return announce

    def _wait_for_turn(self, number: int) -> None:
        while True:
            lowest = torch.tensor(number)
            dist.all_reduce(lowest, dist.ReduceOp.MIN, group=self._group)
            if (first := int(lowest)) == number:
                return
            self._take_part(self.units[first])
