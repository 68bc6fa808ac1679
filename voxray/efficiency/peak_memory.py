"""The most memory that a process holds within a span of time."""

import resource
from pathlib import Path

import torch

from voxray.core.units import GIB

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ALLOCATED = "held by torch on the GPU, most of it at a time"
RESIDENT = "resident in this process, most of it at a time"
RESIDENT_EVER = "resident in this process, most of it at a time since it began: this system cannot begin anew"


class PeakMemory:
    """Figures in GiB; those of a GPU are torch's own, those of a CPU the kernel's, with all that the process holds.

    Attributes:
        kind: What is counted, in words.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.kind = ALLOCATED if device.type == "cuda" else RESIDENT

    def restart(self) -> None:
        """Forget what was held until now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            CLEAR.write_text("5")  # sets the high-water mark to what is resident now; see proc(5)
        except OSError:
            self.kind = RESIDENT_EVER

    def now_gib(self) -> float:
        """What is held at this moment."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) / GIB
        return _of_status("VmRSS")

    def peak_gib(self) -> float:
        """The most since ``restart``."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GIB
        if self.kind == RESIDENT:
            return _of_status("VmHWM")
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB


def _of_status(name: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / GIB
    return 0.0
