"""Finds settings that fit in memory and are fast: first by prediction, then by trial steps of the real model.

Only settings that keep the data and the global batch are changed: rows per forward pass and workers (with
gradient accumulation adjusted), activation recomputation, and loader threads.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from voxray.config.flag_groups import as_range
from voxray.config.train import TrainSettings
from voxray.core.errors import is_out_of_memory
from voxray.core.memory import free_memory_bytes
from voxray.core.units import format_bytes
from voxray.models.parts.quantize import base_dtype
from voxray.preflight.budget import CPU_SHARE, Budget, worker_budget
from voxray.preflight.findings import Findings
from voxray.preflight.machine import usable_cpus
from voxray.preflight.memory import MemoryModel, Training
from voxray.preflight.meta_model import build_meta_model
from voxray.preflight.pack_sizes import (
    BatchSize,
    PlannedPack,
    average_pack,
    current_size,
    largest_fitting,
    largest_pack,
    sizes,
    validation_batch_size,
)
from voxray.preflight.rows import RunRows
from voxray.preflight.shapes import ComputeConfig
from voxray.preflight.trial_steps import GenerationCost, StepCost, TrialRunner, flops_per_sec
from voxray.training.resource_errors import memory_advice

SURE_SHARE, HOPELESS_SHARE = 0.7, 1.3
"""Predictions below and above these shares of the budget are trusted; in between a size is tried."""
MIN_SPEEDUP = 0.9
"""A larger size is chosen only if its time per token is below this share of the current size's."""
LONG_STEP_SEC = 10.0
"""If a step takes longer, no further sizes are timed. On a CPU, a step that would take longer is not tried."""
LOADING_MARGIN = 1.2


@dataclass
class FittedSettings:
    """The settings to run, and what they need.

    Attributes:
        settings: The user's settings with the changes.
        changes: Every change with its reason, for the report.
        budget: Memory that one worker may use.
        pack: The largest planned pack of these settings; None if nothing could be planned.
        largest, average: Measured cost of the largest and of the average pack; None if not measured.
        answering: Measured cost of answering the largest validation batch; None if not measured.
        fits: Whether the run fits in memory.
    """

    settings: TrainSettings
    changes: list[str] = field(default_factory=list)
    budget: Budget | None = None
    pack: PlannedPack | None = None
    largest: StepCost | None = None
    average: StepCost | None = None
    answering: GenerationCost | None = None
    fits: bool = False


