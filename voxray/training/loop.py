"""The training loop: forward, backward, reduce, clip, step, validate, save.

Shape letters: B rows, L tokens, N answer positions of a batch, T tasks, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxray.batches.collate import to_device
from voxray.batches.loader import Loader
from voxray.batches.plan import Microbatch, Plan
from voxray.batches.rank import Worker
from voxray.config.train import TrainSettings
from voxray.core.errors import RunError
from voxray.core.tasks import TASKS
from voxray.models.adapters.lora_scale import without_lora
from voxray.models.interface import Batch, ModelFamily
from voxray.models.parts.losses import PassFn, answer_states, token_losses
from voxray.runs.run_folder import GROW_FILE, STOP_FILE
from voxray.training.best_checkpoint import BestCheckpoint
from voxray.training.checkpoint import CheckpointWriter, Progress
from voxray.training.engine import Engine, gather
from voxray.training.loss_scaling import LossScaler
from voxray.training.records import Monitor
from voxray.training.throughput import Throughput, answer_tokens, step_rows

MAX_ROWS_NAMED = 8
LEAVING_CHECK_SEC = 5.0
"""Seconds between checks whether a machine is about to leave. A check is a barrier and takes a few milliseconds."""


@dataclass
class TrainState:
    """A model in training and the state that goes into every checkpoint.

    Attributes:
        start: Progress at the start. Its ``microbatches_per_step`` and ``data`` go into every checkpoint.
        best: Best validation so far, and early stopping.
        parameters: Numbers of parameters by role: {role: {"total", "trainable"}}.
    """

    model: Any
    family: ModelFamily
    engine: Engine
    worker: Worker
    start: Progress
    loss_scaler: LossScaler = field(default_factory=LossScaler)
    best: BestCheckpoint = field(default_factory=lambda: BestCheckpoint(""))
    parameters: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class StopSignals:
    """Reasons to stop or to save a run between two steps.

    Attributes:
        run_dir: Folder in which ``STOP_FILE`` or ``GROW_FILE`` may appear.
        is_leaving: Whether the machine of any worker is about to leave. Every worker calls it at the same step.
    """

    run_dir: Path
    is_leaving: Callable[[], bool]
    last_check: float = field(default_factory=time.monotonic)

    def local(self) -> list[float]:
        """This worker's votes, to sum over the workers: [whether to stop, whether to check for leaving machines]."""
        stop = any((self.run_dir / name).exists() for name in (STOP_FILE, GROW_FILE))
        return [float(stop), float(time.monotonic() - self.last_check > LEAVING_CHECK_SEC)]

    def agreed(self, stop: float, check: float) -> tuple[bool, bool]:
        """(whether the run stops, whether a machine is about to leave), from the sums of all workers' votes."""
        leaving = False
        if check:
            leaving = self.is_leaving()
            self.last_check = time.monotonic()
        return stop > 0, leaving


@dataclass
class Hooks:
    """What ``fit`` calls between the steps.

    Attributes:
        monitor: Writes records and log lines.
        validate: Step -> metrics, the same on every worker. Every worker calls it at the same steps.
        writer: Writes checkpoints; None on other ranks than 0.
        signals: Reasons to stop or to save early.
    """

    monitor: Monitor
    validate: Callable[[int], dict[str, float]]
    writer: CheckpointWriter | None
    signals: StopSignals


def fit(state: TrainState, loader: Loader, settings: TrainSettings, num_steps: int, hooks: Hooks) -> int:
    """Train from ``state.start.step`` to ``num_steps``.

    The last checkpoint is on disk when this returns.

    Returns:
        Number of steps done. It is less than ``num_steps`` after a stop request or early stopping.
    """
    plan, step, best, monitor = loader.plan, state.start.step, state.best, hooks.monitor
    is_due = partial(_is_validation_due, plan, settings.eval_steps, num_steps)
    if is_due(step) and best.last_step < step:  # the run was stopped before this validation
        best.update(step, hooks.validate(step))
        _save(state, hooks.writer, step)
    throughput = Throughput(loader, state.worker.device)
    for index, microbatches in throughput.timed(loader.steps(step, 0 if best.should_stop else num_steps)):
        lr = learning_rate(settings, index, num_steps)
        record, votes = train_step(state, loader, settings, index, microbatches, lr, hooks.signals.local())
        if hooks.writer:
            hooks.writer.wait()
        step = index + 1
        stop, leaving = hooks.signals.agreed(*votes)
        monitor.end_step(plan, loader.features, step, {**record, **throughput.record(index), "lr": lr})
        if state.loss_scaler.bad_steps >= settings.max_bad_steps:
            raise RunError(_bad_steps_message(state, loader, index))
        if step % settings.log_steps == 0 or step == num_steps:
            monitor.say(f"step {step}/{num_steps}  loss {record['loss']:.4f}  lr {lr:.2e}")
        improved = is_due(step) and not stop and best.update(step, hooks.validate(step))
        ends = stop or best.should_stop or step == num_steps
        if improved or ends or leaving or step % settings.save_steps == 0:
            _save(state, hooks.writer, step)
        if leaving:
            monitor.say(f"a machine is about to leave: saved at step {step}")
        if ends:
            break
    if hooks.writer:
        hooks.writer.wait()
    return step


