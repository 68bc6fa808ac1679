"""Start of Ray Train's processes: check their devices, then create the process group of ``torch.distributed``."""

from dataclasses import dataclass
from typing import Any

import ray
import ray.train.torch
import torch
from ray.train.torch import TorchConfig

from voxray.cluster.placement import record_placement_group
from voxray.core.errors import RunError


@dataclass
class ProcessGroup(TorchConfig):
    """Ray Train's own set-up of ``torch.distributed``.

    If the set-up fails, Ray Train does not remove the placement group of the run. So its id is recorded first.

    Attributes:
        run: Name of the run at Ray Train.
    """

    run: str = ""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(TorchConfig().backend_cls):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        assert isinstance(backend_config, ProcessGroup)
        worker_group.execute_single(0, record_placement_group, backend_config.run)
        if faults := list(filter(None, worker_group.execute(_device_fault))):
            raise RunError(faults[0])
        super().on_start(worker_group, backend_config)


def _device_fault() -> str:
    """In a worker: why it cannot train on the device that Ray assigned to it; "" if it can."""
    if ray.train.torch.get_device().type == "cpu" or torch.cuda.is_available():
        return ""
    node = ray.util.get_node_ip_address()
    return f"node {node}: Ray reports a GPU on this node, but torch {torch.__version__} cannot use it"
