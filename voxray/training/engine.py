"""What a training process is, and how several of them add up their gradients.

Only LoRA weights train, a few megabytes, so data parallelism is one all-reduce of one flat buffer per optimizer step.
Unlike DistributedDataParallel it does not care which parts of the model a batch used (text-only packs leave the
projector without gradients on some ranks), and its order of additions never changes, so runs are reproducible to the
bit on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Worker:
    """One training process.

    Attributes:
        rank: From 0; rank 0 writes.
        world_size: Number of processes.
        device: Where the model is.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def sum_over_workers(parameters: Sequence[torch.nn.Parameter], scalars: Sequence[float], worker: Worker) -> list[float]:
    """Add up the gradients of all workers in place, and a few numbers with them in the same message.

    Args:
        parameters: What trains; a parameter without gradient counts as zero and gets a zero gradient.
        scalars: Numbers to add up over the workers.
    Returns:
        The sums of the scalars.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if worker.world_size == 1:
        return list(scalars)
    numbers = torch.tensor(list(scalars), dtype=torch.float32, device=worker.device)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(grad.reshape(-1).float() for grad in grads), numbers])
    dist.all_reduce(flat)
    place = 0
    for grad in grads:
        grad.copy_(flat[place : place + grad.numel()].view_as(grad))
        place += grad.numel()
    return flat[place:].tolist()


def gather(value: object, worker: Worker) -> list[object]:
    """Every worker's value, in the order of ranks, on every worker."""
    if worker.world_size == 1:
        return [value]
    values: list[object] = [None] * worker.world_size
    dist.all_gather_object(values, value)
    return values