def _save(state: TrainState, writer: CheckpointWriter | None, step: int) -> None:
    """Write a checkpoint. Every worker calls it, because the engine may have to gather sharded tensors."""
    checkpoint_state = state.engine.checkpoint_state()
    if writer:
        progress = replace(state.start, step=step, loss_scaler=state.loss_scaler.state(), best=state.best.state())
        writer.write(state.model, checkpoint_state, progress, state.best.best_step)


def _is_validation_due(plan: Plan, eval_steps: int, num_steps: int, step: int) -> bool:
    """Whether to validate after this many steps: every ``eval_steps`` (0: every epoch), and at the end."""
    epochs = plan.epochs_done(step)
    due = step % eval_steps == 0 if eval_steps else epochs == int(epochs)
    return step > 0 and (due or step == num_steps)


def train_step(
    state: TrainState,
    loader: Loader,
    settings: TrainSettings,
    step: int,
    microbatches: list[tuple[Microbatch, Batch]],
    lr: float,
    votes: Sequence[float] = (),
) -> tuple[dict[str, float], list[float]]:
    """One optimizer step on this worker's microbatches.

    The loss is the mean over all answer tokens of the step on all workers, so it does not depend on how the rows are
    divided. The plan gives the number of these tokens in advance.

    Args:
        votes: Numbers to sum over the workers, in the same message as the losses.
    Returns:
        {"loss", "loss/<task>", "grad_norm", "skipped", and with distillation "distill_kl"} over all workers, and the
        sums of the votes.
    """
    worker, scaler, engine = state.worker, state.loss_scaler, state.engine
    tokens_T = answer_tokens(loader.plan, loader.features, step)
    losses_T = torch.zeros(len(TASKS), device=worker.device)
    divergences = losses_T.new_zeros(1 if settings.distill_weight else 0)
    losses: list[tuple[Microbatch, torch.Tensor]] = []
    for number, (microbatch, batch) in enumerate(microbatches, 1):
        seed_microbatch(settings.seed, step, microbatch.number)
        batch = to_device(batch, worker.device)
        loss_T, divergence = pass_losses(engine, state.model, batch, settings)
        is_counted = float(not microbatch.is_filler)
        weight = is_counted / tokens_T.sum() * scaler.scale
        total = loss_T.sum() if divergence is None else loss_T.sum() + settings.distill_weight * divergence
        engine.backward(total * weight, last=number == len(microbatches))
        losses_T += loss_T.detach() * is_counted
        if divergence is not None:
            divergences += divergence.detach() * is_counted
        losses.append((microbatch, total.detach()))
    numbers = torch.cat([losses_T, divergences, torch.tensor(votes).to(worker.device, non_blocking=True)])
    sums, norm = engine.reduce(numbers, scale=scaler.scale, max_norm=settings.max_grad_norm)
    loss_sums, vote_sums = sums[: len(TASKS)], sums[len(TASKS) + len(divergences) :]
    record = {"loss": sum(loss_sums) / float(tokens_T.sum()), "grad_norm": norm}
    if settings.distill_weight:
        record["distill_kl"] = sums[len(TASKS)] / float(tokens_T.sum())
    if scaler.check_step(record["loss"], norm, fp16=settings.fp16):
        engine.apply(lr)
    else:
        engine.drop()
        scaler.nonfinite_rows = [row for each, loss in losses if not loss.isfinite() for row in each.rows.tolist()]
    record["skipped"] = scaler.skipped
    if settings.fp16:
        record["loss_scale"] = scaler.scale
    for name, total, count in zip(TASKS, loss_sums, tokens_T, strict=True):
        if count:
            record[f"loss/{name}"] = total / float(count)
    return record, vote_sums


