"""What a forward pass keeps for the backward pass, module by module, from shapes alone.

Autograd keeps what the gradient of each operation needs. Of a frozen Linear that is nothing but its weights, so a layer
of a LoRA run keeps the inputs of its LoRA branches, of its norms, of its activation function, and what attention wants:
queries, keys, values, outputs. Every rule below names what its module keeps; ``tests/preflight`` holds their sum
against what PyTorch's allocator says.

Letters of the comments: T tokens, D width, I inner width of the MLP, H heads, B rows, L tokens of the longest row.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from voxray.models.adapters.lora import find_role
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import FrontEnd, ModelFamily
from voxray.models.parts.logmel_windows import ENCODER_STRIDE
from voxray.preflight.shapes import Computing, PackShape

FLOAT32 = 4
SHARED_INPUTS = (
    {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention"}
    | dict.fromkeys(("gate_proj", "up_proj"), "mlp")
    | dict.fromkeys(("query", "key", "value"), "attention")
)
"""Layers that read the same tensor, by what they are part of."""
KEPT_ANYWAY = ("o_proj", "out_proj")
"""Layers whose input is the output of attention, which attention keeps itself."""
ENCODER_NORMS = ("ln_speech", "ln_audio")
"""Of SALMONN: norms of its encoders' outputs, which belong to what trains."""
OUTPUT_LAYERS = ("lm_head", "proj_out")
MLPS = (("gate_proj", "down_proj", 3), ("fc1", "fc2", 2), ("linear_1", "linear_2", 2))
"""First and last layer of an MLP, and how many gradients as wide as its inside there are at a time."""
LAYER = re.compile(r"(.*\.layers?\.\d+)\.")


@dataclass
class ActivationBytes:
    """Bytes that the forward pass of one role leaves behind.

    Attributes:
        until_backward: Kept until the backward pass.
        recomputed: Of the largest layer that is computed again in the backward pass, all that it keeps then.
        working: What the backward pass of one layer needs beside that, at its widest.
    """

    until_backward: int = 0
    recomputed: int = 0
    working: int = 0


