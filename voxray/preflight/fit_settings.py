"""From what a run asks for to what fits and is quick: predicted first, then tried on the real model.

What may change keeps the result a run of the same data in steps of the same size: rows of a forward pass against
accumulation, workers against accumulation, recomputed activations, and threads that load.
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
from voxray.core.units import format_bytes
from voxray.models.parts.quantize import base_dtype
from voxray.preflight.budget import CPU_SHARE, Budget, worker_budget
from voxray.preflight.findings import Findings
from voxray.preflight.machine import free_memory_bytes, usable_cpus
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
)
from voxray.preflight.rows import RunRows
from voxray.preflight.shapes import Computing
from voxray.preflight.trial_steps import GenerationCost, StepCost, TrialRunner
from voxray.training.resource_errors import is_out_of_memory, memory_advice

SURE_SHARE, HOPELESS_SHARE = 0.7, 1.3
"""Predictions below and above these shares of the budget are believed; in between a size is tried."""
QUICKER = 0.9
"""A size is taken for its speed only if a token then takes less than this share of the time."""
LONG_STEP_SEC = 20.0
"""Where a step takes longer, no other sizes are timed."""
LOADING_MARGIN = 1.2


@dataclass
class FittedSettings:
    """What is to be run.

    Attributes:
        settings: Those asked for, with what was changed.
        changes: Every change with its reason, for people.
        budget: Memory of a worker.
        pack: The largest planned pack of these settings; None if nothing could be planned.
        largest, average: What trying it, and the average pack, took; None if it was not tried.
        answering: What beginning the answers of a validation's largest batch took.
        fits: Whether the memory suffices.
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
    """Looks for settings that fit.

    Args:
        outline: The model of these settings, without weights.
        num_workers: Processes that train.
        memory_gib: Of a worker's machine; 0 looks at this one.
        tunes: Whether settings may be changed.
    """

    def __init__(
        self,
        rows: RunRows,
        settings: TrainSettings,
        outline: Any,
        num_workers: int,
        findings: Findings,
        *,
        memory_gib: float,
        tunes: bool,
    ) -> None:
        self._rows, self.num_workers, self._memory_gib, self._tunes = rows, num_workers, memory_gib, tunes
        self._findings = findings
        self.decision = FittedSettings(settings, budget=worker_budget(num_workers, memory_gib))
        self._tried: dict[tuple[BatchSize, bool], StepCost | None] = {}
        self._planned: dict[tuple[BatchSize, bool, int], PlannedPack] = {}
        self._models: dict[bool, Any] = {settings.grad_ckpt: outline}

    @property
    def _settings(self) -> TrainSettings:
        return self.decision.settings

    @property
    def _budget(self) -> Budget:
        assert self.decision.budget is not None
        return self.decision.budget

    def decide(self) -> FittedSettings:
        """Find out what fits, change what has to be changed, and measure it."""
        place, candidates = self._find_size()
        asked = candidates.index(current_size(self._settings))
        if place < 0:
            self.decision.pack = self.planned(candidates[asked])
            return self.decision
        self.decision.fits = True
        chosen = place if place < asked else self._quickest(candidates, asked, place)
        self._take_size(candidates[chosen], candidates[asked], smaller=place < asked)
        self.decision.pack = self.planned(candidates[chosen])
        self._measure(candidates[chosen])
        return self.decision

    def fit_gpus(self) -> None:
        """Not more workers than GPUs, where there are any: Ray would put all of them on CPUs."""
        gpus, asked = torch.cuda.device_count(), str(self._settings.num_workers)
        if not gpus or self._memory_gib or not asked.isdecimal() or int(asked) <= gpus or not self._tunes:
            return
        total = self.num_workers * self._settings.grad_accum
        count = max(count for count in range(1, gpus + 1) if total % count == 0)
        self.use_workers(count, f"there are {gpus} GPUs")

    def _find_size(self) -> tuple[int, list[BatchSize]]:
        """The largest size that fits, with activations recomputed and with fewer workers where it must be."""
        while True:
            positions = (
                self._rows.train.longest_tokens
                + self._rows.train.num_windows * self._rows.front_end.cross_attention_positions
            )
            longest = int(positions[self._rows.rows].max())
            candidates = sizes(self._settings, longest) if self._tunes else [current_size(self._settings)]
            place = largest_fitting(candidates, self._fits)
            if place >= 0 or not self._tunes or not (self._recompute() or self._fewer_workers()):
                return place, candidates

    def _recompute(self) -> bool:
        if self._settings.grad_ckpt:
            return False
        self._change(
            f"--grad_ckpt: even the smallest pack needs more than {format_bytes(self._budget.num_bytes)}",
            grad_ckpt=True,
        )
        if bench := self.__dict__.get("bench"):
            bench.checkpoint()
        return True

    def _fewer_workers(self) -> bool:
        """On a CPU workers share the memory, and fewer of them may do the same with more accumulation."""
        total = self.num_workers * self._settings.grad_accum
        fewer = [count for count in range(self.num_workers - 1, 0, -1) if total % count == 0]
        if self._budget.on_gpu or self._memory_gib or not fewer or ":" in str(self._settings.num_workers):
            return False
        self.use_workers(fewer[0], "the memory here does not suffice for so many")
        return True

    def use_workers(self, count: int, why: str) -> None:
        """Train with another number of workers, and the same number of packs in a step."""
        accum = self.num_workers * self._settings.grad_accum // count
        told = f"--num_workers {count} (was {self._settings.num_workers}) and --grad_accum {accum}: {why}"
        self.num_workers = count
        self._change(told, num_workers=count, grad_accum=accum)
        self.decision.budget = worker_budget(count, self._memory_gib)

    def _change(self, told: str, **values: Any) -> None:
        self.decision.changes.append(told)
        self.decision.settings = self._settings.model_copy(update=values)

    def planned(self, size: BatchSize) -> PlannedPack:
        """The largest pack of a size, with what it needs."""
        key = (size, self._settings.grad_ckpt, self.num_workers)
        if key not in self._planned:
            settings = size.put_into(self._settings)
            plan = self._rows.plan(settings, self.num_workers)
            self._planned[key] = largest_pack(self._rows, settings, plan, self._memory(settings))
        return self._planned[key]

    def _memory(self, settings: TrainSettings) -> MemoryModel:
        if settings.grad_ckpt not in self._models:
            self._models[settings.grad_ckpt] = build_meta_model(self._rows.stage, settings, self._rows.family)
        dtype = base_dtype(bf16=settings.bf16, fp16=settings.fp16)
        how = Computing(dtype, self._budget.on_gpu, settings.grad_ckpt, settings.quantize, settings.label_smoothing)
        divided = self.num_workers if settings.strategy == "deepspeed" else 1
        whole = 1 if settings.zero_stage < 3 else divided
        training = Training(settings.grad_accum, self.num_workers, divided, whole)
        return MemoryModel(self._models[settings.grad_ckpt], self._rows.family, self._rows.front_end, how, training)

    def _fits(self, size: BatchSize) -> bool:
        wanted, there = self.planned(size).need.peak_bytes, self._budget.num_bytes
        if wanted <= SURE_SHARE * there or wanted > HOPELESS_SHARE * there or not self._can_try(size):
            return wanted <= there
        tried = self._try(size)
        return tried is not None and tried.peak_bytes <= there

    def _can_try(self, size: BatchSize) -> bool:
        """Whether there is a model to try it on, and trying is safe: a CPU's process would be killed, not told."""
        if self.bench is None:
            return False
        return torch.cuda.is_available() or self.planned(size).need.peak_bytes <= CPU_SHARE * self._room_bytes

    def _try(self, size: BatchSize) -> StepCost | None:
        """None if it does not fit."""
        assert self.bench is not None
        key = (size, self._settings.grad_ckpt)
        if key not in self._tried:
            self._tried[key] = self.bench.try_pack(self.planned(size).rows)
        return self._tried[key]

    @cached_property
    def _room_bytes(self) -> int:
        """What was free before the model was loaded."""
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else free_memory_bytes()

    @cached_property
    def bench(self) -> TrialRunner | None:
        """The real model, if this machine has room for it and for the smallest step."""
        wanted = self.planned(current_size(self._settings)).need.always_bytes()
        has_gpu, there = torch.cuda.is_available(), self._room_bytes
        room = f"{format_bytes(there)} free {'on the GPU' if has_gpu else 'here'}"
        if wanted > CPU_SHARE * there:
            why = f"weights and moments of {format_bytes(wanted)} do not go into {room}"
            self._findings.add("unchecked", "memory", f"no real step was taken: {why}; the figures are predicted")
            return None
        try:
            return TrialRunner(self._rows, self._settings, torch.device("cuda" if has_gpu else "cpu"))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._findings.add("unchecked", "memory", f"no real step was taken: the model does not go into {room}")
            return None

    def _quickest(self, candidates: Sequence[BatchSize], asked: int, largest: int) -> int:
        """Of the size asked for, the largest and one between: the one whose average pack takes least time a token."""
        if self.bench is None or largest == asked:
            return asked
        speeds: dict[int, float] = {}
        for place in sorted({asked, (asked + largest) // 2, largest}):
            tried = self._average(candidates[place])
            if tried is not None:
                speeds[place] = tried.sec / max(1, tried.num_tokens)
            if tried is None or tried.sec > LONG_STEP_SEC:
                break
        best = min(speeds, key=lambda place: speeds[place], default=asked)
        return best if asked not in speeds or speeds[best] < QUICKER * speeds[asked] else asked

    def _average(self, size: BatchSize) -> StepCost | None:
        if self.bench is None:
            return None
        plan = self._rows.plan(size.put_into(self._settings), self.num_workers)
        return self.bench.try_pack(average_pack(self._rows, plan), times=2)

    def _take_size(self, size: BatchSize, asked: BatchSize, *, smaller: bool) -> None:
        if size == asked:
            return
        why = "its tokens took less time, measured"
        if smaller:
            needed = format_bytes(self.planned(asked).need.peak_bytes)
            why = f"the largest pack would need {needed} of the {format_bytes(self._budget.num_bytes)} that are there"
        told = f"--{size.flag} {size.amount} (was {asked.amount}) and --grad_accum {size.grad_accum}: {why}"
        self._change(told, **{size.flag: size.amount, "grad_accum": size.grad_accum})

    def _measure(self, size: BatchSize) -> None:
        """Take real steps with what was chosen: on its largest pack, on the average one, and of a validation."""
        if self.bench is None:
            return
        decision = self.decision
        if not self._can_try(size):
            needed, room = self.planned(size).need.peak_bytes, self._room_bytes
            told = f"the largest pack needs {format_bytes(needed)}, and {format_bytes(room)} are free here"
            self._findings.add("unchecked", "memory", f"no real step was taken: {told}; the figures are predicted")
            return
        decision.largest = self._try(size)
        if decision.largest is None or decision.largest.peak_bytes > self._budget.num_bytes:
            decision.fits = False
            return
        decision.average = self._average(size)
        self._tune_loader()
        together = self._rows.held_out_rows[: max(8, decision.settings.per_device_bsz)]
        alone = self._rows.front_end.needs_sequential_generate
        made = self._rows.made(together, held_out=True)
        made = [row for row in made if not alone(row.prompt_ids, row.num_windows)]
        if made:
            decision.answering = self.bench.answer(made)

    def _tune_loader(self) -> None:
        """As many threads as it takes to put batches together while the model computes."""
        average, now = self.decision.average, self._settings.loader_workers
        if average is None or not self._tunes:
            return
        wanted = math.ceil(LOADING_MARGIN * average.collate_sec / average.sec)
        wanted = min(wanted, max(1, usable_cpus() - 1))
        if wanted > max(now, 1):
            took = f"a batch takes {average.collate_sec:.2g} s to put together and {average.sec:.2g} s to compute"
            self._change(f"--loader_workers {wanted} (was {now}): {took}", loader_workers=wanted)

    def tell(self) -> None:
        """Say whether it fits, and what to do if not."""
        decision, findings = self.decision, self._findings
        pack, budget = decision.pack, self._budget
        assert pack is not None
        there = f"{format_bytes(budget.num_bytes)} ({budget.source})"
        if decision.fits:
            told = f"{format_bytes(pack.need.peak_bytes)} predicted"
            told += f", {format_bytes(decision.largest.peak_bytes)} measured" if decision.largest else ""
            findings.add("ok", "memory", f"{told}, of {there}")
        else:
            needed = decision.largest.peak_bytes if decision.largest else pack.need.peak_bytes
            advice = memory_advice(decision.settings)
            findings.add("fix", "memory", f"a worker needs {format_bytes(needed)} and may take {there}: {advice}")


@contextmanager
def threads_of_one(num_workers: int) -> Iterator[None]:
    """Compute meanwhile with as many threads as one of several workers on this machine has (see ``launch``)."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers) if num_workers > 1 else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def planned_processes(num_workers: str | int) -> int:
    """Most processes that train: of ``auto`` one per GPU here, and one for 0, which trains in this process."""
    if num_workers == "auto":
        return max(1, torch.cuda.device_count())
    return max(1, as_range(num_workers)[1])
