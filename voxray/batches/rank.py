"""A training process and its rank among the others."""

from dataclasses import dataclass

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Worker:
    """One training process.

    Attributes:
        rank: From 0; rank 0 writes the run folder.
        world_size: Number of processes.
        device: Device of the model.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0
