"""FSDP: shards the weights of the base over the workers, by torch's ``fully_shard``.

With LoRA, the trainable weights are a few megabytes. They stay whole on every worker, and are trained exactly as by
plain data parallelism. With --tuning full the trainable weights, their gradients and the optimizer state are sharded
too. Checkpoints are the same files as those of the other strategies, for any number of workers.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from voxray.batches.rank import Worker
from voxray.models.adapters.lora import adapter_tensors, trainable_parameters
from voxray.models.hf_files import unwrap_peft
from voxray.models.interface import Batch, ModelFamily, OutputFn
from voxray.models.parts.layer_units import LayerUnit, find_units
from voxray.training.engine import (
    CheckpointState,
    DataParallel,
    OptimizerState,
    copy_to_cpu,
    init_single_process_group,
    sum_over_workers,
)
from voxray.training.sharded_weights import OwnPasses, convert


class Fsdp(DataParallel):
    """Data parallelism with sharded weights.

    Args:
        model: Model with the same weights on every worker, on the CPU. Weights that are mapped from files take no
            memory.
        dtypes: Type of each parameter in training; parameters that are not listed keep theirs.
        with_audio: Whether any row of the run has audio.
        offload_optimizer: Keep sharded trainable weights and their optimizer state in the memory of the CPU.
    """

    shards_output = True

    def __init__(
        self,
        model: Any,
        family: ModelFamily,
        worker: Worker,
        *,
        dtypes: Mapping[torch.nn.Parameter, torch.dtype],
        with_audio: bool,
        offload_optimizer: bool,
        lr: float,
        weight_decay: float,
        fused: bool = False,
    ) -> None:
        init_single_process_group(worker)
        trainable = [parameter for _, parameter in trainable_parameters(model)]
        has_lora = unwrap_peft(model) is not model
        self._units = find_units(model, trainable if has_lora else ())
        self._roles_in_every_pass = list(family.roles) if with_audio else []
        self._root = _shard(model, self._units, worker.device, dtypes, offload_optimizer)
        self._own_passes = OwnPasses(self._units, _gather_once)
        super().__init__(model, family, worker, lr=lr, weight_decay=weight_decay, fused=fused)

    def run_pass(self, batch: Batch, positions_N: torch.Tensor, output: OutputFn) -> torch.Tensor:
        roles = self._roles_in_every_pass
        answer = partial(self._family.answer_logits, self.model, batch, positions_N, output, roles_in_every_pass=roles)
        return self._root(answer)

    def reduce(self, numbers: torch.Tensor, *, scale: float, max_norm: float) -> tuple[list[float], float]:
        sharded = [parameter for parameter in self._parameters if isinstance(parameter, DTensor)]
        if not sharded:
            return super().reduce(numbers, scale=scale, max_norm=max_norm)
        whole = [parameter for parameter in self._parameters if not isinstance(parameter, DTensor)]
        sums = sum_over_workers(whole, numbers, self.worker)  # FSDP has summed the gradients of sharded parameters
        squares = torch.zeros((), dtype=torch.float64, device=self.worker.device)
        for parameter in sharded:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            squares += _square(_local(parameter.grad)).to(squares.device)
        dist.all_reduce(squares)
        for grad in (parameter.grad for parameter in whole):
            assert grad is not None
            squares += _square(grad)
        norm = float(squares) ** 0.5 / scale
        factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0  # as in torch's clip_grad_norm_
        if (factor := factor / scale) != 1:
            for grad in (parameter.grad for parameter in self._parameters):
                assert grad is not None
                _local(grad).mul_(factor)
        return sums.tolist(), norm

    def checkpoint_state(self) -> CheckpointState:
        """Copy the tensors of a checkpoint to rank 0. The other ranks take part and get an empty result."""
        tensors = self._whole_on_first(adapter_tensors(self.model))
        state = self.optimizer.state_dict()["state"]
        optimizer_state = {self._named[index][0]: self._whole_on_first(entry) for index, entry in state.items()}
        return CheckpointState(tensors, optimizer_state if self.worker.is_first else {})

    def _whole_on_first(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies on the CPU, gathered one by one, on rank 0. Empty on other ranks."""
        copies: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            whole = _gather_tensor(tensor, self.worker) if isinstance(tensor, DTensor) else tensor
            if self.worker.is_first:
                copies |= copy_to_cpu({name: whole})
        return copies

    def load_optimizer_state(self, optimizer_state: OptimizerState) -> None:
        state: OptimizerState = {}
        for name, parameter in self._named if optimizer_state else ():
            entry = optimizer_state[name]
            if isinstance(parameter, DTensor):
                entry = {key: _shard_like(tensor, parameter) for key, tensor in entry.items()}
            state[name] = entry
        super().load_optimizer_state(state)

    def own_passes(self) -> AbstractContextManager[None]:
        return self._own_passes()


class _Passes(torch.nn.Module):
    """Runs passes of a model. FSDP needs one module that every pass of training goes through."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def _shard(
    model: torch.nn.Module,
    units: Sequence[LayerUnit],
    device: torch.device,
    dtypes: Mapping[torch.nn.Parameter, torch.dtype],
    offload_optimizer: bool,
) -> torch.nn.Module:
    """Move a model to the device unit by unit, and shard each; returns the module for the passes of training."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    sharded = {parameter for unit in units for parameter in unit.parameters}
    whole = {parameter for parameter in model.parameters() if parameter not in sharded}
    for parameter in whole:
        convert(parameter, device, dtypes.get(parameter))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": whole}
    for unit in units:
        for parameter in unit.parameters:
            convert(parameter, device, dtypes.get(parameter))
        trains = any(parameter.requires_grad for parameter in unit.parameters)
        offload = CPUOffloadPolicy(device.type == "cuda") if offload_optimizer and trains else OffloadPolicy()
        modules = list(unit.modules) if unit.modules[1:] else unit.modules[0]
        fully_shard(modules, **options, reshard_after_forward=True, offload_policy=offload)  # type: ignore[arg-type]
        for module in unit.modules:
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # the loss is already divided by the tokens of all workers
            module.set_force_sum_reduction_for_comms(True)
    root = _Passes(model)
    fully_shard(root, **options)
    root(lambda: None)  # FSDP finds out here which module is the root
    for unit in units:  # the first time outside of inference mode, whose tensors training could not use
        _gather_once(unit)
    return root


def _gather_once(unit: LayerUnit) -> None:
    """Gather the weights of a unit, and free them."""
    module = unit.modules[0]
    assert isinstance(module, FSDPModule)
    module.unshard()
    module.reshard()


def _square(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of a tensor in float64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gather_tensor(tensor: DTensor, worker: Worker) -> torch.Tensor:
    """All of a sharded tensor. Every worker calls it."""
    local = tensor.to_local().detach().to(worker.device)  # an offloaded one cannot be sent between GPUs
    shape = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(local, tensor.device_mesh, tensor.placements, **shape).full_tensor()


def _shard_like(tensor: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """This worker's part of a whole tensor, sharded like a parameter. A number of steps stays as it is."""
    if tensor.shape != parameter.shape:
        return tensor
    mesh, device = parameter.device_mesh, parameter.to_local().device
    part = distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
    shape = {"shape": part.shape, "stride": part.stride()}
    return DTensor.from_local(part.to_local().to(device), mesh, part.placements, **shape)
