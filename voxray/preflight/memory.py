"""Predicts the memory of one training process by cause, from shapes alone, without loading weights.

Memory differs between the phases of training: the frozen encoder's forward pass, after the loss is computed, the
backward pass through each role, the end of the backward pass, the optimizer step, and validation. The peak is the
largest sum of a phase and the memory that is always in use (weights, AdamW's moments).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from voxray.models.adapters.lora import find_role, quantized_layers
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import ModelFamily
from voxray.models.parts.cpu_lm_head import MIN_OUTPUTS
from voxray.models.parts.kv_cache import CACHE_GROWTH
from voxray.models.parts.layer_units import LayerUnit, find_units
from voxray.models.parts.losses import MAX_LOGITS
from voxray.models.weight_sizes import TRAINED, stored_bytes, weight_bytes
from voxray.preflight.activations import FLOAT32, ActivationBytes, ActivationCounter
from voxray.preflight.shapes import ComputeConfig, PackShape
from voxray.training.zero import MAX_BUCKET_ELEMENTS

ADAMW_MOMENTS = 2  # AdamW's running means of gradients and of their squares
HEAP_WASTE = 0.9
"""Memory on a CPU, as a share of the activations, that glibc's malloc holds in pieces too small for the next tensor.
Measured with whisper-base: 0.94 with 2 rows, 0.85 with 8."""
RECOMPUTED_WASTE = {torch.float32: 0.5, torch.bfloat16: 0.2, torch.float16: 0.2}
"""The same memory with --grad_ckpt, as a share of what all layers save when they are computed again, because every
layer leaves its output between the pieces. Measured with whisper-large-v3 and 1 row: 0.47 in float32, 0.19 in
bfloat16."""
ENCODER_WIDTHS = 12  # of one layer: first and last input, residual, norm, and 4 widths each before and after GELU


@dataclass(frozen=True)
class MemoryEntry:
    """One line of the memory table.

    Attributes:
        cause: What uses the memory.
        num_bytes: Size in bytes.
        at: Phase in which it is in use; "" is always.
        is_waste: Whether it is memory that the process holds but no tensor uses, which the allocator does not count.
    """

    cause: str
    num_bytes: int
    at: str = ""
    is_waste: bool = False


@dataclass(frozen=True)
class MemoryNeed:
    """Memory of one process.

    Attributes:
        entries: The entries of all phases.
    """

    entries: tuple[MemoryEntry, ...]

    @property
    def moments(self) -> dict[str, int]:
        """{phase: total bytes}, including the memory that is always in use."""
        always = sum(entry.num_bytes for entry in self.entries if not entry.at)
        names = dict.fromkeys(entry.at for entry in self.entries if entry.at)
        return {name: always + sum(e.num_bytes for e in self.entries if e.at == name) for name in names}

    @property
    def peak_bytes(self) -> int:
        return max(self.moments.values(), default=sum(entry.num_bytes for entry in self.entries))

    @property
    def allocated_bytes(self) -> int:
        """The peak as PyTorch's allocator counts it."""
        return MemoryNeed(tuple(entry for entry in self.entries if not entry.is_waste)).peak_bytes

    @property
    def waste_bytes(self) -> int:
        """What the peak has beyond ``allocated_bytes``."""
        return self.peak_bytes - self.allocated_bytes

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name], default="")

    def always_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries if not entry.at)


@dataclass(frozen=True)
class Training:
    """Training settings on which the memory depends.

    Attributes:
        grad_accum: Forward passes per step; with several, gradients exist when the next forward pass begins.
        num_workers: Processes; several copy their gradients into one buffer to reduce them.
        state_shards: Processes among which --strategy shards gradients and AdamW's moments; 1 for ddp.
        weight_shards: Processes among which it shards the weights.
        offloads: Whether trained weights, gradients and moments are in the memory of the CPU.
        distills: Whether the distributions of the base are compared with those of the model.
    """

    grad_accum: int = 1
    num_workers: int = 1
    state_shards: int = 1
    weight_shards: int = 1
    offloads: bool = False
    distills: bool = False


