"""The memory that one worker may use on this machine."""

from dataclasses import dataclass

import torch

from voxray.core.memory import free_memory_bytes
from voxray.core.units import GIB

GPU_SHARE = 0.92
"""Share of a GPU's free memory that may be used; the rest is for CUDA itself and for fragmentation."""
CPU_SHARE = 0.9
"""Share of a machine's free memory that may be used; the rest is for the page cache."""
CONTEXT_BYTES = int(0.75 * GIB)
"""Memory that CUDA and its libraries take on a GPU before the first tensor. On a GPU of this machine it is not free."""
PROCESS_BYTES = int(0.55 * GIB)
"""Memory of a process beside its tensors: Python, torch, transformers (measured on a CPU build)."""
RAY_WORKER_BYTES = int(0.25 * GIB)
"""What Ray adds to a worker process."""
RAY_BYTES = int(2.8 * GIB)
"""Memory of Ray's own processes on this machine and of the job's driver."""


@dataclass(frozen=True)
class GpuType:
    """A type of GPU that ``preflight --gpu`` knows.

    Attributes:
        gib: Memory in GiB that torch reports, rounded down.
        has_bfloat16: Whether it computes in bfloat16 and TF32.
    """

    gib: float
    has_bfloat16: bool = True


GPUS = {
    "h200": GpuType(139.0),
    "h100": GpuType(79.0),
    "a100-80": GpuType(79.0),
    "a100-40": GpuType(39.0),
    "l4": GpuType(22.0),
    "t4": GpuType(14.5, has_bfloat16=False),
}
"""{value of --gpu: its GPU}."""


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


def worker_budget(num_workers: int, memory_gib: float, gpu: str = "", *, uses_ray: bool = False) -> Budget:
    """The budget of each of ``num_workers`` workers.

    Args:
        memory_gib: The user's limit per worker; 0 uses the free memory of this machine.
        gpu: GPU of each worker, on other machines (a name of ``GPUS``); "" for this machine.
        uses_ray: Whether the workers are Ray's, which takes memory of this machine too.
    """
    has_gpu = bool(gpu) or torch.cuda.is_available()
    if gpu and not memory_gib:
        free = int(GPUS[gpu].gib * GIB) - CONTEXT_BYTES
        source = f"{GPU_SHARE:.0%} of --gpu {gpu} ({GPUS[gpu].gib:g} GiB)"
        source += f" without {CONTEXT_BYTES / GIB:.2g} GiB for CUDA"
        return Budget(int(free * GPU_SHARE), source, True)
    if memory_gib:
        return Budget(int(memory_gib * GIB), f"--memory_gib {memory_gib:g}", has_gpu)
    if has_gpu:
        devices = range(min(num_workers, torch.cuda.device_count()))
        free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
        return Budget(int(free * GPU_SHARE), f"{GPU_SHARE:.0%} of the {free / GIB:.1f} GiB free on a GPU", True)
    free = free_memory_bytes()
    process, ray = PROCESS_BYTES + RAY_WORKER_BYTES * uses_ray, RAY_BYTES * uses_ray
    each = int((free * CPU_SHARE - ray) / num_workers) - process
    source = f"{CPU_SHARE:.0%} of the {free / GIB:.1f} GiB free here, for {num_workers} worker(s)"
    source += f", less {process / GIB:.2g} GiB for each process"
    return Budget(max(0, each), source + (f" and {ray / GIB:.2g} GiB for Ray" if ray else ""), False)