class SettingsFitter:
    """Looks for settings that fit in memory and are fast.

    Args:
        rows: The rows of the run.
        meta_model: The model of these settings on the meta device.
        num_workers: Training processes.
        findings: Receives what could not be measured, and the result.
        memory_gib: Memory of a worker; 0 uses the free memory of this machine.
        gpu: GPU of each worker, on other machines; "" for this machine.
        tunes: Whether settings may be changed.
    """

    def __init__(
        self,
        rows: RunRows,
        meta_model: Any,
        num_workers: int,
        findings: Findings,
        *,
        memory_gib: float,
        gpu: str = "",
        tunes: bool,
    ) -> None:
        self._rows, self.num_workers, self._memory_gib, self._tunes = rows, num_workers, memory_gib, tunes
        self._findings, self._gpu = findings, gpu
        settings = rows.run.settings
        self.decision = FittedSettings(settings)
        self.decision.budget = self._worker_budget()
        self._tried: dict[tuple[BatchSize, bool], StepCost | None] = {}
        self._planned: dict[tuple[BatchSize, bool, int], PlannedPack] = {}
        self._meta_models: dict[bool, Any] = {settings.grad_ckpt: meta_model}

    @property
    def _settings(self) -> TrainSettings:
        return self.decision.settings

    @property
    def _budget(self) -> Budget:
        assert self.decision.budget is not None
        return self.decision.budget

    def decide(self) -> FittedSettings:
        """Choose settings that fit, and measure them."""
        fitting, candidates = self._find_size()
        current = candidates.index(current_size(self._settings))
        if fitting < 0:
            self.decision.pack = self.planned(candidates[current])
            return self.decision
        self.decision.fits = True
        chosen = fitting if fitting < current else self._fastest(candidates, current, fitting)
        self._change_size(candidates[chosen], candidates[current], is_smaller=fitting < current)
        self.decision.pack = self.planned(candidates[chosen])
        self._measure(candidates[chosen])
        return self.decision

    def fit_gpus(self) -> None:
        """Use at most as many workers as there are GPUs: Ray would place all of them on CPUs otherwise."""
        num_gpus, num_workers = torch.cuda.device_count(), str(self._settings.num_workers)
        if not num_gpus or self._memory_gib or self._gpu or not self._tunes:
            return
        if not num_workers.isdecimal() or int(num_workers) <= num_gpus:
            return
        total = self.num_workers * self._settings.grad_accum
        count = max(count for count in range(1, num_gpus + 1) if total % count == 0)
        self.use_workers(count, f"there are {num_gpus} GPUs")

    def _find_size(self) -> tuple[int, list[BatchSize]]:
        """Find the largest size that fits; if none does, recompute activations, then use fewer workers.

        Returns:
            Index of the size, -1 if none fits, and all sizes.
        """
        while True:
            positions = (
                self._rows.train.longest_tokens
                + self._rows.train.num_windows * self._rows.front_end.cross_attention_positions
            )
            longest = int(positions[self._rows.rows].max())
            candidates = sizes(self._settings, longest) if self._tunes else [current_size(self._settings)]
            index = largest_fitting(candidates, self._fits)
            if index >= 0 or not self._tunes or not (self._recompute() or self._fewer_workers()):
                return index, candidates

    def _recompute(self) -> bool:
        if self._settings.grad_ckpt:
            return False
        self._change(
            f"--grad_ckpt: even the smallest pack needs more than {format_bytes(self._budget.num_bytes)}",
            grad_ckpt=True,
        )
        if trial_runner := self.__dict__.get("trial_runner"):  # set only after its first use
            trial_runner.checkpoint()
        return True

    def _fewer_workers(self) -> bool:
        """On a CPU, workers share the memory: use fewer of them with more gradient accumulation."""
        total = self.num_workers * self._settings.grad_accum
        fewer = [count for count in range(self.num_workers - 1, 0, -1) if total % count == 0]
        if self._budget.on_gpu or self._memory_gib or not fewer or ":" in str(self._settings.num_workers):
            return False
        self.use_workers(fewer[0], "the memory here does not suffice for so many")
        return True

    def use_workers(self, count: int, reason: str) -> None:
        """Train with another number of workers and the same number of packs per step."""
        accum = self.num_workers * self._settings.grad_accum // count
        message = f"--num_workers {count} (was {self._settings.num_workers}) and --grad_accum {accum}: {reason}"
        self.num_workers = count
        self._change(message, num_workers=count, grad_accum=accum)
        self.decision.budget = self._worker_budget()

    def _worker_budget(self) -> Budget:
        uses_ray = str(self._settings.num_workers) != "0"
        return worker_budget(self.num_workers, self._memory_gib, self._gpu, uses_ray=uses_ray)

    def _change(self, message: str, **values: Any) -> None:
        self.decision.changes.append(message)
        self.decision.settings = self._settings.model_copy(update=values)

    def planned(self, size: BatchSize) -> PlannedPack:
        """The largest planned pack of a size, with its memory."""
        key = (size, self._settings.grad_ckpt, self.num_workers)
        if key not in self._planned:
            settings = size.apply(self._settings)
            plan = self._rows.plan(settings, self.num_workers)
            self._planned[key] = largest_pack(self._rows, settings, plan, self._memory(settings))
        return self._planned[key]

    def _memory(self, settings: TrainSettings) -> MemoryModel:
        if settings.grad_ckpt not in self._meta_models:
            self._meta_models[settings.grad_ckpt] = build_meta_model(self._rows.run, settings)
        meta_model, run = self._meta_models[settings.grad_ckpt], self._rows.run
        dtype = base_dtype(bf16=settings.bf16, fp16=settings.fp16)
        config = ComputeConfig(
            dtype, self._budget.on_gpu, settings.grad_ckpt, settings.quantize, settings.label_smoothing
        )
        shards = {"state_shards": self.num_workers} if settings.shards_state else {}
        shards |= {"weight_shards": self.num_workers} if settings.shards_weights else {}
        more: dict[str, Any] = {"offloads": settings.offload_optimizer, "distills": settings.distill_weight > 0}
        training = Training(settings.grad_accum, self.num_workers, **shards, **more)
        return MemoryModel(meta_model, run.family, self._rows.front_end, config, training)

    def _fits(self, size: BatchSize) -> bool:
        needed, limit = self.planned(size).need.peak_bytes, self._budget.num_bytes
        if needed <= SURE_SHARE * limit or needed > HOPELESS_SHARE * limit or not self._can_try(size):
            return needed <= limit
        cost = self._try(size)
        return cost is not None and cost.peak_bytes + self.planned(size).need.waste_bytes <= limit

    def _can_try(self, size: BatchSize) -> bool:
        """Whether real steps of a size are possible."""
        return not self._obstacle(size) and self.trial_runner is not None

    def _obstacle(self, size: BatchSize) -> str:
        """Why no real step of a size can be taken on this machine; "" if one can.

        On a CPU, running out of memory kills the process without an error, and steps of a large model take minutes.
        """
        if self._gpu:
            return f"--gpu {self._gpu} names a GPU of another machine"
        if self._settings.shards_weights and self.num_workers > 1:
            return f"each of {self.num_workers} workers holds a part of the weights"
        if torch.cuda.is_available():
            return ""
        pack = self.planned(size)
        if pack.need.peak_bytes > CPU_SHARE * self._free_bytes:
            needed, free = format_bytes(pack.need.peak_bytes), format_bytes(self._free_bytes)
            return f"the largest pack needs {needed}, and {free} are free here"
        seconds = pack.flops / self._flops_per_sec
        return f"a step would take about {seconds:.0f} s on this CPU" if seconds > LONG_STEP_SEC else ""

    @cached_property
    def _flops_per_sec(self) -> float:
        return flops_per_sec(base_dtype(bf16=self._settings.bf16, fp16=self._settings.fp16))

    def _try(self, size: BatchSize) -> StepCost | None:
        """Measured cost of the largest pack of a size; None if it does not fit."""
        assert self.trial_runner is not None
        key = (size, self._settings.grad_ckpt)
        if key not in self._tried:
            self._tried[key] = self.trial_runner.try_pack(self.planned(size).rows)
        return self._tried[key]

    @cached_property
    def _free_bytes(self) -> int:
        """Free memory before the model was loaded."""
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else free_memory_bytes()

    @cached_property
    def trial_runner(self) -> TrialRunner | None:
        """The real model, loaded at first use; None if its weights and optimizer state do not fit on this machine."""
        needed = self.planned(current_size(self._settings)).need.always_bytes()
        has_gpu = torch.cuda.is_available()
        free = f"{format_bytes(self._free_bytes)} free {'on the GPU' if has_gpu else 'here'}"
        if needed > CPU_SHARE * self._free_bytes:
            reason = f"weights and moments of {format_bytes(needed)} do not go into {free}"
            self._findings.add("unchecked", "memory", f"no real step was taken: {reason}; the figures are predicted")
            return None
        try:
            return TrialRunner(self._rows, self._settings, torch.device("cuda" if has_gpu else "cpu"))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._findings.add("unchecked", "memory", f"no real step was taken: the model does not go into {free}")
            return None

    def _fastest(self, candidates: Sequence[BatchSize], current: int, largest: int) -> int:
        """Index of the current size, the largest or one between, whichever takes the least time per token."""
        if largest == current or not self._can_try(candidates[current]):
            return current
        token_sec: dict[int, float] = {}
        for index in sorted({current, (current + largest) // 2, largest}):
            cost = self._try_average(candidates[index]) if self._can_try(candidates[index]) else None
            if cost is not None:
                token_sec[index] = cost.sec / max(1, cost.num_tokens)
            if cost is None or cost.sec > LONG_STEP_SEC:
                break
        best = min(token_sec, key=lambda index: token_sec[index], default=current)
        return best if current not in token_sec or token_sec[best] < MIN_SPEEDUP * token_sec[current] else current

    def _try_average(self, size: BatchSize) -> StepCost | None:
        """Measured cost of the average pack of a size; None if it does not fit."""
        if self.trial_runner is None:
            return None
        plan = self._rows.plan(size.apply(self._settings), self.num_workers)
        return self.trial_runner.try_pack(average_pack(self._rows, plan), times=2)

    def _change_size(self, size: BatchSize, current: BatchSize, *, is_smaller: bool) -> None:
        if size == current:
            return
        reason = "its tokens took less time, measured"
        if is_smaller:
            needed, limit = format_bytes(self.planned(current).need.peak_bytes), format_bytes(self._budget.num_bytes)
            reason = f"the largest pack would need {needed} of the {limit} that are there"
        message = f"--{size.flag} {size.amount} (was {current.amount}) and --grad_accum {size.grad_accum}: {reason}"
        self._change(message, **{size.flag: size.amount, "grad_accum": size.grad_accum})

    def _measure(self, size: BatchSize) -> None:
        """Measure the chosen size on the real model: its largest pack, its average pack, and validation answers."""
        decision = self.decision
        if reason := self._obstacle(size):
            self._findings.add("unchecked", "memory", f"no real step was taken: {reason}; the figures are predicted")
            return
        if self.trial_runner is None:
            return
        decision.largest = self._try(size)
        waste = self.planned(size).need.waste_bytes
        if decision.largest is None or decision.largest.peak_bytes + waste > self._budget.num_bytes:
            decision.fits = False
            return
        decision.average = self._try_average(size)
        self._tune_loader()
        batch = self._rows.held_out_rows[: validation_batch_size(decision.settings)]
        is_sequential = self._rows.front_end.needs_sequential_generate
        rows = self._rows.decode(batch, held_out=True)
        rows = [row for row in rows if not is_sequential(row.prompt_ids, row.num_windows)]
        if rows:
            decision.answering = self.trial_runner.answer(rows)

    def _tune_loader(self) -> None:
        """Use enough loader threads to collate a batch while the model computes the previous one."""
        average, current = self.decision.average, self._settings.loader_workers
        if average is None or not self._tunes:
            return
        needed = math.ceil(LOADING_MARGIN * average.collate_sec / average.sec)
        count = min(needed, max(1, usable_cpus() - 1))
        if count > max(current, 1):
            reason = f"a batch takes {average.collate_sec:.2g} s to put together and {average.sec:.2g} s to compute"
            self._change(f"--loader_workers {count} (was {current}): {reason}", loader_workers=count)

    def tell(self) -> None:
        """Add a finding: whether the run fits in memory, and what to do if not."""
        decision, findings = self.decision, self._findings
        pack, budget = decision.pack, self._budget
        assert pack is not None
        limit = f"{format_bytes(budget.num_bytes)} ({budget.source})"
        if decision.fits:
            message = f"{format_bytes(pack.need.peak_bytes)} predicted"
            if decision.largest:
                message += f", {format_bytes(decision.largest.peak_bytes + pack.need.waste_bytes)} measured"
            findings.add("ok", "memory", f"{message}, of {limit}")
        else:
            largest = decision.largest
            needed = largest.peak_bytes + pack.need.waste_bytes if largest else pack.need.peak_bytes
            advice = memory_advice(decision.settings)
            findings.add("fix", "memory", f"a worker needs {format_bytes(needed)} and may take {limit}: {advice}")


@contextmanager
def threads_of_one(num_workers: int) -> Iterator[None]:
    """Limit torch to the threads that one of several workers on this machine gets (see ``launch``)."""
    previous = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers) if num_workers > 1 else previous)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def planned_processes(num_workers: str | int) -> int:
    """Maximum number of training processes: one per GPU for ``auto``, one for 0, which trains in this process."""
    if num_workers == "auto":
        return max(1, torch.cuda.device_count())
    return max(1, as_range(num_workers)[1])
