"""How much memory PyTorch holds while something is computed, and most of all: exactly, by its own allocators."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class AllocationPeak:
    """What computing something took.

    Attributes:
        peak_bytes: Most memory held at a time, beyond what was held before.
        sec: Seconds.
    """

    peak_bytes: int
    sec: float


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage of before, collected meanwhile, would count as released."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure_allocations(work: Callable[[], Any], device: torch.device) -> AllocationPeak:
    """Run something and see how much memory it takes.

    On a GPU the allocator keeps that count itself. On a CPU PyTorch's profiler notes every allocation and release, of
    temporaries inside its kernels as well; what other libraries take for themselves (oneDNN's scratch memory) is not
    seen. The time of a CPU therefore includes that of taking notes, a few microseconds an operation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, started = torch.cuda.memory_allocated(device), time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return AllocationPeak(torch.cuda.max_memory_allocated(device) - before, time.perf_counter() - started)
    from torch.profiler import ProfilerActivity, profile

    with _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as notes:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    held = most = 0
    results: Any = notes.profiler.kineto_results  # type: ignore[union-attr]
    for event in results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return AllocationPeak(most, seconds)
