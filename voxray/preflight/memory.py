"""The memory that one training process needs, cause by cause, from shapes alone: no weights are loaded.

Different things are there at different moments, so they are told apart: while a frozen encoder hears the audio, when
the loss has been computed, while the backward pass goes through each part of the model and when it ends, when the
optimizer takes its step, and when a validation generates answers. The fullest of them decides. What is there always
(weights, AdamW's moments) is added once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from voxray.models.adapters.lora import find_role
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import FrontEnd, ModelFamily
from voxray.models.parts.cpu_lm_head import MIN_OUTPUTS
from voxray.models.parts.kv_cache import ROOM
from voxray.preflight.activations import FLOAT32, ActivationBytes, ActivationCounter
from voxray.preflight.shapes import Computing, PackShape
from voxray.preflight.weights import quantized_layers, weight_bytes

PEAK_PHASES = 2  # AdamW's running means of gradients and of their squares
ENCODER_WIDTHS = 12  # at work: first and last input, residual and norm, and four times as wide before and after GELU


@dataclass(frozen=True)
class MemoryEntry:
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
class MemoryNeed:
    """What one process needs.

    Attributes:
        entries: Of all moments.
    """

    entries: tuple[MemoryEntry, ...]

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
        model: See ``ActivationCounter``.
    """

    def __init__(
        self, model: Any, family: ModelFamily, front_end: FrontEnd, how: Computing, training: Training = Training()
    ) -> None:
        self._model, self._family, self._front_end, self._how, self._training = model, family, front_end, how, training
        self._activations = ActivationCounter(model, family, front_end, how)
        self._weights = weight_bytes(model, family, how.quantize)
        self._trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        base = unwrap_peft(model)
        head = base.get_output_embeddings()
        self._vocabulary, self._head_width = head.weight.shape
        names = {id(weight): name for name, weight in model.named_parameters()}
        self._head_role = find_role(names[id(head.weight)], family)
        self._head_gradient = FLOAT32 * head.weight.numel() if head.weight.requires_grad else 0

    def of(self, shape: PackShape, validation: "PackShape | None" = None, new_tokens: int = 0) -> MemoryNeed:
        """The need of a process whose largest pack has this shape.

        Args:
            validation: Prompts of the largest batch that a validation answers.
            new_tokens: Longest answer that it generates.
        """
        entries = [*self._always(), *self._training_step(shape)]
        if validation:
            entries += self._validation(validation, new_tokens)
        return MemoryNeed(tuple(entry for entry in entries if entry.num_bytes))

    def _always(self) -> Iterable[MemoryEntry]:
        divided = self._training.weights_divided
        for (role, held), num_bytes in self._weights.items():
            yield MemoryEntry(f"{role}: weights, {held}", num_bytes // divided)
        moments = PEAK_PHASES * FLOAT32 * self._trained // self._training.divided
        yield MemoryEntry("optimizer: AdamW's moments, float32", moments)

    def _training_step(self, shape: PackShape) -> Iterable[MemoryEntry]:
        kept = self._activations.kept(shape)
        gradients = self._gradients()
        earlier = gradients if self._training.grad_accum > 1 else {}
        yield MemoryEntry("encoder: one layer at work", self._hearing(shape), "hearing")
        computed = "inputs of its layers, computed again later" if self._how.grad_ckpt else "activations"
        for role, part in kept.items():
            yield MemoryEntry(f"{role}: {computed}", part.until_backward, "loss")
        yield MemoryEntry("logits, their loss and gradient", self._logits(shape), "loss")
        yield MemoryEntry("gradients of the passes before, float32", sum(earlier.values()), "loss")
        roles = list(kept)
        for number, role in enumerate(roles):  # what comes after a role has been gone through when its turn comes
            moment = f"backward through the {role}"
            for held in roles[: number + 1]:
                yield MemoryEntry(f"{held}: {computed}", kept[held].until_backward, moment)
            yield MemoryEntry(f"{role}: one layer computed again", kept[role].recomputed, moment)
            yield MemoryEntry(f"{role}: gradients within a layer", kept[role].working, moment)
            yield MemoryEntry("a layer's weights as numbers", self._unpacked_weights(), moment)
            there = earlier or {later: gradients.get(later, 0) for later in roles[number + 1 :]}
            yield MemoryEntry("gradients of weights, float32", sum(there.values()), moment)
            if role == self._head_role and not earlier:
                yield MemoryEntry("gradient of the output layer, float32", self._head_gradient, moment)
        yield from self._optimizer_step(gradients, kept)

    def _optimizer_step(self, gradients: dict[str, int], kept: dict[str, ActivationBytes]) -> Iterable[MemoryEntry]:
        total = sum(gradients.values())
        yield MemoryEntry("gradients, float32", total, "end of the backward pass")
        first = next(iter(kept.values()), ActivationBytes())
        yield MemoryEntry("the first layer's activations", first.recomputed + first.working, "end of the backward pass")
        yield MemoryEntry("gradients, float32", total, "optimizer step")
        if self._training.num_workers > 1:
            yield MemoryEntry("gradients in one message", FLOAT32 * self._trained, "optimizer step")
        largest = max((weight.numel() for weight in self._model.parameters() if weight.requires_grad), default=0)
        yield MemoryEntry("AdamW at work on the largest weight", 2 * FLOAT32 * largest, "optimizer step")

    def _gradients(self) -> dict[str, int]:
        """{role: bytes of its gradients}."""
        found: dict[str, int] = {}
        for name, weight in self._model.named_parameters():
            role = find_role(name, self._family)
            size = weight.numel() * FLOAT32 * weight.requires_grad // self._training.divided
            found[role] = found.get(role, 0) + size
        return found

    def _logits(self, shape: PackShape) -> int:
        """Float32 logits, their logarithms, the gradient of these; in 16 bits once more."""
        copies = 3 * FLOAT32
        return shape.num_answer_tokens * self._vocabulary * copies

    def _unpacked_weights(self) -> int:
        """4-bit weights are turned into numbers for each product, one layer at a time."""
        if self._how.quantize == "none":
            return 0
        sizes = [layer.weight.numel() for _, layer in quantized_layers(self._model, self._family)]
        return max(sizes, default=0) * self._how.dtype.itemsize

    def _hearing(self, shape: PackShape) -> int:
        """A frozen encoder's layers leave nothing behind, but one at a time needs room."""
        frozen = not any(
            weight.requires_grad and find_role(name, self._family) == "encoder"
            for name, weight in self._model.named_parameters()
        )
        positions = shape.num_windows * self._front_end.encoder_positions
        return ENCODER_WIDTHS * positions * self._front_end.encoder_dim * self._how.dtype.itemsize if frozen else 0

    def _validation(self, shape: PackShape, new_tokens: int) -> Iterable[MemoryEntry]:
        base = unwrap_peft(self._model)
        size, columns = self._how.dtype.itemsize, shape.longest + new_tokens + ROOM
        attentions = [
            m for n, m in base.named_modules() if hasattr(m, "k_proj") and find_role(n, self._family) != "encoder"
        ]
        own = sum(2 * m.k_proj.out_features for m in attentions)
        yield MemoryEntry("keys and values of the answers", shape.num_rows * columns * own * size, "validation")
        yield MemoryEntry("logits of one token", 2 * shape.num_rows * self._vocabulary * FLOAT32, "validation")
        if not self._how.on_gpu and size == FLOAT32 and self._vocabulary >= MIN_OUTPUTS:
            copy = self._vocabulary * self._head_width * FLOAT32
            yield MemoryEntry("output layer, laid out for few rows", copy, "validation")
        yield MemoryEntry("encoder: one layer at work", self._hearing(shape), "validation")
