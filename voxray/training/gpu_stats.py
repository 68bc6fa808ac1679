"""Memory of a training process, and utilization, memory and power of its GPU."""

import resource
import time
from contextlib import suppress
from typing import Any

import torch

from voxray.core.units import GIB

SECONDS_BETWEEN_READINGS = 1.0


class GpuStats:
    """Reads the statistics of one training process and its device.

    The GPU's values come from NVML, which is queried once a second at most. In between, the last values are returned
    again. Values that NVML does not provide (no GPU, a MIG slice, an old driver) are left out and cause no error.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml, self._handle = _open_nvml(device)
        self._last: dict[str, float] = {}
        self._last_time = -float("inf")

    def read(self) -> dict[str, float]:
        """The values to record with a step.

        Returns:
            peak_memory_gib: Peak memory so far, in GiB: allocated by torch on the GPU, or the resident memory of the
                process on a CPU.
            gpu_util_percent: Share of NVML's last sampling period in which the GPU was busy.
            gpu_memory_gib: Memory in use on the GPU, by all processes, in GiB.
            gpu_power_w: Power draw, in watts.
        """
        if self._handle is not None and time.monotonic() - self._last_time >= SECONDS_BETWEEN_READINGS:
            self._last, self._last_time = self._query_gpu(), time.monotonic()
        return {"peak_memory_gib": self._peak_memory_gib(), **self._last}

    def _peak_memory_gib(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB  # Linux counts in KiB

    def _query_gpu(self) -> dict[str, float]:
        nvml, handle = self._nvml, self._handle
        queries = {
            "gpu_util_percent": lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "gpu_memory_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
            "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,  # NVML reports milliwatts
        }
        values = {}
        for name, query in queries.items():
            with suppress(nvml.NVMLError):
                values[name] = query()
        return values


def _open_nvml(device: torch.device) -> tuple[Any, Any]:
    """NVML and its handle of the GPU, or (None, None)."""
    if device.type != "cuda":
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        # by UUID: NVML numbers all GPUs of the machine, torch only those in CUDA_VISIBLE_DEVICES
        uuid = torch.cuda.get_device_properties(device).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None, None
