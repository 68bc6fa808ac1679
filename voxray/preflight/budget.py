"""The memory that one worker may use on this machine."""

from dataclasses import dataclass

import torch

from voxray.core.units import GIB
from voxray.preflight.machine import free_memory_bytes

GPU_SHARE = 0.92
"""Share of a GPU's free memory that may be used; the rest is for CUDA itself and for fragmentation."""
CPU_SHARE = 0.9
"""Share of a machine's free memory that may be used; the rest is for Ray, the driver and the page cache."""
GPU_GIB = {"h200": 139.0, "h100": 79.0, "a100-80": 79.0, "a100-40": 39.0, "l4": 22.0, "t4": 14.5}
"""{GPU: memory in GiB that torch reports for it, rounded down}."""
CONTEXT_BYTES = int(0.75 * GIB)
"""Memory that CUDA and its libraries take on a GPU before the first tensor. On a GPU of this machine it is not free."""
PROCESS_BYTES = int(0.8 * GIB)
"""Memory of a worker process beside its tensors: Python, torch, transformers, Ray (0.7 GiB resident on a CPU build)."""


@dataclass(frozen=True)
class Budget:
    """The memory that one worker may use for tensors.

    Attributes:
        num_bytes: The limit.
        source: Where the limit comes from, for the report.
        on_gpu: Whether it is a GPU's memory.
    """

    num_bytes: int
    source: str
    on_gpu: bool


def worker_budget(num_workers: int, memory_gib: float, gpu: str = "") -> Budget:
    """The budget of each of ``num_workers`` workers.

    Args:
        memory_gib: The user's limit per worker; 0 uses the free memory of this machine.
        gpu: GPU of each worker, on other machines (a name of ``GPU_GIB``); "" for this machine.
    """
    has_gpu = bool(gpu) or torch.cuda.is_available()
    if gpu and not memory_gib:
        free = int(GPU_GIB[gpu] * GIB) - CONTEXT_BYTES
        source = f"{GPU_SHARE:.0%} of --gpu {gpu} ({GPU_GIB[gpu]:g} GiB) without {CONTEXT_BYTES / GIB:.2g} GiB for CUDA"
        return Budget(int(free * GPU_SHARE), source, True)
    if memory_gib:
        return Budget(int(memory_gib * GIB), f"--memory_gib {memory_gib:g}", has_gpu)
    if has_gpu:
        devices = range(min(num_workers, torch.cuda.device_count()))
        free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
        return Budget(int(free * GPU_SHARE), f"{GPU_SHARE:.0%} of the {free / GIB:.1f} GiB free on a GPU", True)
    free = free_memory_bytes()
    each = int(free * CPU_SHARE / num_workers) - PROCESS_BYTES
    source = f"{CPU_SHARE:.0%} of the {free / GIB:.1f} GiB free here, for {num_workers} worker(s)"
    return Budget(max(0, each), f"{source}, less {PROCESS_BYTES / GIB:.1f} GiB for each process", False)
