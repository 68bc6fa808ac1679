"""Peak memory of a process since a reset."""

import resource
from pathlib import Path

import torch

from voxray.core.units import GIB

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ALLOCATED = "held by torch on the GPU, most of it at a time"
RESIDENT = "resident in this process, most of it at a time"
RESIDENT_EVER = "resident in this process, most of it at a time since it began: this system cannot begin anew"


class PeakMemory:
    """Memory in GiB: allocated by torch on a GPU; on a CPU, all resident memory of the process by the kernel's count.

    Attributes:
        kind: What is measured, in words.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.kind = ALLOCATED if device.type == "cuda" else RESIDENT

    def reset(self) -> None:
        """Start a new peak at the current memory."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            CLEAR.write_text("5")  # resets the high-water mark to the resident memory; see proc(5)
        except OSError:
            self.kind = RESIDENT_EVER

    def current_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / GIB
        return _status_gib("VmRSS")

    def peak_gib(self) -> float:
        """The peak since ``reset``."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GIB
        if self.kind == RESIDENT:
            return _status_gib("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB


def _status_gib(name: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / GIB
    return 0.0
