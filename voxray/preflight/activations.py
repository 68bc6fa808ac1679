"""Memory of the tensors that a forward pass saves for the backward pass, computed per module from shapes alone.

Autograd saves the tensors that each operation's gradient needs. A frozen Linear needs only its weights. So a layer of a
LoRA run saves the inputs of its LoRA branches, norms and activation function, and attention's queries, keys, values and
outputs. Each rule below states what its module saves; ``tests/preflight`` compares their sum with the measurements of
PyTorch's allocator.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from voxray.models.adapters.lora import find_role
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import ModelFamily
from voxray.models.parts.logmel_windows import ENCODER_STRIDE
from voxray.preflight.shapes import ComputeConfig, PackShape

FLOAT32 = 4
OUTPUT_LAYERS = ("lm_head", "proj_out")
LAYER = re.compile(r"(.*\.layers?\.\d+)\.")


@dataclass
class ActivationBytes:
    """Activation memory of one role, in bytes.

    Attributes:
        until_backward: Saved until the backward pass.
        recomputed: Saved by the largest layer that is recomputed in the backward pass, while it is recomputed.
        recomputed_in_all: The same of all layers together, one after the other.
        working: Peak of temporary gradients in the backward pass of one layer.
    """

    until_backward: int = 0
    recomputed: int = 0
    recomputed_in_all: int = 0
    working: int = 0


class ActivationCounter:
    """Counts the activation memory of a model on the meta device.

    Args:
        model: The model with LoRA, in the train and eval modes of training (see ``recipes.build_model``).
        front_end: Provides the number of positions per window.
    """

    def __init__(self, model: Any, family: ModelFamily, front_end: FrontEnd, config: ComputeConfig) -> None:
        self._model, self._family, self._front_end, self._config = model, family, front_end, config
        order = list(family.roles)
        trained = {find_role(name, family) for name, weight in model.named_parameters() if weight.requires_grad}
        first = min((order.index(role) for role in trained), default=len(order))
        self._roles_with_gradient = set(order[first:])  # gradients flow through all roles after the first trained one
        self._names = family.layer_names
        self._shared = {name: group for group in self._names.shared_inputs for name in group}
        base_config = unwrap_peft(model).config
        self._encoder_positions = family.encoder_layer_positions(base_config, front_end)
        self._projector_positions = family.projector_positions(base_config, front_end)
        self._cross_attention_frames = family.cross_attention_frames(base_config, front_end)
        self._modules = [(name, module) for name, module in model.named_modules() if ".lora_" not in name]
        self._checkpointed = {
            name: module
            for name, module in self._modules
            if getattr(module, "gradient_checkpointing", False) and module.training and LAYER.match(name + ".")
        }

    def count(self, shape: PackShape) -> dict[str, ActivationBytes]:
        """Activation memory of a pack by role, in the order of the forward pass."""
        layers: dict[tuple[str, str], int] = defaultdict(int)
        by_role = {role: ActivationBytes() for role in self._family.roles if role in self._roles_with_gradient}
        counted: set[tuple[str, str]] = set()
        for name, module in self._modules:
            role = find_role(name, self._family)
            if role not in by_role:
                continue
            layer = LAYER.match(name + ".")
            layers[role, layer[1] if layer else ""] += self._saved_bytes(name, module, role, shape, counted)
            by_role[role].working = max(by_role[role].working, self._working_bytes(name, module, role, shape))
        for (role, layer), num_bytes in layers.items():
            if layer in self._checkpointed:
                by_role[role].recomputed = max(by_role[role].recomputed, num_bytes)
                by_role[role].recomputed_in_all += num_bytes
                num_bytes = self._positions(layer, role, shape) * _width(self._checkpointed[layer]) * self._size(layer)
            by_role[role].until_backward += num_bytes
        return by_role

    def step_flops(self, shape: PackShape) -> float:
        """Floating-point operations of the Linear layers in a forward and a backward pass, two per product."""
        total = 0.0
        for name, module in self._modules:
            role = find_role(name, self._family)
            if not isinstance(module, torch.nn.Linear) or name.endswith(OUTPUT_LAYERS):
                continue
            positions = self._input_positions(name, self._positions(name, role, shape), shape)
            passes = 1 + (role in self._roles_with_gradient) * (1 + self._config.grad_ckpt) + _trains(module)
            total += 2 * passes * positions * module.weight.numel()
        return total

    def _size(self, name: str) -> int:
        """Bytes per number in a module."""
        is_float32 = find_role(name, self._family) in self._family.float32_roles
        return FLOAT32 if is_float32 else self._config.dtype.itemsize

    def _positions(self, name: str, role: str, shape: PackShape) -> int:
        """Number of positions that a module processes."""
        if role == self._family.encoder_role:
            return shape.num_windows * self._encoder_positions
        if role != self._family.projector_role:
            return shape.num_tokens
        if name.endswith(self._names.encoder_norms):
            return shape.num_windows * self._front_end.encoder_positions
        return shape.num_windows * self._projector_positions

    def _saved_bytes(self, name: str, module: Any, role: str, shape: PackShape, counted: set[tuple[str, str]]) -> int:
        """Bytes that a module saves itself, without its submodules."""
        positions, kind = self._positions(name, role, shape), type(module).__name__
        if isinstance(module, LoraLayer):
            inputs = self._input_positions(name, positions, shape)
            saved = self._lora(name, module, inputs, counted)
            return saved + (self._input(name, module, inputs, counted) if self._is_8bit(name, role) else 0)
        if isinstance(module, torch.nn.Linear):
            if not (_trains(module) or (self._is_8bit(name, role) and not name.endswith(".base_layer"))):
                return 0
            return self._input(name, module, self._input_positions(name, positions, shape), counted)
        if kind.endswith("RMSNorm"):  # the input in float32, a scale per position; if trained also the normalised input
            width = module.weight.numel()
            return positions * (FLOAT32 * (width + 1) + (self._size(name) * width if _trains(module) else 0))
        if isinstance(module, torch.nn.LayerNorm):  # the input, mean and deviation
            return positions * (module.normalized_shape[0] * self._size(name) + 2 * FLOAT32)
        if kind.endswith("Attention") and hasattr(module, "k_proj"):
            return self._attention(name, module, positions, role, shape)
        if hasattr(module, "query") and hasattr(module, "key"):  # Q-Former: queries, outputs, keys and values
            inputs = self._input_positions(f"{name}.key", positions, shape)
            return 2 * (positions + inputs) * module.query.out_features * self._size(name)
        if hasattr(module, "gate_proj"):  # the gate before and after its activation, and the other factor
            return 3 * positions * module.gate_proj.out_features * self._size(name)
        for first in ("fc1", "linear_1", "linear1"):  # the input of the activation
            if hasattr(module, first):
                return positions * getattr(module, first).out_features * self._size(name)
        if hasattr(module, "pointwise_conv1"):  # the gate and its factor, the inputs of batch norm and activation
            return 4 * positions * module.pointwise_conv1.in_channels * self._size(name)
        if isinstance(module, torch.nn.Conv1d) and _trains(module):  # the input, and that of GELU after it
            before = positions if LAYER.match(name + ".") else positions * ENCODER_STRIDE
            after = before // (module.stride[0] if module.in_channels == module.out_channels else 1)
            return (before * module.in_channels + after * module.out_channels) * self._size(name)
        return 0

    def _working_bytes(self, name: str, module: Any, role: str, shape: PackShape) -> int:
        """Peak of the gradients in the backward pass of a layer's MLP, minus the memory that is freed by then.

        The peak is at the activation before the last Linear: the gradients of its output and its input and, in a gated
        MLP, of the other factor. The residual stream has two gradients. The saved input of the last Linear is freed. In
        16 bits the gradient of a LoRA branch's input is briefly float32.
        """
        positions = self._positions(name, role, shape)
        first, last, factors = next(
            (names for names in self._names.mlps if hasattr(module, names[0]) and hasattr(module, names[1])),
            ("", "", 0),
        )
        if not first:
            return 0
        last_layer = getattr(module, last)
        inner, outer = getattr(module, first).out_features, last_layer.out_features
        freed = self._saved_bytes(f"{name}.{last}", last_layer, role, shape, set())
        lora_gradient = FLOAT32 * inner if self._size(name) < FLOAT32 and isinstance(last_layer, LoraLayer) else 0
        return max(0, positions * ((factors * inner + 2 * outer) * self._size(name) + lora_gradient) - freed)

    def _is_8bit(self, name: str, role: str) -> bool:
        """Whether a layer is quantised to 8 bits, which saves its input although its weights are frozen."""
        return self._config.quantize == "8bit" and role in self._family.quantized and not name.endswith(OUTPUT_LAYERS)

    def _input_positions(self, name: str, positions: int, shape: PackShape) -> int:
        """Number of positions that a layer reads; keys and values of cross-attention read the encoder's outputs."""
        return shape.num_windows * self._cross_attention_frames if self._reads_encoder(name) else positions

    def _reads_encoder(self, name: str) -> bool:
        """Whether a layer computes keys or values of cross-attention."""
        last = name.rpartition(".")[2]
        return any(f"{module}." in name and last in (key, value) for module, key, value in self._names.cross_attention)

    def _lora(self, name: str, layer: Any, positions: int, counted: set[tuple[str, str]]) -> int:
        """A LoRA branch saves the inputs of A (after dropout, in float32) and of B."""
        dropout = next(iter(layer.lora_dropout.values()))
        width, rank = layer.in_features, next(iter(layer.r.values()))
        saved = positions * rank * FLOAT32
        if getattr(dropout, "p", 0) and dropout.training:
            # the output and the mask, which has the input's type on a CPU and one byte per number on a GPU
            saved += positions * width * (FLOAT32 + (1 if self._config.on_gpu else FLOAT32))
        elif self._size(name) < FLOAT32:
            saved += positions * width * FLOAT32
        else:
            saved += self._input(name, layer, positions, counted)
        if any(layer.use_dora.values()):  # the outputs of base and branch, which the magnitude multiplies
            saved += 2 * positions * layer.out_features * FLOAT32
        return saved

    def _input(self, name: str, layer: Any, positions: int, counted: set[tuple[str, str]]) -> int:
        """The input of a layer; 0 if the same tensor is counted already."""
        parent, _, last = name.rpartition(".")
        if last in self._names.attention_outputs:
            return 0
        if self._reads_encoder(name):
            parent = ""  # all layers read the same encoder outputs
        key = (parent, f"{self._shared.get(last, last)} {positions}")
        if key in counted:
            return 0
        counted.add(key)
        return positions * layer.in_features * self._size(name)

    def _attention(self, name: str, module: Any, positions: int, role: str, shape: PackShape) -> int:
        """Queries and outputs, keys and values, one number per head and position, and the mask as numbers."""
        is_cross = any(module in name for module, *_ in self._names.cross_attention)
        inputs = self._input_positions(f"{name}.k_proj", positions, shape)
        masked = shape.masked and role != self._family.encoder_role and not is_cross
        width, kv_width = module.q_proj.out_features, module.k_proj.out_features
        if masked or not self._config.on_gpu:
            kv_width = width  # kernels without grouped-query attention need keys and values repeated
        saved = (2 * positions * width + 2 * inputs * kv_width) * self._size(name)
        saved += positions * _num_heads(module) * FLOAT32
        if hasattr(module, "relative_k_proj"):  # the weights of all pairs of positions, twice
            saved += 2 * positions * self._encoder_positions * _num_heads(module) * self._size(name)
        return saved + (shape.num_rows * shape.longest**2 * self._size(name) if masked else 0)


def _num_heads(module: Any) -> int:
    return int(getattr(module, "num_heads", None) or module.config.num_attention_heads)


def _trains(module: Any) -> bool:
    return bool(module.weight.requires_grad)


def _width(layer: Any) -> int:
    """Width of a layer's input."""
    width = getattr(layer, "hidden_size", None) or getattr(layer, "embed_dim", None)
    return int(width or next(iter(layer.parameters())).shape[-1])
