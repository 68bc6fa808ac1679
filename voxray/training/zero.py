"""DeepSpeed's ZeRO: shards optimizer state and gradients over the workers, and at stage 3 also the weights.

It computes the same as ``DataParallel``, and its checkpoints are the same files for any number of workers. It does
three things itself instead of leaving them to DeepSpeed:

- Gradients are summed, not averaged, because a loss is already divided by the tokens of all workers. So DeepSpeed's
  mean is multiplied by the number of workers.
- The gradient norm is computed and clipped before the step, which the ``LossScaler`` may still skip.
- Checkpoints hold whole tensors. DeepSpeed's own can only be read by the number of workers that wrote them.

These attributes of DeepSpeed's optimizers are not a documented interface: ``averaged_gradients``,
``single_partition_of_fp32_groups``, ``fp32_partitioned_groups_flat``, ``_lazy_init_hp_params_optimizer_state`` and
``_hp_optimizer_states_linked``. ``tests/training/test_sharding.py`` fails if a new version changes their meaning.
"""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from voxray.batches.rank import Worker
from voxray.core.errors import RunError
from voxray.models.adapters.lora import adapter_tensors, find_role
from voxray.models.interface import Batch, ModelFamily, OutputFn
from voxray.models.parts.layer_units import LayerUnit, around_forward, find_units
from voxray.training.engine import (
    CheckpointState,
    OptimizerState,
    copy_to_cpu,
    init_single_process_group,
    parameter_groups,
)
from voxray.training.sharded_weights import OwnPasses, convert

