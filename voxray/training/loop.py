"""The training loop: forward, backward, add up, clip, step, validate, save.

Shape letters: B rows, L tokens, N answer positions of a batch, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxray.batches.loader import Loader
from voxray.batches.plan import Microbatch, Plan
from voxray.batches.rank import Worker
from voxray.config.salmonn import SalmonnSettings
from voxray.config.train import TrainSettings
from voxray.core.errors import RunError
from voxray.core.tasks import TASKS
from voxray.features.reader import Features
from voxray.models.interface import Batch, ModelFamily
from voxray.models.parts.losses import Logits, token_losses
from voxray.runs.run_folder import GROW_FILE, STOP_FILE
from voxray.training.best_checkpoint import BestCheckpoint
from voxray.training.checkpoint import CheckpointWriter, Progress
from voxray.training.engine import Engine, gather
from voxray.training.loss_scaling import LossScaler
from voxray.training.records import Monitor
from voxray.training.throughput import Throughput, answer_tokens, step_rows

ROWS_NAMED = 8
LOOK_SEC = 5.0
"""How often the workers look whether their machines are about to go; a look is a barrier of a few milliseconds."""


@dataclass
class TrainState:
    """A model in training with what belongs to it."""

    model: Any
    family: ModelFamily
    engine: Engine
    worker: Worker
    guard: LossScaler = field(default_factory=LossScaler)


@dataclass
class StopSignals:
    """What ends or saves a run between its steps.

    Attributes:
        run_dir: Where ``STOP_FILE`` or ``GROW_FILE`` may appear.
        is_leaving: Whether the machine of any worker is about to go; every worker asks at the same step.
    """

    run_dir: Path
    is_leaving: Callable[[], bool]
    looked: float = field(default_factory=time.monotonic)

    def local(self) -> list[float]:
        """What this worker wants, to be added up over the workers: to stop, and to look."""
        stop = any((self.run_dir / name).exists() for name in (STOP_FILE, GROW_FILE))
        return [float(stop), float(time.monotonic() - self.looked > LOOK_SEC)]

    def agreed(self, stop: float, look: float) -> tuple[bool, bool]:
        """From the sums: whether the run stops, and whether a machine is about to go."""
        leaving = False
        if look:
            leaving = self.is_leaving()
            self.looked = time.monotonic()
        return stop > 0, leaving


def fit(
    trainee: TrainState,
    loader: Loader,
    settings: TrainSettings,
    start: Progress,
    num_steps: int,
    monitor: Monitor,
    validate: Callable[[int], dict[str, float]],
    selection: BestCheckpoint,
    writer: CheckpointWriter | None,
    watch: StopSignals,
) -> int:
    """Train from ``start.step`` to ``num_steps``.

    Args:
        start: Where the run stands; its ``microbatches_per_step`` and ``data`` go into every checkpoint.
        validate: Called with the step on every worker, at the steps the settings ask for and at the end; gives the
            same metrics to all.
        selection: Keeps the best validation, and says when early stopping ends the run.
        writer: On rank 0; its last checkpoint is on disk when this returns.
        watch: What may end or save the run early.
    Returns:
        Steps done; fewer than ``num_steps`` if the run was asked to stop or early stopping ended it.
    """
    plan, step = loader.plan, start.step
    is_due = partial(_validates_at, plan, settings.eval_steps, num_steps)
    save = partial(_save, trainee, writer, start, selection)
    if is_due(step) and selection.last_step < step:  # asked to stop before this validation
        selection.update(step, validate(step))
        save(step)
    speed = Throughput(loader, trainee.worker.device)
    for number, packs in speed.timed(loader.steps(step, 0 if selection.should_stop else num_steps)):
        lr = learning_rate(settings, number, num_steps)
        record, asked = train_step(trainee, settings, plan, loader.features, number, packs, lr, watch.local())
        if writer:
            writer.wait()
        step = number + 1
        stop, leaving = watch.agreed(*asked)
        monitor.end_step(plan, loader.features, step, {**record, **speed.record(number), "lr": lr})
        if trainee.guard.bad_steps >= settings.max_bad_steps:
            raise RunError(_bad_steps(trainee, plan, loader.features, number))
        if step % settings.log_steps == 0 or step == num_steps:
            monitor.say(f"step {step}/{num_steps}  loss {record['loss']:.4f}  lr {lr:.2e}")
        better = is_due(step) and not stop and selection.update(step, validate(step))
        ends = stop or selection.should_stop or step == num_steps
        if better or ends or leaving or step % settings.save_steps == 0:
            save(step)
        if leaving:
            monitor.say(f"a machine is about to go: saved at step {step}")
        if ends:
            break
    if writer:
        writer.wait()
    return step


def _save(
    trainee: TrainState, writer: CheckpointWriter | None, start: Progress, selection: BestCheckpoint, step: int
) -> None:
    """Write a checkpoint. Every worker calls it, because the engine may have to gather what it holds."""
    state = trainee.engine.state()
    if writer:
        done = replace(start, step=step, guard=trainee.guard.state(), selection=selection.state())
        writer.write(trainee.model, state, done, selection.best_step)


def _validates_at(plan: Plan, eval_steps: int, num_steps: int, step: int) -> bool:
    """Whether a validation is due after so many steps: every ``eval_steps``, or every epoch with 0, and at the end."""
    epochs = plan.epochs_done(step)
    due = step % eval_steps == 0 if eval_steps else epochs == int(epochs)
    return step > 0 and (due or step == num_steps)


def train_step(
    trainee: TrainState,
    settings: TrainSettings,
    plan: Plan,
    features: Features,
    step: int,
    packs: list[tuple[Microbatch, Batch]],
    lr: float,
    flags: Sequence[float] = (),
) -> tuple[dict[str, float], list[float]]:
    """One optimizer step on this worker's packs.

    The loss is the mean over the answer tokens of the whole step, on all workers, so it does not depend on how the rows
    are divided. How many tokens those are is known from the plan.

    Args:
        flags: Numbers to add up over the workers in the same message as the losses.
    Returns:
        {"loss", "loss/<task>", "grad_norm", "skipped"} over all workers, and the sums of the flags.
    """
    tokens = answer_tokens(plan, features, step)
    losses = torch.zeros(len(TASKS), device=trainee.worker.device)
    loss_of_pack: list[tuple[Microbatch, torch.Tensor]] = []
    for number, (pack, batch) in enumerate(packs, 1):
        seed_pack(settings.seed, step, pack.number)
        batch = {name: tensor.to(trainee.worker.device, non_blocking=True) for name, tensor in batch.items()}
        loss_T = task_losses(trainee.engine.logits, batch, settings.label_smoothing)
        weight = float(not pack.is_filler) / tokens.sum() * trainee.guard.scale
        trainee.engine.backward(loss_T.sum() * weight, last=number == len(packs))
        losses += loss_T.detach() * float(not pack.is_filler)
        loss_of_pack.append((pack, loss_T.detach().sum()))
    numbers, norm = trainee.engine.reduce(
        [*losses.tolist(), *flags], scale=trainee.guard.scale, max_norm=settings.max_grad_norm
    )
    sums, asked = numbers[: len(TASKS)], numbers[len(TASKS) :]
    record = {"loss": sum(sums) / float(tokens.sum()), "grad_norm": norm}
    if trainee.guard.check_step(record["loss"], norm, fp16=settings.fp16):
        trainee.engine.apply(lr)
    else:
        trainee.engine.drop()
        trainee.guard.nonfinite_rows = [
            row for pack, loss in loss_of_pack if not loss.isfinite() for row in pack.rows.tolist()
        ]
    record["skipped"] = trainee.guard.skipped
    if settings.fp16:
        record["loss_scale"] = trainee.guard.scale
    for name, total, count in zip(TASKS, sums, tokens, strict=True):
        if count:
            record[f"loss/{name}"] = total / float(count)
    return record, asked


def answer_loss(model: Any, family: ModelFamily, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """``task_losses`` of a model outside training."""
    return task_losses(partial(family.answer_logits, model), batch, label_smoothing)


def task_losses(logits: Logits, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """Cross entropy summed per task, over answer tokens only.

    Args:
        logits: The forward pass.
    Returns:
        float32, shape (number of tasks,).
    """
    loss_N, keep_BL = token_losses(logits, batch, label_smoothing)
    task = batch["task"]
    task_BL = task if task.dim() == 2 else task[:, None].expand_as(keep_BL)  # packed rows have a task per token
    return torch.zeros(len(TASKS), device=loss_N.device).index_add(0, task_BL[keep_BL], loss_N)


def seed_pack(seed: int, step: int, pack: int) -> None:
    """Set the random state of one forward pass (dropout); it depends on nothing that came before."""
    state = np.random.SeedSequence([seed, step, pack]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) % 2**63)


def learning_rate(settings: TrainSettings, step: int, num_steps: int) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then the chosen shape down to 0 at the end.

    ``cosine_from_start`` is SALMONN's: warm-up from ``warmup_start_lr``, then a cosine down to ``min_lr`` over all
    steps, of which the warm-up has gone by already, so the rate falls a little where the cosine takes over.
    """
    if isinstance(settings, SalmonnSettings) and settings.lr_schedule == "cosine_from_start":
        if step < settings.warmup_steps:
            return settings.warmup_start_lr + (settings.lr - settings.warmup_start_lr) * step / settings.warmup_steps
        share = step / max(1, num_steps)
        return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + float(np.cos(np.pi * share)))
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    share = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    if settings.lr_schedule == "cosine":
        return settings.lr * 0.5 * (1 + float(np.cos(np.pi * share)))
    return settings.lr * (1 - share) if settings.lr_schedule == "linear" else settings.lr


def _bad_steps(trainee: TrainState, plan: Plan, features: Features, step: int) -> str:
    """Why a run cannot go on, with the rows whose loss is no number, or else all of the step. Every worker calls it."""
    found: list[Any] = gather(trainee.guard.nonfinite_rows, trainee.worker)
    rows = sorted({row for part in found for row in part}) or sorted(set(step_rows(plan, step).tolist()))
    names = ", ".join(features.ids(rows[:ROWS_NAMED])) + (
        f" and {more} more" if (more := len(rows) - ROWS_NAMED) > 0 else ""
    )
    times = f"{trainee.guard.bad_steps} time(s) in a row (--max_bad_steps)"
    return f"step {step + 1}: the loss or its gradients were no finite numbers, {times}; rows of this step: {names}"
