"""Multitask training: ASR, spoken QA and text QA into one LoRA on projector and language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxray.config.train import MultitaskSettings
from voxray.data.collate import IGNORED, collate_training
from voxray.data.featurize import to_jsonl
from voxray.data.loader import Loader
from voxray.data.plan import Plan
from voxray.data.shards import Features, write_atomically, write_json
from voxray.errors import RunError
from voxray.models.family import FrontEnd, family_of
from voxray.models.lora import add_lora, count_parameters, save_adapter, trainable_parameters
from voxray.training.checkpoint import Progress, list_checkpoints, load_checkpoint, read_progress
from voxray.training.engine import Worker
from voxray.training.loop import Trainee, fit
from voxray.training.monitor import Monitor
from voxray.training.validate import first_rows_per_task, validate

DEBUG_ROWS, DEBUG_STEPS, DEBUG_VALIDATION_ROWS = 8, 4, 4


@dataclass(frozen=True)
class Data:
    """Feature sets of a run."""

    train: tuple[Path, ...]
    validation: tuple[Path, ...]


def train(
    settings: MultitaskSettings,
    run_dir: Path,
    data: Data,
    worker: Worker,
    report: Callable[[dict[str, Any]], None] = lambda metrics: None,
) -> dict[str, Any]:
    """Train one adapter; every worker calls this.

    Args:
        run_dir: Run folder, seen by all workers; a checkpoint in it is where training goes on from.
        report: Called on every worker with each validation's metrics and the step.
    Returns:
        {"steps", "finished", metrics of the last validation}.
    """
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    family = family_of(settings.model_id)
    front_end = family.front_end(settings.model_id)
    features, validation = Features(data.train), Features(data.validation)
    rows, too_long = usable_rows(features, settings.max_len)
    validation_rows, too_long_validation = usable_rows(validation, settings.max_len)
    limit = DEBUG_VALIDATION_ROWS if settings.debug else settings.eval_max_rows
    validation_rows = first_rows_per_task(validation, validation_rows, limit)
    if settings.debug:
        rows = first_rows_per_task(features, rows, DEBUG_ROWS)
    if not len(rows):
        raise RunError(f"--train_jsonl: no row is within --max_len {settings.max_len} tokens")

    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    base = family.load_model(settings.model_id, dtype=dtype, device=worker.device)
    roles = ("projector", "llm") if settings.freeze_whisper else ("encoder", "projector", "llm")
    torch.manual_seed(settings.seed)
    lora = {"r": settings.lora_r, "alpha": settings.lora_alpha, "dropout": settings.lora_dropout}
    model = add_lora(base, family, roles, model_id=settings.model_id, **lora)
    if settings.grad_ckpt:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, foreach=False)

    start = Progress(0, worker.world_size * settings.grad_accum, features.fingerprint())
    checkpoints = list_checkpoints(run_dir)
    if checkpoints:
        start = resume(checkpoints[-1][1], model, optimizer, start)
    plan = Plan(
        features.task[rows],
        rows,
        settings.task_weights,
        settings.seed,
        settings.per_device_bsz,
        start.packs_per_step,
        settings.drop_last,
    )
    num_steps = settings.max_steps or settings.epochs * plan.steps_per_epoch
    num_steps = min(num_steps, DEBUG_STEPS) if settings.debug else num_steps
    loader = Loader(
        features,
        front_end,
        plan,
        rank=worker.rank,
        world_size=worker.world_size,
        loader_workers=settings.loader_workers,
        pin_memory=settings.pin_memory and worker.device.type == "cuda",
    )
    monitor = Monitor(run_dir, start.step, active=worker.is_first)
    if worker.is_first:
        write_ledger(run_dir, data, [(features, too_long), (validation, too_long_validation)], settings.max_len)
        write_json(run_dir / "parameters.json", count_parameters(model, family))
        introduce(monitor, model, family, features, front_end, plan, start.step, num_steps)

    last: dict[str, float] = {}

    def check(step: int) -> None:
        nonlocal last
        if len(validation_rows):
            last = validate(
                model,
                family,
                front_end,
                validation,
                validation_rows,
                worker,
                batch_size=max(8, settings.per_device_bsz),
                max_new_tokens=settings.eval_max_new_tokens,
            )
            monitor.record("validation", step, last)
            monitor.say(f"step {step}/{num_steps}  " + "  ".join(f"{key} {value:.3f}" for key, value in last.items()))
        report({"step": step, **last})

    set_modes(model, family, frozen=[role for role in family.roles if role not in roles])
    step = fit(Trainee(model, family, optimizer, worker), loader, settings, run_dir, start, num_steps, monitor, check)
    finished = step >= num_steps
    if worker.is_first and finished:
        save_adapter(model, run_dir / "adapter")
    monitor.close()
    return {"steps": step, "finished": finished, **last}


def usable_rows(features: Features, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers within the token limit, and those over it."""
    fits = features.num_tokens <= max_len
    return np.flatnonzero(fits), np.flatnonzero(~fits)


