"""What the machine says of itself while a run trains: memory, and the GPU's load and power where there is one."""

import resource
import time
from typing import Any

import torch

from voxray.core.units import GIB

SECONDS_BETWEEN_READINGS = 1.0


class GpuStats:
    """Readings for one training process and its device.

    The GPU's own figures come from NVML and are asked for once a second at most; in between, the last ones are given
    again. Whatever NVML does not offer (no GPU, a part of one, an old driver) is absent, and never an error.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml, self._handle = _open_nvml(device)
        self._last: dict[str, float] = {}
        self._last_time = -float("inf")

    def read(self) -> dict[str, float]:
        """The figures to record with a step.

        Returns:
            peak_memory_gib: Most memory held so far, GiB: by torch on this process' GPU, or, on a CPU, resident in it.
            gpu_util_percent: Share of the last moment in which the GPU was busy.
            gpu_memory_gib: Memory in use on the GPU, by all processes, GiB.
            gpu_power_w: Power drawn, watts.
        """
        if self._handle is not None and time.monotonic() - self._last_time >= SECONDS_BETWEEN_READINGS:
            self._last, self._last_time = self._gpu_figures(), time.monotonic()
        return {"peak_memory_gib": self._peak_memory_gib(), **self._last}

    def _peak_memory_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB

    def _gpu_figures(self) -> dict[str, float]:
        nvml, handle = self._nvml, self._handle
        asked = {
            "gpu_util_percent": lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "gpu_memory_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
            "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,  # NVML gives milliwatts
        }
        found = {}
        for name, ask in asked.items():
            try:
                found[name] = ask()
            except nvml.NVMLError:
                continue
        return found


def _open_nvml(device: torch.device) -> tuple[Any, Any]:
    """NVML and its handle of a GPU, or (None, None)."""
    if device.type != "cuda":
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        # by its identity: NVML numbers all GPUs of the machine, torch those that CUDA_VISIBLE_DEVICES leaves
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None, None
