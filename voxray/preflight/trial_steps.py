"""Runs trial steps of the real model on the real device: forward, backward and optimizer step, as in training."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from voxray.batches.collate import collate_packed, collate_prompts, collate_training, to_device
from voxray.batches.rank import Worker
from voxray.config.train import TrainSettings
from voxray.core.errors import is_out_of_memory
from voxray.features.reader import FeatureRow
from voxray.models.adapters.lora import trainable_parameters
from voxray.models.interface import Batch
from voxray.models.parts.cpu_16bit import use_float32_products
from voxray.preflight.allocations import measure_allocations
from voxray.preflight.meta_model import of_one_process
from voxray.preflight.rows import RunRows
from voxray.recipes.build_model import build_model, checkpoint_gradients, set_modes
from voxray.training.engine import DataParallel
from voxray.training.loop import pass_losses, seed_microbatch
from voxray.training.validate import in_eval_mode

ANSWER_TOKENS = 8
"""Number of tokens generated to measure the time per token."""
MAX_REPEATED_SEC = 5.0
"""A step that takes longer on a CPU is timed once."""
PRODUCT_SIZES = (256, 2048, 2048)
"""Rows, inputs and outputs of the Linear layer that measures the speed of a CPU."""


@dataclass(frozen=True)
class StepCost:
    """Measured cost of a training step on a pack.

    Attributes:
        peak_bytes: Peak memory, weights and AdamW's moments included.
        sec: Wall time of forward, backward and optimizer step.
        collate_sec: Time to collate the rows into a batch.
        num_tokens: Tokens of the rows, without padding.
    """

    peak_bytes: int
    sec: float
    collate_sec: float
    num_tokens: int


@dataclass(frozen=True)
class GenerationCost:
    """Measured cost of generating answers to a batch.

    Attributes:
        peak_bytes: Peak memory, beyond weights and AdamW's moments.
        prompt_sec: Time to process the prompts.
        token_sec: Time to generate one token for every row.
    """

    peak_bytes: int
    prompt_sec: float
    token_sec: float


def flops_per_sec(dtype: torch.dtype) -> float:
    """Speed of this machine's CPU in a frozen Linear layer of a type, measured."""
    rows, width, outputs = PRODUCT_SIZES
    inputs, layers = torch.ones(rows, width, dtype=dtype), torch.nn.Sequential(torch.nn.Linear(width, outputs, False))
    use_float32_products(layers.to(dtype).requires_grad_(False))
    seconds = []
    for _ in range(2):  # the first product also prepares the kernel
        start = time.perf_counter()
        layers(inputs)
        seconds.append(time.perf_counter() - start)
    return 2 * rows * width * outputs / min(seconds)


class TrialRunner:
    """A model in training whose steps have learning rate zero, so that trials do not change it.

    Raises:
        RunError: The model cannot be loaded.
        RuntimeError, MemoryError: It does not fit in memory.
    """

    def __init__(self, rows: RunRows, settings: TrainSettings, device: torch.device) -> None:
        self._rows, self._settings, self._device = rows, settings, device
        run = replace(rows.run, settings=of_one_process(settings), worker=Worker(device=device))
        self.model, _ = build_model(run, with_encoder=settings.store != "encoder")
        rates: dict[str, Any] = {"lr": settings.lr, "weight_decay": 0.0, "fused": settings.fuses_optimizer}
        self._engine = DataParallel(self.model, run.family, run.worker, **rates)

    def checkpoint(self) -> None:
        """Recompute activations from now on, as --grad_ckpt does."""
        checkpoint_gradients(self.model)
        set_modes(self.model, self._rows.run.family, self._rows.run.stage.roles)

    def held_bytes(self) -> int:
        """Bytes of the weights, their scales and the optimizer state."""
        state = (value for values in self._engine.optimizer.state.values() for value in values.values())
        tensors = [*stored_tensors(self.model), *(value for value in state if torch.is_tensor(value))]
        unique = {id(tensor): tensor for tensor in tensors}.values()
        return sum(tensor.numel() * tensor.element_size() for tensor in unique)

    def try_pack(self, numbers: np.ndarray, *, times: int = 1) -> StepCost | None:
        """Run steps on a pack of training rows.

        Args:
            numbers: Row numbers.
            times: Timed steps, of which the fastest counts. One more step before them measures the memory. On a CPU a
                step of over ``MAX_REPEATED_SEC`` is not repeated.
        Returns:
            The cost; None if the pack does not fit in memory, or no row can be decoded.
        """
        rows = self._rows.decode(numbers)
        if not rows:
            return None
        start = time.perf_counter()
        batch = self._collate(rows)
        collate_sec = time.perf_counter() - start
        batch = to_device(batch, self._device)
        try:
            if not self._engine.optimizer.state:
                self._step(batch)  # reads mapped weights, prepares the kernels and creates AdamW's moments
            held_bytes = self.held_bytes()
            allocations = measure_allocations(lambda: self._step(batch), self._device)
            step_sec = allocations.sec
            if self._device.type == "cuda" or step_sec <= MAX_REPEATED_SEC:
                step_sec = min((self._time_step(batch) for _ in range(times)), default=step_sec)
        except (RuntimeError, MemoryError) as error:
            self._engine.drop()
            if not is_out_of_memory(error):
                raise
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            return None
        num_tokens = sum(len(row.prompt_ids) + len(row.target_ids) for row in rows)
        return StepCost(held_bytes + allocations.peak_bytes, step_sec, collate_sec, num_tokens)

    def _time_step(self, batch: Batch) -> float:
        start = time.perf_counter()
        self._step(batch)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def _collate(self, rows: list[FeatureRow]) -> Batch:
        collate = collate_packed if self._settings.batching == "packed" else collate_training
        return collate(rows, self._rows.front_end)

    def _step(self, batch: Batch) -> None:
        seed_microbatch(0, 0, 0)
        loss_T, divergence = pass_losses(self._engine, self.model, batch, self._settings)
        loss = loss_T.sum() if divergence is None else loss_T.sum() + divergence
        self._engine.backward(loss / max(1, len(trainable_parameters(self.model))), last=True)
        del loss, loss_T, divergence
        self._engine.reduce(torch.zeros(1, device=self._device), scale=1.0, max_norm=self._settings.max_grad_norm)
        self._engine.apply(0.0)

    def answer(self, rows: list[FeatureRow]) -> GenerationCost | None:
        """Generate the first tokens of answers to rows, as validation does.

        Returns:
            The cost; None if the batch does not fit in memory.
        """
        family, batch = self._rows.run.family, to_device(collate_prompts(rows, self._rows.front_end), self._device)
        times: list[float] = []

        @torch.inference_mode()
        def generate() -> None:
            state, logits_BV = family.prefill(self.model, batch)
            times.append(time.perf_counter())
            for _ in range(ANSWER_TOKENS):
                logits_BV = state.decode_step(logits_BV.argmax(-1))
            float(logits_BV.sum())  # waits for a GPU
            times.append(time.perf_counter())

        try:
            with in_eval_mode(self.model):
                generate()  # warm-up
                times.clear()
                start = time.perf_counter()
                allocations = measure_allocations(generate, self._device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return GenerationCost(allocations.peak_bytes, times[0] - start, (times[1] - times[0]) / ANSWER_TOKENS)


def stored_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """All tensors of a model: parameters, buffers, and the scales and tables of quantised layers."""
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
