"""The real model on the real device, to try packs on: forward, backward and the optimizer's step, as in training."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from voxray.batches.collate import collate_packed, collate_prompts, collate_training
from voxray.batches.rank import Worker
from voxray.config.train import TrainSettings
from voxray.features.reader import FeatureRow
from voxray.models.adapters.lora import trainable_parameters
from voxray.models.interface import Batch
from voxray.preflight.allocations import measure_allocations
from voxray.preflight.rows import RunRows
from voxray.recipes.build_model import build_model, checkpoint_gradients, set_modes
from voxray.training.engine import DataParallel
from voxray.training.loop import seed_pack, task_losses
from voxray.training.resource_errors import is_out_of_memory
from voxray.training.validate import in_eval_mode

ANSWER_TOKENS = 8
"""Generated to see how long one takes."""


@dataclass(frozen=True)
class StepCost:
    """What a pack took.

    Attributes:
        peak_bytes: Most memory held at a time, weights and moments included.
        sec: Of forward, backward and the optimizer's step, by the clock.
        collate_sec: Of putting the rows into a batch.
        num_tokens: Of its rows, without padding.
    """

    peak_bytes: int
    sec: float
    collate_sec: float
    num_tokens: int


@dataclass(frozen=True)
class GenerationCost:
    """What the beginning of a batch's answers took.

    Attributes:
        peak_bytes: Most memory held at a time, beyond weights and moments.
        prompt_sec: Of reading the prompts.
        token_sec: Of a token of all rows.
    """

    peak_bytes: int
    prompt_sec: float
    token_sec: float


class TrialRunner:
    """A model in training that takes steps of size zero, so that one may take as many as one likes.

    Raises:
        RunError: The model cannot be loaded.
        RuntimeError, MemoryError: It does not fit.
    """

    def __init__(self, rows: RunRows, settings: TrainSettings, device: torch.device) -> None:
        self._rows, self._settings, self._device = rows, settings, device
        stage, family = rows.stage, rows.family
        plain = settings.model_copy(update={"compile": False})
        how: dict[str, Any] = {"with_encoder": settings.store != "encoder", "lora_targets": stage.lora_targets}
        self.model, _ = build_model(stage.roles, plain, family, Worker(device=device), **how)
        self._engine = DataParallel(self.model, family, Worker(device=device), lr=settings.lr, weight_decay=0.0)

    def checkpoint(self) -> None:
        """Recompute activations from now on, as --grad_ckpt does."""
        checkpoint_gradients(self.model)
        set_modes(self.model, self._rows.family, self._rows.stage.roles)

    def held_bytes(self) -> int:
        """Weights, their scales and the optimizer's moments."""
        moments = (tensor for state in self._engine.optimizer.state.values() for tensor in state.values())
        tensors = [*stored_tensors(self.model), *(value for value in moments if torch.is_tensor(value))]
        return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())

    def try_pack(self, numbers: np.ndarray, *, times: int = 1) -> StepCost | None:
        """Take steps on a pack of training rows.

        Args:
            times: Steps by the clock, the quickest of which counts; one more before them sees how much memory it takes.
        Returns:
            None if the memory does not suffice, or no row decodes.
        """
        made = self._rows.made(numbers)
        if not made:
            return None
        started = time.perf_counter()
        batch = self._collated(made)
        collate_sec = time.perf_counter() - started
        batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
        try:
            if not self._engine.optimizer.state:
                self._step(batch)  # makes the moments, which are there from the second step on
            held = self.held_bytes()
            seen = measure_allocations(lambda: self._step(batch), self._device)
            clocked = min((self._clocked(batch) for _ in range(times)), default=seen.sec)
        except (RuntimeError, MemoryError) as error:
            self._engine.drop()
            if not is_out_of_memory(error):
                raise
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return None
        tokens = sum(len(row.prompt_ids) + len(row.target_ids) for row in made)
        return StepCost(held + seen.peak_bytes, clocked, collate_sec, tokens)

    def _clocked(self, batch: Batch) -> float:
        started = time.perf_counter()
        self._step(batch)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    def _collated(self, made: list[FeatureRow]) -> Batch:
        collate = collate_packed if self._settings.batching == "packed" else collate_training
        return collate(made, self._rows.front_end)

    def _step(self, batch: Batch) -> None:
        seed_pack(0, 0, 0)
        loss = task_losses(self._engine.logits, batch, self._settings.label_smoothing).sum()
        self._engine.backward(loss / max(1, len(trainable_parameters(self.model))), last=True)
        del loss
        self._engine.reduce([0.0], scale=1.0, max_norm=self._settings.max_grad_norm)
        self._engine.apply(0.0)

    def answer(self, made: list[FeatureRow]) -> GenerationCost | None:
        """Begin to answer rows as a validation does.

        Returns:
            None if the memory does not suffice.
        """
        family, batch = self._rows.family, collate_prompts(made, self._rows.front_end)
        batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
        clock: list[float] = []

        @torch.inference_mode()
        def begin() -> None:
            state, logits_BV = family.prefill(self.model, batch)
            clock.append(time.perf_counter())
            for _ in range(ANSWER_TOKENS):
                logits_BV = state.decode_step(logits_BV.argmax(-1))
            float(logits_BV.sum())  # waits for a GPU
            clock.append(time.perf_counter())

        try:
            with in_eval_mode(self.model):
                begin()
                clock.clear()
                started = time.perf_counter()
                seen = measure_allocations(begin, self._device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return GenerationCost(seen.peak_bytes, clock[0] - started, (clock[1] - clock[0]) / ANSWER_TOKENS)


def stored_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Everything that a model holds: parameters, buffers, and what quantised layers keep beside them."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        quantized = getattr(getattr(module, "weight", None), "quant_state", None)
        if quantized is not None:
            yield from (quantized.absmax, quantized.code, quantized.offset)
            yield from (quantized.state2.absmax, quantized.state2.code)
        scales = getattr(getattr(module, "state", None), "SCB", None)
        if scales is not None:
            yield scales
