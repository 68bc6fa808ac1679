"""Linear layers with 16-bit weights on CPUs without 16-bit arithmetic: their products are computed in float32.

PyTorch's own kernels convert every number again for every product there. Measured on a CPU with AVX2, 256 rows and a
layer of 3,072 x 3,072: 7.3 GFLOP/s in bfloat16, and 39 with weights that are converted once for all rows. A product of
a few rows is faster without it. The result is rounded to 16 bits once, as by PyTorch's kernels, but it is summed in
another order.

Shape letters: R rows, I inputs, O outputs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import linear

MIN_ROWS = 32
"""With fewer rows the conversion of the weights takes longer than it saves."""
WEIGHTS_AT_A_TIME = 1 << 24
"""Weights that are converted together, which limits the memory for them to 64 MiB."""
INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
"""{type: extensions of x86 CPUs that compute in it}."""


def has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether this CPU computes in a type; for CPUs other than x86 it is taken to."""
    capabilities = torch.cpu.get_capabilities()
    names = INSTRUCTIONS.get(dtype, ())
    return not names or "x86" not in str(capabilities.get("architecture")) or any(map(capabilities.get, names))


class Float32Products(torch.nn.Linear):
    """A frozen Linear with 16-bit weights."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() < MIN_ROWS * self.in_features or input.dtype != self.weight.dtype:
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            return _Product.apply(input, self.weight, self.bias)
        return _product(input, self.weight, self.bias)


def use_float32_products(model: torch.nn.Module) -> None:
    """Make frozen 16-bit Linear layers on a CPU compute in float32, if the CPU has no arithmetic of their type."""
    for module in model.modules():
        if type(module) is not torch.nn.Linear or module.weight.device.type != "cpu" or module.weight.requires_grad:
            continue
        if not has_arithmetic(module.weight.dtype):
            module.__class__ = Float32Products


class _Product(torch.autograd.Function):
    """The product of inputs that need a gradient. Its own formula keeps no converted weights for the backward pass."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight_OI)
        return _product(input, weight_OI, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (weight_OI,), [gradient] = ctx.saved_tensors, gradients
        total_RI = torch.zeros(gradient.numel() // gradient.shape[-1], weight_OI.shape[1])
        gradient_RO = gradient.reshape(-1, gradient.shape[-1])
        for outputs in _slices(weight_OI):
            total_RI.addmm_(gradient_RO[:, outputs].float(), weight_OI[outputs].float())
        return total_RI.to(weight_OI.dtype).view(*gradient.shape[:-1], weight_OI.shape[1]), None, None


def _product(input: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    input_RI, parts = input.reshape(-1, input.shape[-1]).float(), []
    for outputs in _slices(weight_OI):
        part_bias = None if bias is None else bias[outputs].float()
        parts.append(linear(input_RI, weight_OI[outputs].float(), part_bias).to(weight_OI.dtype))
    result_RO = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return result_RO.view(*input.shape[:-1], weight_OI.shape[0])


def _slices(weight_OI: torch.Tensor) -> Iterator[slice]:
    """Ranges of outputs whose weights are converted together."""
    step = max(1, WEIGHTS_AT_A_TIME // weight_OI.shape[1])
    for start in range(0, weight_OI.shape[0], step):
        yield slice(start, start + step)
