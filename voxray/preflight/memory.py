"""The memory that one training process needs, cause by cause, from shapes alone: no weights are loaded.

A run is at its fullest at one of five moments, which are told apart because different things are there at each: while a
frozen encoder hears the audio, when the loss has been computed, when the backward pass ends, when the optimizer takes
its step, and when a validation generates answers. What all of them share (weights, moments) is added once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from voxray.models.decoding import ROOM
from voxray.models.family import Family, FrontEnd
from voxray.models.few_rows import MIN_OUTPUTS
from voxray.models.lora import role_of
from voxray.preflight.activations import FLOAT32, Activations, Kept
from voxray.preflight.shapes import Computing, PackShape
from voxray.preflight.weights import quantized_layers, weight_bytes

GIB = 2**30
MOMENTS = 2  # AdamW's running means of gradients and of their squares
ENCODER_WIDTHS = 10  # of a frozen layer at work: its input and norm, and four times as wide before and after GELU


@dataclass(frozen=True)
class Entry:
    """A line of the table.

    Attributes:
        cause: What takes the memory.
        num_bytes: How much.
        at: Moment at which it is there; "" is always.
    """

    cause: str
    num_bytes: int
    at: str = ""


@dataclass(frozen=True)
class Need:
    """What one process needs.

    Attributes:
        entries: Of all moments.
    """

    entries: tuple[Entry, ...]

    @property
    def moments(self) -> dict[str, int]:
        """{moment: bytes there in all}, the always present included."""
        always = sum(entry.num_bytes for entry in self.entries if not entry.at)
        names = dict.fromkeys(entry.at for entry in self.entries if entry.at)
        return {name: always + sum(e.num_bytes for e in self.entries if e.at == name) for name in names}

    @property
    def peak_bytes(self) -> int:
        return max(self.moments.values(), default=sum(entry.num_bytes for entry in self.entries))

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name], default="")

    def always_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries if not entry.at)


@dataclass(frozen=True)
class Training:
    """What the need depends on beside the model.

    Attributes:
        grad_accum: Forward passes of a step; of several, gradients are there when the next one begins.
        num_workers: Processes; several put their gradients into one message.
        divided: Processes over which --strategy deepspeed divides gradients and moments; 1 for ddp.
        weights_divided: Likewise the weights (--zero_stage 3).
    """

    grad_accum: int = 1
    num_workers: int = 1
    divided: int = 1
    weights_divided: int = 1


class MemoryModel:
    """Counts what training a model's outline takes.

    Args:
        model: See ``Activations``.
    """

    def __init__(
        self, model: Any, family: Family, front_end: FrontEnd, how: Computing, training: Training = Training()
    ) -> None:
        self._model, self._family, self._front_end, self._how, self._training = model, family, front_end, how, training
        self._activations = Activations(model, family, front_end, how)
        self._weights = weight_bytes(model, family, how.quantize)
        self._trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = base.get_output_embeddings()
        self._vocabulary, self._head_width = head.weight.shape

    def of(self, shape: PackShape, validation: "PackShape | None" = None, new_tokens: int = 0) -> Need:
        """The need of a process whose largest pack has this shape.

        Args:
            validation: Prompts of the largest batch that a validation answers.
            new_tokens: Longest answer that it generates.
        """
        entries = [*self._always(), *self._training_step(shape)]
        if validation:
            entries += self._validation(validation, new_tokens)
        return Need(tuple(entry for entry in entries if entry.num_bytes))

    def _always(self) -> Iterable[Entry]:
        divided = self._training.weights_divided
        for (role, held), num_bytes in self._weights.items():
            yield Entry(f"{role}: weights, {held}", num_bytes // divided)
        moments = MOMENTS * FLOAT32 * self._trained // self._training.divided
        yield Entry("optimizer: AdamW's moments, float32", moments)

    def _training_step(self, shape: PackShape) -> Iterable[Entry]:
        how, training = self._how, self._training
        kept = self._activations.kept(shape)
        gradients = FLOAT32 * self._trained // training.divided
        unpacked = self._unpacked_weights()
        heard = self._hearing(shape)
        if heard:
            yield Entry("encoder: one layer at work", heard, "hearing")
        for role, num_bytes in kept.by_role.items():
            computed = "inputs of its layers, computed again later" if how.grad_ckpt else "activations"
            yield Entry(f"{role}: {computed}", num_bytes, "loss")
        yield Entry("logits, their loss and gradient", self._logits(shape), "loss")
        if training.grad_accum > 1:
            yield Entry("gradients of the passes before, float32", gradients, "loss")
        for role, num_bytes in kept.by_role.items():
            yield Entry(f"{role}: activations when backward begins", num_bytes, "backward")
        yield Entry("one layer computed again", kept.recomputed, "backward")
        yield Entry("gradients within one layer", self._within_layer(shape, kept), "backward")
        yield Entry("a layer's weights as numbers", unpacked, "backward")
        yield Entry("gradients, float32", gradients, "step")
        if training.num_workers > 1:
            yield Entry("gradients in one message", FLOAT32 * self._trained, "step")
        largest = max((weight.numel() for weight in self._model.parameters() if weight.requires_grad), default=0)
        yield Entry("AdamW at work on the largest weight", 2 * FLOAT32 * largest, "step")

    def _logits(self, shape: PackShape) -> int:
        """Float32 logits, their logarithms, the gradient of these; in 16 bits once more."""
        copies = 3 * FLOAT32
        return shape.num_answer_tokens * self._vocabulary * copies

    def _within_layer(self, shape: PackShape, kept: Kept) -> int:
        return kept.widest_layer // 4

    def _unpacked_weights(self) -> int:
        """4-bit weights are turned into numbers for each product, one layer at a time."""
        if self._how.quantize == "none":
            return 0
        sizes = [layer.weight.numel() for _, layer in quantized_layers(self._model, self._family)]
        return max(sizes, default=0) * self._how.dtype.itemsize

    def _hearing(self, shape: PackShape) -> int:
        """A frozen encoder's layers leave nothing behind, but one at a time needs room."""
        frozen = not any(
            weight.requires_grad and role_of(name, self._family) == "encoder"
            for name, weight in self._model.named_parameters()
        )
        positions = shape.num_windows * self._front_end.encoder_positions
        return ENCODER_WIDTHS * positions * self._front_end.encoder_dim * self._how.dtype.itemsize if frozen else 0

    def _validation(self, shape: PackShape, new_tokens: int) -> Iterable[Entry]:
        base = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        size, columns = self._how.dtype.itemsize, shape.longest + new_tokens + ROOM
        attentions = [
            m for n, m in base.named_modules() if hasattr(m, "k_proj") and role_of(n, self._family) != "encoder"
        ]
        own = sum(2 * m.k_proj.out_features for m in attentions)
        yield Entry("keys and values of the answers", shape.num_rows * columns * own * size, "validation")
        yield Entry("logits of one token", 2 * shape.num_rows * self._vocabulary * FLOAT32, "validation")
        if not self._how.on_gpu and size == FLOAT32 and self._vocabulary >= MIN_OUTPUTS:
            copy = self._vocabulary * self._head_width * FLOAT32
            yield Entry("output layer, laid out for few rows", copy, "validation")
        yield Entry("encoder: one layer at work", self._hearing(shape), "validation")