def pass_losses(
    engine: Engine, model: Any, batch: Batch, settings: TrainSettings
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """loss_T of a microbatch, by task, and with ``--distill_weight`` the sum of KL(base || model) over its tokens.

    With ``--replay_jsonl``, over the tokens of replayed rows.
    """
    smoothing = settings.label_smoothing
    in_chunks = not engine.shards_output
    if not settings.distill_weight:
        return task_losses(engine.run_pass, batch, smoothing, in_chunks=in_chunks), None
    with without_lora(model):
        states_ND = answer_states(engine.run_pass, batch)
    losses_2N = token_losses(engine.run_pass, batch, smoothing, in_chunks=in_chunks, base_states_ND=states_ND)
    loss_N, divergence_N = losses_2N
    if "is_replayed" in batch:
        divergence_N = divergence_N * batch["is_replayed"]
    return sum_by_task(loss_N, batch), divergence_N.sum()


def answer_loss(model: Any, family: ModelFamily, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """``task_losses`` of a model outside the training loop."""
    return task_losses(partial(family.answer_logits, model), batch, label_smoothing)


def task_losses(run_pass: PassFn, batch: Batch, label_smoothing: float, *, in_chunks: bool = True) -> torch.Tensor:
    """Cross entropy summed per task, over answer tokens only.

    Args:
        in_chunks: See ``TokenLosses``.
    Returns:
        float32, shape (number of tasks,).
    """
    return sum_by_task(token_losses(run_pass, batch, label_smoothing, in_chunks=in_chunks), batch)


def sum_by_task(loss_N: torch.Tensor, batch: Batch) -> torch.Tensor:
    """loss_T: the sums of the losses of answer tokens by task."""
    task, labels_BL = batch["task"], batch["labels"]
    task_BL = task if task.dim() == 2 else task[:, None].expand_as(labels_BL)  # a pack has a task per token
    task_N = task_BL.flatten().index_select(0, batch["answer_positions"])
    # not index_add, whose sums on a GPU depend on the order in which threads add
    of_task_TN = task_N == torch.arange(len(TASKS), device=loss_N.device)[:, None]
    return torch.where(of_task_TN, loss_N, 0.0).sum(1)


def seed_microbatch(seed: int, step: int, number: int) -> None:
    """Set the random state of one forward pass (dropout). It does not depend on earlier passes."""
    state = np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) % 2**63)


def warmup_warning(settings: TrainSettings, num_steps: int) -> str:
    """A warning if the warm-up lasts as long as the run; "" otherwise."""
    if settings.warmup_steps < num_steps:
        return ""
    all_of_it = f"--warmup_steps {settings.warmup_steps} of {num_steps} steps: the rate never reaches --lr"
    return f"warning: {all_of_it}; --warmup_steps {max(1, num_steps // 10)} is a tenth of the steps"


def learning_rate(settings: Any, step: int, num_steps: int) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then the chosen shape down to 0 at the end.

    ``cosine_from_start`` is the schedule of SALMONN's own trainer, for jobs with ``min_lr`` and ``warmup_start_lr``:
    warm-up from ``warmup_start_lr``, then a cosine to ``min_lr`` that counts from step 0, so the rate drops slightly
    where the cosine begins.
    """
    if settings.lr_schedule == "cosine_from_start":
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


def _bad_steps_message(state: TrainState, loader: Loader, step: int) -> str:
    """Error message with the rows whose loss is not finite, or else all rows of the step. Every worker calls it."""
    gathered: list[Any] = gather(state.loss_scaler.nonfinite_rows, state.worker)
    rows = sorted({row for part in gathered for row in part}) or sorted(set(step_rows(loader.plan, step).tolist()))
    names = ", ".join(loader.features.ids(rows[:MAX_ROWS_NAMED]))
    if (num_more := len(rows) - MAX_ROWS_NAMED) > 0:
        names += f" and {num_more} more"
    times = f"{state.loss_scaler.bad_steps} time(s) in a row (--max_bad_steps)"
    return f"step {step + 1}: the loss or its gradients were not finite, {times}; rows of this step: {names}"
