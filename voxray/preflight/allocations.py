"""Measures the peak memory that PyTorch's allocators hold during a computation."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class AllocationPeak:
    """Memory and time of a computation.

    Attributes:
        peak_bytes: Peak memory, beyond the memory held before.
        sec: Duration in seconds.
    """

    peak_bytes: int
    sec: float


@contextmanager
def _no_collection() -> Iterator[None]:
    """Turn garbage collection off: older garbage that is collected meanwhile would count as released memory."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure_allocations(work: Callable[[], Any], device: torch.device) -> AllocationPeak:
    """Call ``work`` and measure its peak memory.

    On a GPU the allocator counts the peak. On a CPU PyTorch's profiler records every allocation and release, including
    temporaries inside its kernels, but not memory of other libraries (oneDNN's scratch memory). The time on a CPU
    includes the profiler's overhead, a few microseconds per operation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, start = torch.cuda.memory_allocated(device), time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        return AllocationPeak(torch.cuda.max_memory_allocated(device) - before, time.perf_counter() - start)
    from torch.profiler import ProfilerActivity, profile

    with _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    allocated = peak = 0
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    for event in results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return AllocationPeak(peak, seconds)
