"""What a training process is, and how several of them add up their gradients.

Only LoRA weights train, a few megabytes, so data parallelism is one all-reduce of one flat buffer per optimizer step.
Unlike DistributedDataParallel it does not care which parts of the model a batch used (text-only packs leave the
projector without gradients on some ranks), and its order of additions never changes, so runs are reproducible to the
bit on any number of ranks.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from voxray.batches.rank import Worker
from voxray.models.adapters.lora import adapter_tensors, trainable_parameters
from voxray.models.interface import ModelFamily

OptimizerState = dict[str, dict[str, torch.Tensor]]
"""{parameter name: what the optimizer knows of it}."""


@dataclass(frozen=True)
class CheckpointState:
    """What training has changed, in memory of the CPU, the same for any number of workers.

    Attributes:
        tensors: The adapter's tensors, by the names they have in its file.
        moments: The optimizer's.
    """

    tensors: dict[str, torch.Tensor]
    moments: OptimizerState


class Engine(Protocol):
    """How several workers take a step together. Every worker makes the same calls, in the same order."""

    def logits(self, batch: dict[str, torch.Tensor], keep_BL: torch.Tensor) -> torch.Tensor:
        """The forward pass, as the family's ``answer_logits`` does it."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of one forward pass to those of the step; ``last`` marks the step's last one."""

    def reduce(self, scalars: Sequence[float], *, scale: float, max_norm: float) -> tuple[list[float], float]:
        """Add up gradients and a few numbers over the workers, and clip.

        Args:
            scale: What the losses were multiplied with; gradients are divided by it.
            max_norm: Largest norm of all gradients; 0 leaves them.
        Returns:
            The sums, and the norm before clipping.
        """
        ...

    def apply(self, lr: float) -> None:
        """Take the step with this learning rate and forget the gradients."""

    def drop(self) -> None:
        """Forget the gradients without taking the step."""

    def state(self) -> CheckpointState:
        """A copy of what a checkpoint keeps; only rank 0 is sure to get it."""
        ...

    def load_moments(self, moments: OptimizerState) -> None:
        """Put the optimizer's moments back, those of all that trains or none; the weights are in the model already."""

    def whole_model(self) -> AbstractContextManager[None]:
        """Within it every worker has all weights, and may use the model as often as it likes, but not train."""
        ...


class DataParallel:
    """Plain data parallelism: every worker holds the whole model and optimizer.

    Args:
        model: On every worker with the same weights.
        family: Makes the forward pass.
    """

    def __init__(self, model: Any, family: ModelFamily, worker: Worker, *, lr: float, weight_decay: float) -> None:
        self.model, self.worker, self._family = model, worker, family
        self._named, groups = parameter_groups(model, family)
        self._parameters = [parameter for _, parameter in self._named]
        # fused gives other bits than foreach and plain, so one of them for good
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, foreach=False)

    def logits(self, batch: dict[str, torch.Tensor], keep_BL: torch.Tensor) -> torch.Tensor:
        return self._family.answer_logits(self.model, batch, keep_BL)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def reduce(self, scalars: Sequence[float], *, scale: float, max_norm: float) -> tuple[list[float], float]:
        sums = sum_over_workers(self._parameters, scalars, self.worker)
        if scale != 1:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / scale)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, max_norm or float("inf"), foreach=False)
        return sums, float(norm)

    def apply(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.drop()

    def drop(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> CheckpointState:
        stored = self.optimizer.state_dict()["state"]
        moments = {self._named[number][0]: copied(entry) for number, entry in stored.items()}
        return CheckpointState(copied(adapter_tensors(self.model)), moments)

    def load_moments(self, moments: OptimizerState) -> None:
        state = {number: moments[name] for number, (name, _) in enumerate(self._named) if moments}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def whole_model(self) -> AbstractContextManager[None]:
        return nullcontext()


def parameter_groups(
    model: Any, family: ModelFamily
) -> tuple[list[tuple[str, torch.nn.Parameter]], list[dict[str, Any]]]:
    """What trains, in the optimizer's order, and its groups: what decays, then what the family lets decay pass by."""
    named = trainable_parameters(model)
    kept = [family.no_decay(name, parameter) for name, parameter in named]
    decaying = [entry for entry, passed_by in zip(named, kept, strict=True) if not passed_by]
    others = [entry for entry, passed_by in zip(named, kept, strict=True) if passed_by]
    groups: list[dict[str, Any]] = [{"params": [parameter for _, parameter in decaying]}] if decaying else []
    if others:
        groups.append({"params": [parameter for _, parameter in others], "weight_decay": 0.0})
    return [*decaying, *others], groups


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy that the next step does not change, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


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