class ActivationCounter:
    """Counts what is kept of a model's outline.

    Args:
        model: With what trains in it, in the modes of training (see ``recipes.build``).
        front_end: Says how many positions a window has.
    """

    def __init__(self, model: Any, family: ModelFamily, front_end: FrontEnd, how: Computing) -> None:
        self._model, self._family, self._front_end, self._how = model, family, front_end, how
        order = list(family.roles)
        trained = {find_role(name, family) for name, weight in model.named_parameters() if weight.requires_grad}
        first = min((order.index(role) for role in trained), default=len(order))
        self._with_gradient = set(order[first:])  # gradients pass through everything behind what trains first
        base = unwrap_peft(model)
        # of SALMONN: what its Q-Former makes of a window, and how many frames each of these reads
        self._queries = getattr(base.config, "positions_per_clip", 0)
        self._frames_read = base.config.window_frames if self._queries else 0
        self._modules = [(name, module) for name, module in model.named_modules() if ".lora_" not in name]
        self._checkpointed = {
            name: module
            for name, module in self._modules
            if getattr(module, "gradient_checkpointing", False) and module.training and LAYER.match(name + ".")
        }

    def kept(self, shape: PackShape) -> dict[str, ActivationBytes]:
        """What a pack of some shape leaves behind, by role, in the order of computing."""
        layers: dict[tuple[str, str], int] = defaultdict(int)
        found = {role: ActivationBytes() for role in self._family.roles if role in self._with_gradient}
        seen: set[tuple[str, str]] = set()
        for name, module in self._modules:
            role = find_role(name, self._family)
            if role not in found:
                continue
            layer = LAYER.match(name + ".")
            layers[role, layer[1] if layer else ""] += self._of_module(name, module, role, shape, seen)
            found[role].working = max(found[role].working, self._working(name, module, role, shape))
        for (role, layer), num_bytes in layers.items():
            if layer in self._checkpointed:
                found[role].recomputed = max(found[role].recomputed, num_bytes)
                num_bytes = self._tokens(layer, role, shape) * _width(self._checkpointed[layer]) * self._size(layer)
            found[role].until_backward += num_bytes
        return found

    def _size(self, name: str) -> int:
        """Bytes of a number; what SALMONN trains between its encoders and the language model stays float32."""
        whole = self._queries and find_role(name, self._family) == "projector"
        return FLOAT32 if whole else self._how.dtype.itemsize

    def _tokens(self, name: str, role: str, shape: PackShape) -> int:
        """Positions that a module works on."""
        if role == "encoder":
            return shape.num_windows * self._front_end.encoder_positions
        if role != "projector":
            return shape.num_tokens
        if name.endswith(ENCODER_NORMS):
            return shape.num_windows * self._front_end.encoder_positions
        return shape.num_windows * (self._queries or audio_positions(self._model, self._front_end))

    def _of_module(self, name: str, module: Any, role: str, shape: PackShape, seen: set[tuple[str, str]]) -> int:
        tokens, kind = self._tokens(name, role, shape), type(module).__name__
        if isinstance(module, LoraLayer):
            read = self._read_by(name, tokens, shape)
            kept = self._lora(name, module, read, seen)
            return kept + (self._input(name, module, read, seen) if self._in_8_bits(name, role) else 0)
        if isinstance(module, torch.nn.Linear):
            keeps = _trains(module) or (self._in_8_bits(name, role) and not name.endswith(".base_layer"))
            return self._input(name, module, self._read_by(name, tokens, shape), seen) if keeps else 0
        if kind.endswith("RMSNorm"):  # its input in float32 and a number a token; of trained weights also the result
            width = module.weight.numel()
            return tokens * (FLOAT32 * (width + 1) + (self._size(name) * width if _trains(module) else 0))
        if isinstance(module, torch.nn.LayerNorm):  # its input, mean and deviation
            return tokens * (module.normalized_shape[0] * self._size(name) + 2 * FLOAT32)
        if kind.endswith("Attention") and hasattr(module, "k_proj"):
            return self._attention(name, module, tokens, role, shape)
        if hasattr(module, "query") and hasattr(module, "key"):  # the same of a Q-Former, whose attention is plain
            read = self._read_by(f"{name}.key", tokens, shape)
            return 2 * (tokens + read) * module.query.out_features * self._size(name)
        if hasattr(module, "gate_proj"):  # gate before and after its activation, and what it is multiplied with
            return 3 * tokens * module.gate_proj.out_features * self._size(name)
        if hasattr(module, "fc1"):  # what the activation reads
            return tokens * module.fc1.out_features * self._size(name)
        if hasattr(module, "linear_1"):
            return tokens * module.linear_1.out_features * self._size(name)
        if isinstance(module, torch.nn.Conv1d) and _trains(module):  # its input, and what GELU reads after it
            before = tokens * ENCODER_STRIDE
            after = before // (module.stride[0] if module.in_channels == module.out_channels else 1)
            return (before * module.in_channels + after * module.out_channels) * self._size(name)
        return 0

    def _working(self, name: str, module: Any, role: str, shape: PackShape) -> int:
        """Gradients that are there at a time in the MLP of a layer, where they are widest, beyond what is free by then.

        Before the last Linear's input comes the activation: its gradient and that of what it reads, and of a gated MLP
        that of the other factor. The residual stream has two gradients. What the last Linear kept is free. In 16 bits
        the gradient that comes out of a LoRA branch is float32 for a moment.
        """
        tokens = self._tokens(name, role, shape)
        first, last, factors = next(
            (names for names in MLPS if hasattr(module, names[0]) and hasattr(module, names[1])), ("", "", 0)
        )
        if not first:
            return 0
        wide = getattr(module, first).out_features
        narrow = getattr(module, last).out_features
        freed = self._of_module(f"{name}.{last}", getattr(module, last), role, shape, set())
        in_float32 = (
            FLOAT32 * wide if self._size(name) < FLOAT32 and isinstance(getattr(module, last), LoraLayer) else 0
        )
        return max(0, tokens * ((factors * wide + 2 * narrow) * self._size(name) + in_float32) - freed)

    def _in_8_bits(self, name: str, role: str) -> bool:
        """Whether a layer is quantised in a way that keeps its input, though its weights are frozen."""
        return self._how.quantize == "8bit" and role in self._family.quantized and not name.endswith(OUTPUT_LAYERS)

    def _read_by(self, name: str, tokens: int, shape: PackShape) -> int:
        """Positions that a layer reads: keys and values of cross attention read the encoder's."""
        if not _reads_encoder(name):
            return tokens
        if self._queries:
            return tokens * self._frames_read
        return shape.num_windows * self._front_end.encoder_positions

    def _lora(self, name: str, layer: Any, tokens: int, seen: set[tuple[str, str]]) -> int:
        """Of a LoRA branch: what goes into A (after dropout, in float32) and into B."""
        dropout = next(iter(layer.lora_dropout.values()))
        width, rank = layer.in_features, next(iter(layer.r.values()))
        kept = tokens * rank * FLOAT32
        if getattr(dropout, "p", 0) and dropout.training:
            # the result, and the mask: of the input's own type on a CPU, a byte each on a GPU
            kept += tokens * width * (FLOAT32 + (1 if self._how.on_gpu else FLOAT32))
        elif self._size(name) < FLOAT32:
            kept += tokens * width * FLOAT32
        else:
            kept += self._input(name, layer, tokens, seen)
        if any(layer.use_dora.values()):  # the outputs of base and branch, which the magnitude is multiplied with
            kept += 2 * tokens * layer.out_features * FLOAT32
        return kept

    def _input(self, name: str, layer: Any, tokens: int, seen: set[tuple[str, str]]) -> int:
        """The input of a layer, unless something else keeps the same tensor."""
        above, _, last = name.rpartition(".")
        if last in KEPT_ANYWAY:
            return 0
        if _reads_encoder(name):
            above = ""  # all layers read the same outputs of the encoder
        key = (above, f"{SHARED_INPUTS.get(last, last)} {tokens}")
        if key in seen:
            return 0
        seen.add(key)
        return tokens * layer.in_features * self._size(name)

    def _attention(self, name: str, module: Any, tokens: int, role: str, shape: PackShape) -> int:
        """Queries and outputs, keys and values, a number for each head and token, and the mask as numbers."""
        crosses = "encoder_attn" in name
        read = self._read_by(f"{name}.k_proj", tokens, shape)
        masked = shape.masked and role != "encoder" and not crosses
        width, kv_width = module.q_proj.out_features, module.k_proj.out_features
        heads = _heads(module)
        if masked or not self._how.on_gpu:
            kv_width = width  # kernels without grouped queries get their keys and values repeated
        kept = (2 * tokens * width + 2 * read * kv_width) * self._size(name) + tokens * heads * FLOAT32
        return kept + (shape.num_rows * shape.longest**2 * self._size(name) if masked else 0)


def audio_positions(model: Any, front_end: FrontEnd) -> int:
    """Rows that what stands between encoder and language model works on, of one window."""
    first = next((module for name, module in model.named_modules() if name.endswith("linear_1")), None)
    if first is None:
        return front_end.encoder_positions
    return front_end.encoder_positions * front_end.encoder_dim // first.in_features


def _reads_encoder(name: str) -> bool:
    """Whether a layer makes keys or values of cross attention."""
    last = name.rpartition(".")[2]
    return ("encoder_attn." in name and last in ("k_proj", "v_proj")) or (
        "crossattention." in name and last in ("key", "value")
    )


def _heads(module: Any) -> int:
    found = getattr(module, "num_heads", None)
    return int(found if found else module.config.num_attention_heads)


def _trains(module: Any) -> bool:
    return bool(module.weight.requires_grad)


def _width(layer: Any) -> int:
    """Width of what goes into a layer."""
    found = getattr(layer, "hidden_size", None) or getattr(layer, "embed_dim", None)
    return int(found or next(iter(layer.parameters())).shape[-1])
