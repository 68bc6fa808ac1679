"""The training loop: forward, backward, add up, clip, step, validate, save.

Shape letters: B rows, L tokens, N answer positions of a batch, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel

from voxray.config.train import TrainSettings
from voxray.data.collate import IGNORED, Batch
from voxray.data.features import Features
from voxray.data.loader import Loader
from voxray.data.plan import Pack, Plan
from voxray.models.family import Family
from voxray.models.lora import trainable_parameters
from voxray.tasks import TASKS
from voxray.training.checkpoint import Progress, write_checkpoint
from voxray.training.engine import Worker, sum_over_workers
from voxray.training.monitor import Monitor

STOP_FILE = "STOP"
"""Its presence in the run folder asks the run to save itself and end after the current step."""


@dataclass
class Trainee:
    """A model in training with what belongs to it."""

    model: PeftModel
    family: Family
    optimizer: torch.optim.Optimizer
    worker: Worker


def fit(
    trainee: Trainee,
    loader: Loader,
    settings: TrainSettings,
    run_dir: Path,
    start: Progress,
    num_steps: int,
    monitor: Monitor,
    validate: Callable[[int], None],
) -> int:
    """Train from ``start.step`` to ``num_steps``.

    Args:
        start: Where the run stands; its ``packs_per_step`` and ``data`` go into every checkpoint.
        validate: Called with the step on every worker, at the steps the settings ask for and at the end.
    Returns:
        Steps done; fewer than ``num_steps`` if the run was asked to stop.
    """
    plan, worker = loader.plan, trainee.worker
    eval_steps = settings.eval_steps or plan.steps_per_epoch
    step, saved = start.step, start.step

    def save() -> None:
        if worker.is_first:
            done = Progress(step, start.packs_per_step, start.data)
            write_checkpoint(run_dir, trainee.model, trainee.optimizer, done)

    for number, packs in loader.steps(start.step, num_steps):
        began = time.perf_counter()
        lr = learning_rate(settings, number, num_steps)
        record, stop = train_step(trainee, settings, plan, loader.features, number, packs, lr, run_dir)
        step = number + 1
        record |= _speed(plan, loader.features, number, time.perf_counter() - began)
        monitor.record("train", step, {**record, "lr": lr, "epoch": step / plan.steps_per_epoch})
        if step % settings.log_steps == 0 or step == num_steps:
            monitor.say(f"step {step}/{num_steps}  loss {record['loss']:.4f}  lr {lr:.2e}")
        if step % settings.save_steps == 0 or step == num_steps or stop:
            save()
            saved = step
        if stop:
            monitor.say(f"asked to stop: saved at step {step}")
            break
        if step % eval_steps == 0 or step == num_steps:
            validate(step)
    assert saved == step, "a run ends with a checkpoint of its last step"
    return step


def train_step(
    trainee: Trainee,
    settings: TrainSettings,
    plan: Plan,
    features: Features,
    step: int,
    packs: list[tuple[Pack, Batch]],
    lr: float,
    run_dir: Path,
) -> tuple[dict[str, float], bool]:
    """One optimizer step on this worker's packs.

    The loss is the mean over the answer tokens of the whole step, on all workers, so it does not depend on how the rows
    are divided. How many tokens those are is known from the plan.

    Returns:
        {"loss", "loss/<task>", "grad_norm"} over all workers, and whether any worker was asked to stop.
    """
    tokens = _answer_tokens(plan, features, step)
    losses = torch.zeros(len(TASKS), device=trainee.worker.device)
    for pack, batch in packs:
        seed_pack(settings.seed, step, pack.number)
        batch = {name: tensor.to(trainee.worker.device, non_blocking=True) for name, tensor in batch.items()}
        loss_T = answer_loss(trainee.model, trainee.family, batch, settings.label_smoothing)
        (loss_T.sum() * (float(pack.counts) / tokens.sum())).backward()
        losses += loss_T.detach() * float(pack.counts)
    parameters = [parameter for _, parameter in trainable_parameters(trainee.model)]
    asked = float((run_dir / STOP_FILE).exists())
    *sums, stop = sum_over_workers(parameters, [*losses.tolist(), asked], trainee.worker)
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm or float("inf"), foreach=False)
    for group in trainee.optimizer.param_groups:
        group["lr"] = lr
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    record = {"loss": sum(sums) / float(tokens.sum()), "grad_norm": float(norm)}
    for name, total, count in zip(TASKS, sums, tokens, strict=True):
        if count:
            record[f"loss/{name}"] = total / float(count)
    return record, stop > 0


def answer_loss(model: Any, family: Family, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """Cross entropy summed per task, over answer tokens only.

    Returns:
        float32, shape (number of tasks,).
    """
    labels_BL, task_B = batch["labels"], batch["task"]
    inputs = {name: tensor for name, tensor in batch.items() if name not in {"labels", "task"}}
    next_BL = F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED)
    keep_BL = next_BL != IGNORED
    logits_NV = family.answer_logits(model, inputs, keep_BL).float()
    loss_N = F.cross_entropy(logits_NV, next_BL[keep_BL], reduction="none", label_smoothing=label_smoothing)
    task_N = task_B[:, None].expand_as(keep_BL)[keep_BL]
    return torch.zeros(len(TASKS), device=loss_N.device).index_add(0, task_N, loss_N)


def seed_pack(seed: int, step: int, pack: int) -> None:
    """Set the random state of one forward pass (dropout); it depends on nothing that came before."""
    state = np.random.SeedSequence([seed, step, pack]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) % 2**63)


def learning_rate(settings: TrainSettings, step: int, num_steps: int) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then the chosen shape down to 0 at the end."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    share = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    if settings.lr_schedule == "cosine":
        return settings.lr * 0.5 * (1 + float(np.cos(np.pi * share)))
    return settings.lr * (1 - share) if settings.lr_schedule == "linear" else settings.lr


def _step_rows(plan: Plan, step: int) -> np.ndarray:
    return np.concatenate([pack.rows for pack in plan.step_packs(step) if pack.counts])


def _answer_tokens(plan: Plan, features: Features, step: int) -> np.ndarray:
    """Answer tokens of each task in a step, over all workers."""
    rows = _step_rows(plan, step)
    return np.bincount(features.task[rows], features.num_target_tokens[rows], minlength=len(TASKS))


def _speed(plan: Plan, features: Features, step: int, seconds: float) -> dict[str, float]:
    rows = _step_rows(plan, step)
    record = {"sec": seconds, "samples_per_sec": len(rows) / seconds}
    record["tokens_per_sec"] = float(features.num_tokens[rows].sum()) / seconds
    if torch.cuda.is_available():
        record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return record