MAX_BUCKET_ELEMENTS = 100_000_000
"""Maximum gradients in one message. DeepSpeed allocates a buffer of this size, 400 MB in float32."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero:
    """An ``Engine`` on top of DeepSpeed.

    Args:
        model: Model with the same weights on every worker, for stage 2 on the worker's device and for stage 3 on the
            CPU. Weights that are mapped from files take no memory.
        family: Family whose ``answer_logits`` is the forward pass.
        stage: 2 shards gradients and optimizer state, 3 also the weights.
        dtypes: Stage 3: type of each parameter in training; parameters that are not listed keep theirs.
        with_audio: Whether any row of the run has audio.
    Raises:
        RunError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        model: Any,
        family: ModelFamily,
        worker: Worker,
        *,
        stage: int,
        dtypes: Mapping[torch.nn.Parameter, torch.dtype],
        with_audio: bool,
        lr: float,
        weight_decay: float,
        fused: bool = False,
    ) -> None:
        self.model, self.worker, self._stage, self.shards_output = model, worker, stage, stage == 3
        self._named, groups = parameter_groups(model, family)
        self._adapter = adapter_tensors(model)
        self._is_linked = False
        parameters = [parameter for _, parameter in self._named]
        # the same options as in DataParallel, so that a run can switch between the two
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, foreach=False, fused=fused)
        units = find_units(model) if stage == 3 else []
        largest = max((sum(each.numel() for each in unit.parameters) for unit in units), default=0)
        num_trainable = sum(parameter.numel() for parameter in parameters)  # 0 when they are sharded
        self._deepspeed = _import_deepspeed(worker)
        if stage == 3:
            in_units = {parameter for unit in units for parameter in unit.parameters}
            self._other_parameters = [parameter for parameter in model.parameters() if parameter not in in_units]
            self._own_passes = OwnPasses(units, self._gather_once)
            _partition(self._deepspeed, model, worker.device, dtypes)
        trained_roles = {find_role(name, family) for name, _ in self._named}
        roles_in_every_pass = set(family.roles) if stage == 3 and with_audio else trained_roles
        self._engine, self._zero, *_ = self._deepspeed.initialize(
            model=_Forward(model, family, sorted(roles_in_every_pass)),
            model_parameters=parameters,
            optimizer=self.optimizer,
            config=_config(stage, num_trainable, largest),
            dist_init_required=False,
        )

    def run_pass(self, batch: Batch, positions_N: torch.Tensor, output: OutputFn) -> torch.Tensor:
        return self._engine(batch, positions_N, output)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def reduce(self, numbers: torch.Tensor, *, scale: float, max_norm: float) -> tuple[list[float], float]:
        grads = self._gradients()
        numbers = torch.cat([numbers.double(), numbers.new_zeros(1, dtype=torch.float64)])
        for grad in grads:
            numbers[-1] += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        dist.all_reduce(numbers)
        *sums, square = numbers.tolist()
        factor = self.worker.world_size / scale  # not applied to the loss, which could overflow in float16
        norm = square**0.5 * factor
        if max_norm:
            factor *= min(1.0, max_norm / (norm + 1e-6))  # as in torch's clip_grad_norm_
        for grad in grads:
            grad.mul_(factor)
        return sums, norm

    def apply(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if self._stage < 3 and not self._is_linked:
            # DeepSpeed links the state to parameters after the step of the first group, when other groups have none
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
            self._is_linked = True

    def drop(self) -> None:
        """Clear the gradients by a step with NaN gradients, which DeepSpeed skips. It has no call to clear them."""
        for grad in self._gradients():
            grad.fill_(float("nan"))
        self._engine.step()

    def checkpoint_state(self) -> CheckpointState:
        """Copy the tensors of a checkpoint to rank 0. The other ranks take part and get an empty result."""
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self._adapter.items():  # one by one, because all together may not fit in memory
            with self._deepspeed.zero.GatheredParameters([tensor], enabled=self._stage == 3):
                if self.worker.is_first:
                    tensors |= copy_to_cpu({name: tensor})
        optimizer_state: OptimizerState = {}
        num_steps = next(iter(self.optimizer.state.values()), {}).get("step")
        for name, parameter in self._named if num_steps is not None else ():
            entry: dict[str, Any] = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            entry["step"] = num_steps
            if self.worker.is_first:
                optimizer_state[name] = copy_to_cpu(entry)
        return CheckpointState(tensors, optimizer_state)

    def load_optimizer_state(self, optimizer_state: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not optimizer_state:
            return
        num_steps = next(iter(optimizer_state.values()))["step"]
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:  # DeepSpeed itself creates the state at the first step
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": num_steps.clone(), **zeros}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._named:
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, optimizer_state[name][key].to(self.worker.device), key)

    @contextmanager
    def own_passes(self) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        # DeepSpeed's own hooks gather weights ahead, in the order of the last pass of training
        offload = self._zero.parameter_offload
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        units = self._own_passes.units
        hooks = [hook for unit in units for hook in around_forward(unit, partial(self._gathered, unit.parameters))]
        with self._gathered(self._other_parameters), self._own_passes():
            yield
        for hook in hooks:
            hook.remove()
        offload._register_deepspeed_module(offload.module)

    def _gather_once(self, unit: LayerUnit) -> None:
        with self._gathered(unit.parameters):
            pass

    def _gathered(self, parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
        """A context in which every worker has these parameters whole."""
        return self._deepspeed.zero.GatheredParameters(list(parameters))

    def _gradients(self) -> list[torch.Tensor]:
        """This worker's shard of the gradients of the step, averaged over the workers."""
        return [grad for group in self._zero.averaged_gradients.values() for grad in group]


class _Forward(torch.nn.Module):
    """The forward pass as a module, because DeepSpeed wraps a module.

    Args:
        roles_in_every_pass: Roles that every forward pass uses, because all workers have to use the same weights.
    """

    def __init__(self, model: torch.nn.Module, family: ModelFamily, roles_in_every_pass: Sequence[str]) -> None:
        super().__init__()
        self.model, self._family, self._roles_in_every_pass = model, family, roles_in_every_pass

    def forward(self, batch: Batch, positions_N: torch.Tensor, output: OutputFn) -> torch.Tensor:
        roles = self._roles_in_every_pass
        return self._family.answer_logits(self.model, batch, positions_N, output, roles_in_every_pass=roles)


def _partition(
    deepspeed: Any, model: torch.nn.Module, device: torch.device, dtypes: Mapping[torch.nn.Parameter, torch.dtype]
) -> None:
    """Move a model to the device and shard its parameters, module by module, so that no worker holds all of them."""
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for module in reversed(list(model.modules())):  # a module after those inside it
        own = [parameter for parameter in module.parameters(recurse=False) if not hasattr(parameter, "ds_id")]
        for parameter in own:
            convert(parameter, device, dtypes.get(parameter))
            if device.type == "cpu":  # DeepSpeed's broadcast from rank 0 would write into mapped pages
                parameter.data = parameter.data.clone()
        if own:
            deepspeed.zero.Init(module=module, mem_efficient_linear=False)


def _config(stage: int, num_trainable: int, largest_unit: int) -> dict[str, Any]:
    """DeepSpeed's settings. Its float16 and bfloat16 modes stay off, because trainable weights are float32.

    Args:
        largest_unit: Stage 3: parameters of the largest unit. A worker gathers two units at a time.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": min(num_trainable, MAX_BUCKET_ELEMENTS),
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
        zero["stage3_prefetch_bucket_size"] = largest_unit
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = 2 * largest_unit
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, but DeepSpeed only counts samples with it
        "gradient_accumulation_steps": 1,  # ``backward`` marks the last microbatch of a step
        "gradient_clipping": 0.0,  # ``reduce`` clips; the default would clip to a norm of 1
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _import_deepspeed(worker: Worker) -> Any:
    """Import DeepSpeed for the worker's device, quietly, and make sure there is a process group.

    Raises:
        RunError: It is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise RunError("--strategy deepspeed: needs DeepSpeed, which is not installed (pip install deepspeed)")
    if worker.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # the default follows from the build of torch, which may be for CUDA
    os.environ["LOCAL_RANK"] = str(worker.device.index or 0)  # DeepSpeed computes on the device with this index
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="torch.distributed"
    )  # from DeepSpeed, at every step
    # Otherwise DeepSpeed compiles its own communication for CPU machines, which needs a compiler and gains nothing.
    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
    init_single_process_group(worker)
    return deepspeed