class MemoryModel:
    """Predicts the memory of training a model that is on the meta device.

    Args:
        model: See ``ActivationCounter``.
    """

    def __init__(
        self,
        model: Any,
        family: ModelFamily,
        front_end: FrontEnd,
        config: ComputeConfig,
        training: Training = Training(),
    ) -> None:
        self._model, self._family, self._front_end = model, family, front_end
        self._config, self._training = config, training
        self._activations = ActivationCounter(model, family, front_end, config)
        self._weights = weight_bytes(model, family, config.quantize)
        self._num_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        head = unwrap_peft(model).get_output_embeddings()
        self._vocabulary_size, self._head_width = head.weight.shape
        names = {id(weight): name for name, weight in model.named_parameters()}
        self._head_role = find_role(names[id(head.weight)], family)
        self._head_gradient_bytes = FLOAT32 * head.weight.numel() if head.weight.requires_grad else 0

    def need(self, shape: PackShape, validation: "PackShape | None" = None, new_tokens: int = 0) -> MemoryNeed:
        """The memory of a process whose largest pack has this shape.

        Args:
            validation: Shape of the prompts of the largest validation batch.
            new_tokens: Longest answer that validation generates.
        """
        entries = [*self._always(), *self._training_step(shape)]
        if validation:
            entries += self._validation(validation, new_tokens)
        return MemoryNeed(tuple(entry for entry in entries if entry.num_bytes))

    def step_flops(self, shape: PackShape) -> float:
        """See ``ActivationCounter.step_flops``."""
        return self._activations.step_flops(shape)

    def _always(self) -> Iterable[MemoryEntry]:
        for (role, storage), num_bytes in self._weights.items():
            is_trained, training = storage.endswith(TRAINED), self._training
            shards = min(training.weight_shards, training.state_shards) if is_trained else training.weight_shards
            if not (is_trained and self._is_offloaded):
                yield MemoryEntry(f"{role}: weights, {storage}", num_bytes // shards)
        yield MemoryEntry("weights gathered for two modules", self._gathered_bytes)
        moments = ADAMW_MOMENTS * FLOAT32 * self._num_trained // self._training.state_shards
        yield MemoryEntry("optimizer: AdamW's moments, float32", 0 if self._is_offloaded else moments)

    @property
    def _is_offloaded(self) -> bool:
        return self._training.offloads and self._config.on_gpu

    @cached_property
    def _gathered_bytes(self) -> int:
        """Sharded weights are whole in one module at work, and in the next, which is gathered meanwhile."""
        if self._training.weight_shards == 1:
            return 0
        stored = stored_bytes(self._model, self._family, self._config.quantize)
        sizes = [sum(stored[id(each)] for each in unit.parameters) for unit in self._units]
        return max((sum(sizes[at : at + 2]) for at in range(len(sizes))), default=0)

    @cached_property
    def _units(self) -> list[LayerUnit]:
        trained = [weight for weight in self._model.parameters() if weight.requires_grad]
        return find_units(self._model, trained if self._training.state_shards == 1 else ())

    def _training_step(self, shape: PackShape) -> Iterable[MemoryEntry]:
        activations = self._activations.count(shape)
        gradients = self._gradient_bytes()
        accumulated = gradients if self._training.grad_accum > 1 else {}
        yield MemoryEntry("encoder: one layer at work", self._encoder_bytes(shape), "hearing")
        kind = "inputs of its layers, computed again later" if self._config.grad_ckpt else "activations"
        for role, role_bytes in activations.items():
            yield MemoryEntry(f"{role}: {kind}", role_bytes.until_backward, "loss")
        if not (self._config.on_gpu or self._training.weight_shards > 1):
            share = RECOMPUTED_WASTE[self._config.dtype]
            waste = sum(
                HEAP_WASTE * each.until_backward + share * each.recomputed_in_all for each in activations.values()
            )
            yield MemoryEntry("freed memory that malloc cannot use again", int(waste), "loss", is_waste=True)
        yield MemoryEntry("logits, their loss and gradient", self._logit_bytes(shape), "loss")
        yield MemoryEntry("gradients of the passes before, float32", sum(accumulated.values()), "loss")
        roles = list(activations)
        for index, role in enumerate(roles):  # the backward pass has then freed the activations of all later roles
            phase = f"backward through the {role}"
            for earlier in roles[: index + 1]:
                yield MemoryEntry(f"{earlier}: {kind}", activations[earlier].until_backward, phase)
            yield MemoryEntry(f"{role}: one layer computed again", activations[role].recomputed, phase)
            yield MemoryEntry(f"{role}: gradients within a layer", activations[role].working, phase)
            yield MemoryEntry("a layer's weights as numbers", self._dequantized_bytes(), phase)
            existing = accumulated or {later: gradients.get(later, 0) for later in roles[index + 1 :]}
            yield MemoryEntry("gradients of weights, float32", sum(existing.values()), phase)
            if role == self._head_role and not accumulated:
                yield MemoryEntry("gradient of the output layer, float32", self._head_gradient_bytes, phase)
        yield from self._optimizer_step(gradients, activations)

    def _optimizer_step(
        self, gradients: dict[str, int], activations: dict[str, ActivationBytes]
    ) -> Iterable[MemoryEntry]:
        total = sum(gradients.values())
        yield MemoryEntry("gradients, float32", total, "end of the backward pass")
        first = next(iter(activations.values()), ActivationBytes())
        yield MemoryEntry("the first layer's activations", first.recomputed + first.working, "end of the backward pass")
        yield MemoryEntry("gradients, float32", total, "optimizer step")
        if self._training.num_workers > 1 and self._training.state_shards == 1:
            yield MemoryEntry("gradients in one message", FLOAT32 * self._num_trained, "optimizer step")
        elif self._training.state_shards > 1:
            numbers = [sum(each.numel() for each in unit.parameters if each.requires_grad) for unit in self._units]
            in_message = min(self._num_trained, max(MAX_BUCKET_ELEMENTS, *numbers))
            yield MemoryEntry("gradients of one message", FLOAT32 * in_message, "end of the backward pass")
        largest = max((weight.numel() for weight in self._model.parameters() if weight.requires_grad), default=0)
        at_work = 0 if self._is_offloaded else 2 * FLOAT32 * largest // self._training.state_shards
        yield MemoryEntry("AdamW at work on the largest weight", at_work, "optimizer step")

    def _gradient_bytes(self) -> dict[str, int]:
        """{role: bytes of its gradients}."""
        if self._is_offloaded:
            return {}
        by_role: dict[str, int] = {}
        for name, weight in self._model.named_parameters():
            role = find_role(name, self._family)
            num_bytes = weight.numel() * FLOAT32 * weight.requires_grad // self._training.state_shards
            by_role[role] = by_role.get(role, 0) + num_bytes
        return by_role

    def _logit_bytes(self, shape: PackShape) -> int:
        """The logits, their log-probabilities and the gradient, all in float32, of all answer tokens or of a chunk.

        Distillation adds the log-probabilities of both models, and what the divergence is summed from.
        """
        count = shape.num_answer_tokens * self._vocabulary_size
        copies = 6 if self._training.distills else 3
        return (count if self._training.weight_shards > 1 else min(count, MAX_LOGITS)) * copies * FLOAT32

    def _dequantized_bytes(self) -> int:
        """Quantised weights are dequantised for each product, one layer at a time."""
        if self._config.quantize == "none":
            return 0
        sizes = [layer.weight.numel() for _, layer in quantized_layers(self._model, self._family)]
        return max(sizes, default=0) * self._config.dtype.itemsize

    def _encoder_bytes(self, shape: PackShape) -> int:
        """A frozen encoder saves nothing for the backward pass, but its forward pass needs memory for one layer."""
        is_frozen = not any(
            weight.requires_grad and find_role(name, self._family) == self._family.encoder_role
            for name, weight in self._model.named_parameters()
        )
        positions = shape.num_windows * self._family.encoder_layer_positions(
            unwrap_peft(self._model).config, self._front_end
        )
        width_bytes = self._front_end.encoder_dim * self._config.dtype.itemsize
        layer_bytes = ENCODER_WIDTHS * positions * width_bytes if is_frozen else 0
        return max(layer_bytes, self._first_convolution_bytes(shape))

    def _first_convolution_bytes(self, shape: PackShape) -> int:
        """Output of the first convolution over time and frequency, before and after its activation."""
        modules = unwrap_peft(self._model).named_modules()
        subsampling = next((module for name, module in modules if name.endswith("encoder.subsampling")), None)
        if subsampling is None:
            return 0
        stages = subsampling.num_layers - 1  # later convolutions with stride 2
        bins = subsampling.linear.in_features // subsampling.channels
        outputs = shape.num_windows * self._front_end.encoder_positions * bins * subsampling.channels * 4**stages
        return 2 * outputs * self._config.dtype.itemsize

    def _validation(self, shape: PackShape, new_tokens: int) -> Iterable[MemoryEntry]:
        size, num_positions = self._config.dtype.itemsize, shape.longest + new_tokens + CACHE_GROWTH
        cache_width = sum(
            2 * module.k_proj.out_features
            for name, module in unwrap_peft(self._model).named_modules()
            if hasattr(module, "k_proj") and find_role(name, self._family) != self._family.encoder_role
        )
        cache_bytes = shape.num_rows * num_positions * cache_width * size
        yield MemoryEntry("keys and values of the answers", cache_bytes, "validation")
        yield MemoryEntry("logits of one token", 2 * shape.num_rows * self._vocabulary_size * FLOAT32, "validation")
        if not self._config.on_gpu and size == FLOAT32 and self._vocabulary_size >= MIN_OUTPUTS:
            copy = self._vocabulary_size * self._head_width * FLOAT32
            yield MemoryEntry("output layer, laid out for few rows", copy, "validation")
        yield MemoryEntry("encoder: one layer at work", self._encoder_bytes(shape), "validation")
