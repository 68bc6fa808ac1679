"""DeepSpeed's ZeRO: the optimizer's moments and the gradients, and at stage 3 the weights, divided over the workers.

It computes what ``DataParallel`` does, and its checkpoints are the same files for any number of workers. Three things
are done here and not by DeepSpeed. Gradients are added up, not averaged, because a loss is already divided by the
tokens of all workers; so DeepSpeed's mean is multiplied by their number. Norm and clipping come before the step, which
the guard may still refuse. And checkpoints hold whole tensors, where DeepSpeed's own can only be read by as many
workers as wrote them.

Names of DeepSpeed's optimizers that are no documented interface: ``averaged_gradients``,
``single_partition_of_fp32_groups``, ``fp32_partitioned_groups_flat``, ``_lazy_init_hp_params_optimizer_state`` and
``_hp_optimizer_states_linked``.
``tests/training/test_zero.py`` fails where another version gives them another meaning.
"""

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from voxray.batches.rank import Worker
from voxray.core.errors import RunError
from voxray.models.adapters.lora import adapter_tensors, find_role
from voxray.models.interface import ModelFamily
from voxray.training.engine import CheckpointState, OptimizerState, copied, parameter_groups

MOST_BUCKET_ELEMENTS = 100_000_000
"""Gradients that travel in one message at most: 400 MB in float32, which are set aside for it."""
OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")


class Zero:
    """An ``Engine`` on top of DeepSpeed.

    Args:
        model: On every worker with the same weights, on the worker's device.
        family: Makes the forward pass.
        stage: 2 divides gradients and moments, 3 the weights as well.
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
        with_audio: bool,
        lr: float,
        weight_decay: float,
    ) -> None:
        self.model, self.worker, self._stage = model, worker, stage
        self._named, groups = parameter_groups(model, family)
        self._stored = adapter_tensors(model)
        self._linked = False
        parameters = [parameter for _, parameter in self._named]
        # the same choice as in DataParallel, so that runs can change between the two
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, foreach=False)
        self._deepspeed = _import_deepspeed(worker)
        trained = {find_role(name, family) for name, _ in self._named}
        roles_in_every_pass = set(family.roles) if stage == 3 and with_audio else trained
        self._engine, self._zero, *_ = self._deepspeed.initialize(
            model=_Forward(model, family, sorted(roles_in_every_pass)),
            model_parameters=parameters,
            optimizer=self.optimizer,
            config=_config(stage, sum(parameter.numel() for parameter in parameters)),
            dist_init_required=False,
        )

    def logits(self, batch: dict[str, torch.Tensor], keep_BL: torch.Tensor) -> torch.Tensor:
        return self._engine(batch, keep_BL)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def reduce(self, scalars: Sequence[float], *, scale: float, max_norm: float) -> tuple[list[float], float]:
        grads = self._gradients()
        numbers = torch.tensor([*scalars, 0.0], dtype=torch.float64, device=self.worker.device)
        for grad in grads:
            numbers[-1] += torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        dist.all_reduce(numbers)
        *sums, square = numbers.tolist()
        factor = self.worker.world_size / scale  # here and not on the loss, which could overflow in float16
        norm = square**0.5 * factor
        if max_norm:
            factor *= min(1.0, max_norm / (norm + 1e-6))  # as torch's clip_grad_norm_
        for grad in grads:
            grad.mul_(factor)
        return sums, norm

    def apply(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if self._stage < 3 and not self._linked:
            # DeepSpeed links moments to parameters after the first group's step, when the others have none yet
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()
            self._linked = True

    def drop(self) -> None:
        """DeepSpeed has no call for this, but skips a step whose gradients are not finite and forgets them."""
        for grad in self._gradients():
            grad.fill_(float("nan"))
        self._engine.step()

    def state(self) -> CheckpointState:
        """A copy of what a checkpoint keeps, on rank 0; the others take part and get nothing."""
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self._stored.items():  # one by one: all together may not fit
            with self._deepspeed.zero.GatheredParameters([tensor], enabled=self._stage == 3):
                if self.worker.is_first:
                    tensors |= copied({name: tensor})
        moments: OptimizerState = {}
        taken = next(iter(self.optimizer.state.values()), {}).get("step")
        for name, parameter in self._named if taken is not None else ():
            entry: dict[str, Any] = {key: safe_get_full_optimizer_state(parameter, key) for key in OPTIMIZER_STATES}
            entry["step"] = taken
            if self.worker.is_first:
                moments[name] = copied(entry)
        return CheckpointState(tensors, moments)

    def load_moments(self, moments: OptimizerState) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not moments:
            return
        step = next(iter(moments.values()))["step"]
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:  # DeepSpeed makes them at the first step
            zeros = {key: torch.zeros_like(flat) for key in OPTIMIZER_STATES}
            self.optimizer.state[flat] = {"step": step.clone(), **zeros}
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._named:
            for key in OPTIMIZER_STATES:
                safe_set_full_optimizer_state(parameter, moments[name][key].to(self.worker.device), key)

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        with self._deepspeed.zero.unwrap_model_for_generation(self._engine):
            yield

    def _gradients(self) -> list[torch.Tensor]:
        """This worker's part of the step's gradients, added up over the workers."""
        return [grad for part in self._zero.averaged_gradients.values() for grad in part]


class _Forward(torch.nn.Module):
    """The forward pass as a module, which is what DeepSpeed takes.

    Args:
        roles_in_every_pass: Roles that take part in every pass, because all workers must use the same weights.
    """

    def __init__(self, model: torch.nn.Module, family: ModelFamily, roles_in_every_pass: Sequence[str]) -> None:
        super().__init__()
        self.model, self._family, self._roles_in_every_pass = model, family, roles_in_every_pass

    def forward(self, batch: dict[str, torch.Tensor], keep_BL: torch.Tensor) -> torch.Tensor:
        return self._family.answer_logits(self.model, batch, keep_BL, roles_in_every_pass=self._roles_in_every_pass)


def _config(stage: int, trainable: int) -> dict[str, Any]:
    """DeepSpeed's settings; its float16 and bfloat16 modes stay off, as what trains is float32."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": min(trainable, MOST_BUCKET_ELEMENTS),
    }
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, but used only to count samples
        "gradient_accumulation_steps": 1,  # the loop says which backward pass is a step's last one
        "gradient_clipping": 0.0,  # done by ``reduce``; left out, it would clip to a norm of 1
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _import_deepspeed(worker: Worker) -> Any:
    """Import DeepSpeed for the device the worker has, quietly, with a process group.

    Raises:
        RunError: It is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise RunError("--strategy deepspeed: needs DeepSpeed, which is not installed (pip install deepspeed)")
    if worker.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it takes what the installed torch was built for
    os.environ["LOCAL_RANK"] = str(worker.device.index or 0)  # it computes on the device of this number
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # calls it makes, every step
    # it would compile its own messages between processes of one CPU machine, which needs a compiler and gains nothing
    deepspeed.ops.__compatible_ops__ = {}  # type: ignore[attr-defined]
    if not dist.is_initialized():  # one process by itself
        backend = "nccl" if worker.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=worker.rank, world_size=worker.world_size)
    return deepspeed