def set_modes(model: torch.nn.Module, family: Any, frozen: Sequence[str]) -> None:
    """Training mode, except in parts that hold nothing that trains."""
    model.train()
    within = {word for role in frozen for word in family.roles[role]}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in within:
            module.eval()


def resume(checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer, start: Progress) -> Progress:
    """Load the newest checkpoint of the run and say where it stands.

    Raises:
        RunError: The training data is not what the run started with.
    """
    progress = read_progress(checkpoint)
    if progress.data != start.data:
        raise RunError(
            f"{checkpoint}: the training data is not what this run began with; use --overwrite or another --output_dir"
        )
    load_checkpoint(checkpoint, model, optimizer)
    return progress


def write_ledger(run_dir: Path, data: Data, too_long: list[tuple[Features, np.ndarray]], max_len: int) -> None:
    """Gather into the run's quarantine.jsonl the rows that featurize refused and those over the token limit."""
    folders = dict.fromkeys((*data.train, *data.validation))
    ledger = b"".join((folder / "quarantine.jsonl").read_bytes() for folder in folders)
    lines = []
    for features, rows in too_long:
        for row in rows:
            manifest, _, line = features.source(row).rpartition(":")
            message = f"{features.num_tokens[row]} tokens, over --max_len {max_len}"
            place = {"manifest": manifest, "line": int(line), "id": features.ids([row])[0]}
            lines.append({**place, "reason": "too_long", "message": message})
    write_atomically(run_dir / "quarantine.jsonl", ledger + to_jsonl(lines))


def introduce(
    monitor: Monitor,
    model: torch.nn.Module,
    family: Any,
    features: Features,
    front_end: FrontEnd,
    plan: Plan,
    step: int,
    num_steps: int,
) -> None:
    """Say what is about to be trained on what: parameters per role, the plan, one decoded example per task."""
    counts = count_parameters(model, family)
    total, trainable = (sum(entry[key] for entry in counts.values()) for key in ("total", "trainable"))
    roles = ", ".join(f"{role} {entry['trainable']:,}" for role, entry in counts.items())
    monitor.say(f"parameters: {total:,}, of which {trainable:,} train ({trainable / total:.2%}): {roles}")
    kept = ", ".join(f"{len(rows)} {name}" for name, rows in plan.rows_of_task.items())
    monitor.say(f"data: {kept} rows; {plan.steps_per_epoch} steps of {plan.rows_per_step} rows per epoch")
    monitor.say(f"{'going on from' if step else 'starting at'} step {step} of {num_steps}")
    drawn = plan.epoch_rows(0)
    for name, task_rows in plan.rows_of_task.items():
        of_task = np.isin(drawn, task_rows)
        if of_task.any():
            batch = collate_training([features.row(int(drawn[of_task.argmax()]))], front_end)
            ids, answer = batch["input_ids"][0], batch["labels"][0] != IGNORED
            monitor.say(f"  {name}: {front_end.show(ids[~answer].tolist())} | {front_end.show(ids[answer].tolist())}")
