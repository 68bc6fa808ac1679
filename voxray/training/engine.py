"""How workers compute an optimizer step together: the ``Engine`` protocol, and plain data parallelism.

With LoRA a few megabytes train, so data parallelism is a single all-reduce of one flat buffer per optimizer step.
Unlike DistributedDataParallel, this works whichever parts of the model a batch used: microbatches of text alone leave
the projector without gradients on some ranks. The order of additions never changes, so runs are reproducible bit for
bit on any number of ranks.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from voxray.batches.rank import Worker
from voxray.models.adapters.lora import adapter_tensors, trainable_parameters
from voxray.models.interface import Batch, ModelFamily, OutputFn

OptimizerState = dict[str, dict[str, torch.Tensor]]
"""{parameter name: {"step", "exp_avg", "exp_avg_sq"}}, as AdamW names them."""


@dataclass(frozen=True)
class CheckpointState:
    """The tensors of a checkpoint, on the CPU. They do not depend on the number of workers.

    Attributes:
        tensors: Tensors of the adapter, by their names in its file.
        optimizer_state: State of the optimizer, by parameter.
    """

    tensors: dict[str, torch.Tensor]
    optimizer_state: OptimizerState


class Engine(Protocol):
    """Computes optimizer steps on all workers together. Every worker makes the same calls, in the same order.

    Attributes:
        shards_output: Whether the output layer is sharded, so that all workers have to call it equally often.
    """

    shards_output: bool

    def run_pass(self, batch: Batch, positions_N: torch.Tensor, output: OutputFn) -> torch.Tensor:
        """Run the forward pass, as the family's ``answer_logits`` does."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of one microbatch to those of the step; ``last`` marks the last microbatch of the step."""

    def reduce(self, numbers: torch.Tensor, *, scale: float, max_norm: float) -> tuple[list[float], float]:
        """Sum gradients and other numbers over the workers, and clip the gradients.

        Args:
            numbers: One-dimensional, float32, on the worker's device.
            scale: Factor of the losses; gradients are divided by it.
            max_norm: Maximum norm of all gradients together; 0 does not clip.
        Returns:
            The sums of the numbers, and the gradient norm before clipping.
        """
        ...

    def apply(self, lr: float) -> None:
        """Apply the step with this learning rate and clear the gradients."""

    def drop(self) -> None:
        """Clear the gradients without applying the step."""

    def checkpoint_state(self) -> CheckpointState:
        """Copy the tensors of a checkpoint. The result may be empty on other ranks than 0."""
        ...

    def load_optimizer_state(self, optimizer_state: OptimizerState) -> None:
        """Restore the optimizer state of all trainable parameters; empty for a new run."""

    def own_passes(self) -> AbstractContextManager[None]:
        """A context in which every worker may run the model on its own, any number of times.

        In it a worker does not train, and does not communicate with the others. It ends when all workers are done.
        """
        ...


class DataParallel:
    """Plain data parallelism: every worker holds the whole model and optimizer.

    Args:
        model: Model with the same weights on every worker.
        family: Family whose ``answer_logits`` is the forward pass.
        fused: Use PyTorch's fused AdamW, and compute the norm of the gradients together.
    """

    shards_output = False

    def __init__(
        self, model: Any, family: ModelFamily, worker: Worker, *, lr: float, weight_decay: float, fused: bool = False
    ) -> None:
        self.model, self.worker, self._family = model, worker, family
        self._named, groups = parameter_groups(model, family)
        self._parameters = [parameter for _, parameter in self._named]
        self._fused = fused  # fused, foreach and plain round differently, so a run has to keep one of them
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, foreach=False, fused=fused)

    def run_pass(self, batch: Batch, positions_N: torch.Tensor, output: OutputFn) -> torch.Tensor:
        return self._family.answer_logits(self.model, batch, positions_N, output)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def reduce(self, numbers: torch.Tensor, *, scale: float, max_norm: float) -> tuple[list[float], float]:
        sums = sum_over_workers(self._parameters, numbers, self.worker)
        if scale != 1:
            grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
            torch.ops.aten._foreach_mul_(grads, 1 / scale)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, max_norm or float("inf"), foreach=self._fused)
        *values, norm_value = torch.cat([sums, norm[None]]).tolist()  # one read, because a read waits for the GPU
        return values, norm_value

    def apply(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def checkpoint_state(self) -> CheckpointState:
        if not self.worker.is_first:
            return CheckpointState({}, {})
        by_index = self.optimizer.state_dict()["state"]
        optimizer_state = {self._named[index][0]: copy_to_cpu(entry) for index, entry in by_index.items()}
        return CheckpointState(copy_to_cpu(adapter_tensors(self.model)), optimizer_state)

    def load_optimizer_state(self, optimizer_state: OptimizerState) -> None:
        state = {index: optimizer_state[name] for index, (name, _) in enumerate(self._named) if optimizer_state}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def own_passes(self) -> AbstractContextManager[None]:
        return nullcontext()


def parameter_groups(
    model: Any, family: ModelFamily
) -> tuple[list[tuple[str, torch.nn.Parameter]], list[dict[str, Any]]]:
    """Trainable parameters by name, in the optimizer's order, and the optimizer's parameter groups.

    Parameters with weight decay come first, then those that the family excludes from it.
    """
    decaying, excluded = [], []
    for name, parameter in trainable_parameters(model):
        (excluded if family.no_decay(name, parameter) else decaying).append((name, parameter))
    groups: list[dict[str, Any]] = [{"params": [parameter for _, parameter in decaying]}] if decaying else []
    if excluded:
        groups.append({"params": [parameter for _, parameter in excluded], "weight_decay": 0.0})
    return [*decaying, *excluded], groups


def copy_to_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU, also those that are there, because the next step changes them in place."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def sum_over_workers(parameters: Sequence[torch.nn.Parameter], numbers: torch.Tensor, worker: Worker) -> torch.Tensor:
    """Sum the gradients over the workers in place, and other numbers in the same message.

    Args:
        parameters: The trainable parameters. One without a gradient gets a gradient of zeros.
        numbers: One-dimensional, float32, on the worker's device.
    Returns:
        The sums of the numbers.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if worker.world_size == 1:
        return numbers
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(grad.reshape(-1).float() for grad in grads), numbers])
    dist.all_reduce(flat)
    *summed, numbers = flat.split([*(grad.numel() for grad in grads), len(numbers)])
    # one launch on a GPU for many tensors, as torch's optimizers do it; there is no public name
    torch.ops.aten._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(summed, grads, strict=True)])
    return numbers


def init_single_process_group(worker: Worker) -> None:
    """Create the process group of a single process, which has none."""
    if not dist.is_initialized():
        backend = "nccl" if worker.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=worker.rank, world_size=worker.world_size)


def gather(value: object, worker: Worker) -> list[object]:
    """Gather the values of all workers on every worker, in the order of ranks."""
    if worker.world_size == 1:
        return [value]
    values: list[object] = [None] * worker.world_size
    dist.all_gather_object(values, value)
    return values
