"""Multitask training: ASR, spoken QA and text QA into one LoRA on projector and language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxray.audio.augment import SpecAugment
from voxray.config.groups import MaskFlags
from voxray.config.train import MultitaskSettings
from voxray.data.batching import Batching
from voxray.data.collate import IGNORED, collate_training
from voxray.data.features import Features
from voxray.data.featurize import write_ledger
from voxray.data.loader import Loader, Masking
from voxray.data.plan import Phase, Plan, Variants
from voxray.data.shards import TASK_CODES
from voxray.errors import RunError
from voxray.models.family import Family, FrontEnd, family_of
from voxray.models.lora import add_lora, count_parameters, save_adapter, train_fully, trainable_parameters
from voxray.models.quantize import base_dtype
from voxray.storage import Place, write_json
from voxray.training.checkpoint import Progress, list_checkpoints, load_checkpoint, read_progress
from voxray.training.engine import Worker
from voxray.training.guard import Guard
from voxray.training.loop import Trainee, fit
from voxray.training.monitor import Monitor
from voxray.training.validate import first_rows_per_task, validate

DEBUG_ROWS, DEBUG_STEPS, DEBUG_VALIDATION_ROWS = 8, 4, 4


@dataclass(frozen=True)
class Data:
    """Feature sets of a run."""

    train: tuple[Place, ...]
    validation: tuple[Place, ...]


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
    features, held_out = Features(data.train), Features(data.validation)
    rows, held_out_rows, too_long = choose_rows(settings, features, held_out)
    trainee = build_trainee(settings, family, worker, with_encoder=features.store != "encoder")
    start = Progress(0, worker.world_size * settings.grad_accum, features.fingerprint())
    start = resume(run_dir, trainee, start)
    variants = Variants(rows, features.sample[rows], settings.seed)
    task = features.task[variants.first]
    plan = Plan(
        task,
        variants.first,
        settings.task_weights,
        settings.seed,
        Batching(settings.batching, settings.per_device_bsz, settings.pack_tokens, settings.per_task_bsz),
        start.packs_per_step,
        settings.drop_last,
        variants,
        features.num_tokens,
        [Phase(*phase) for phase in settings.curriculum],
    )
    num_steps = settings.max_steps or plan.steps_in(plan.curriculum_epochs if settings.curriculum else settings.epochs)
    num_steps = min(num_steps, DEBUG_STEPS) if settings.debug else num_steps
    pin_memory = settings.pin_memory and worker.device.type == "cuda"
    masks = Masking(SpecAugment(**{name: getattr(settings, name) for name in MaskFlags.model_fields}), settings.seed)
    loader = Loader(features, front_end, plan, worker, settings.loader_workers, masks, pin_memory=pin_memory)
    monitor = Monitor(run_dir, start.step, active=worker.is_first)
    if worker.is_first:
        limit = f"tokens, over --max_len {settings.max_len}"
        lost = [(part, int(row), f"{part.num_tokens[row]} {limit}") for part, numbers in too_long for row in numbers]
        write_ledger(run_dir / "quarantine.jsonl", (*data.train, *data.validation), lost)
        write_json(run_dir / "parameters.json", count_parameters(trainee.model, family))
        introduce(monitor, trainee.model, family, features, front_end, plan, start.step, num_steps)
    last: dict[str, float] = {}

    def check(step: int) -> None:
        if len(held_out_rows):
            sizes = {"batch_size": max(8, settings.per_device_bsz), "max_new_tokens": settings.eval_max_new_tokens}
            last.update(validate(trainee.model, family, front_end, held_out, held_out_rows, worker, **sizes))
            monitor.record("validation", step, last)
            monitor.say(f"step {step}/{num_steps}  " + "  ".join(f"{key} {value:.3f}" for key, value in last.items()))
        report({"step": step, **last})

    step = fit(trainee, loader, settings, run_dir, start, num_steps, monitor, check)
    finished = step >= num_steps
    if worker.is_first and finished:
        save_adapter(trainee.model, run_dir / "adapter")
    monitor.close()
    return {"steps": step, "finished": finished, **last}


def choose_rows(
    settings: MultitaskSettings, features: Features, held_out: Features
) -> tuple[np.ndarray, np.ndarray, list[tuple[Features, np.ndarray]]]:
    """Rows to train on, rows to validate on, and per feature set the rows over the token limit.

    Raises:
        RunError: Nothing is left to train on.
    """
    rows, too_long = features.within(settings.max_len)
    held_out_rows, too_long_held_out = held_out.within(settings.max_len)
    limit = DEBUG_VALIDATION_ROWS if settings.debug else settings.eval_max_rows
    held_out_rows = first_rows_per_task(held_out, held_out_rows, limit)
    if settings.debug:
        rows = first_rows_per_task(features, rows, DEBUG_ROWS)
    if not len(rows):
        raise RunError(f"--train_jsonl: no row is within --max_len {settings.max_len} tokens")
    return rows, held_out_rows, [(features, too_long), (held_out, too_long_held_out)]


def build_trainee(settings: MultitaskSettings, family: Family, worker: Worker, *, with_encoder: bool = True) -> Trainee:
    """Load the base, choose what trains, and make its optimizer; the same on every worker.

    Args:
        with_encoder: False if the features are the encoder's outputs already.
    """
    dtype = base_dtype(bf16=settings.bf16, fp16=settings.fp16)
    base = family.load_model(settings.model_id, dtype=dtype, device=worker.device, quantize=settings.quantize)
    if not with_encoder:
        family.skip_encoder(base)
    roles = ("projector", "llm") if settings.freeze_whisper else ("encoder", "projector", "llm")
    torch.manual_seed(settings.seed)
    lora = {"r": settings.lora_r, "alpha": settings.lora_alpha, "dropout": settings.lora_dropout}
    if settings.tuning == "full":
        model = train_fully(base, family, roles)
    else:
        model = add_lora(base, family, roles, model_id=settings.model_id, tuning=settings.tuning, **lora)
    if settings.grad_ckpt:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_modes(model, family, frozen=[role for role in family.roles if role not in roles])
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, foreach=False)
    return Trainee(model, family, optimizer, worker, Guard.of(fp16=settings.fp16))


def set_modes(model: torch.nn.Module, family: Any, frozen: Sequence[str]) -> None:
    """Training mode, except in parts that hold nothing that trains."""
    model.train()
    within = {word for role in frozen for word in family.roles[role]}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in within:
            module.eval()


def resume(run_dir: Path, trainee: Trainee, start: Progress) -> Progress:
    """Load the run's newest checkpoint, if it has one, and say where the run stands.

    Raises:
        RunError: The training data is not what the run started with, or the checkpoint is damaged.
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return start
    _, newest = checkpoints[-1]
    progress = read_progress(newest)
    if progress.data != start.data:
        advice = "use --overwrite or another --output_dir"
        raise RunError(f"{newest}: the training data is not what this run began with; {advice}")
    load_checkpoint(newest, trainee.model, trainee.optimizer)
    trainee.guard.load(progress.guard)
    return progress


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
    packs = plan.epoch_packs(0)
    size = len(packs.rows) / len(packs) * plan.packs_per_step
    monitor.say(f"data: {kept} rows; {plan.steps_of(0)} steps of {size:.3g} rows per epoch")
    monitor.say(f"{'going on from' if step else 'starting at'} step {step} of {num_steps}")
    drawn = plan.epoch_rows(0)
    for name in plan.rows_of_task:
        of_task = features.task[drawn] == TASK_CODES[name]
        if of_task.any():
            batch = collate_training([features.row(int(drawn[of_task.argmax()]))], front_end)
            ids, answer = batch["input_ids"][0], batch["labels"][0] != IGNORED
            monitor.say(f"  {name}: {front_end.show(ids[~answer].tolist())} | {front_end.show(ids[answer].tolist())}")
