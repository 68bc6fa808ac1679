"""What the stages of LoRA training share: rows, a trainee, the plan and the loop, for the roles and tasks of one stage.

A stage is told apart by data alone (``Stage``); its recipe says which it is and calls ``train_stage``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from voxray.audio.augment import SpecAugment
from voxray.audio.logmel import HOP_SAMPLES
from voxray.batches.collate import collate_training
from voxray.batches.loader import Loader, Masking, PromptSampler
from voxray.batches.packing import Batching
from voxray.batches.plan import Phase, Plan, Variants
from voxray.batches.rank import Worker
from voxray.config.flag_groups import MaskFlags
from voxray.config.train import TrainSettings
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import write_json
from voxray.core.tasks import TASKS
from voxray.features.featurize import write_ledger
from voxray.features.reader import Features, RowLengths
from voxray.features.shards import TASK_CODES
from voxray.metrics.names import validation_metrics
from voxray.models.adapters.lora import count_parameters
from voxray.models.interface import IGNORED, FrontEnd, ModelFamily
from voxray.models.registry import get_family
from voxray.recipes.build_model import build_model, resume
from voxray.recipes.training_data import TrainingData
from voxray.runs.layout import checkpoint_folder
from voxray.runs.remote_sync import RemoteSync
from voxray.training.best_checkpoint import BestCheckpoint
from voxray.training.callbacks import NO_CALLBACKS, Callbacks, planned_workers
from voxray.training.checkpoint import CheckpointWriter, Progress, publish_adapter
from voxray.training.engine import DataParallel, Engine, OptimizerState
from voxray.training.loop import StopSignals, TrainState, fit
from voxray.training.loss_scaling import LossScaler
from voxray.training.previews import MAX_TOKENS, Previews, PreviewSettings
from voxray.training.records import Monitor
from voxray.training.resource_errors import explain_resource_errors
from voxray.training.throughput import epoch_efficiency
from voxray.training.validate import first_rows_per_task
from voxray.training.validation_hook import ValidationSizes, Validator

DEBUG_ROWS, DEBUG_STEPS, DEBUG_VALIDATION_ROWS = 8, 4, 4


@dataclass(frozen=True)
class Stage:
    """What one stage of training does.

    Attributes:
        roles: Parts of the model that LoRA trains.
        tasks: Tasks whose rows it trains on and validates with; rows of others are left out and listed.
        task_weights: Relative shares of the rows drawn; None draws every row once per epoch.
        per_task_bsz: Rows of a forward pass by task, for batches by length.
        curriculum: Tasks and epochs of one phase after the other; empty draws all tasks for --epochs.
        lora_targets: Names of the layers that LoRA adapts within the roles; empty takes the family's own.
        redraw: Gives a row another prompt in every epoch; None leaves it the stored one.
    """

    roles: tuple[str, ...]
    tasks: tuple[str, ...] = field(default_factory=lambda: tuple(TASKS))
    task_weights: Mapping[str, float] | None = None
    per_task_bsz: Mapping[str, int] | None = None
    curriculum: tuple[Phase, ...] = ()
    lora_targets: tuple[str, ...] = ()
    redraw: PromptSampler | None = None


Lost = tuple[Features, int, str, str]
"""A row that is left out: (features, row number, reason, message)."""
R = TypeVar("R", bound=RowLengths)


def train_stage(
    stage: Stage,
    settings: TrainSettings,
    run_dir: Path,
    data: TrainingData,
    worker: Worker,
    host: Callbacks = NO_CALLBACKS,
) -> dict[str, Any]:
    """Train one adapter; every worker calls this.

    Args:
        run_dir: Run folder, seen by all workers; a checkpoint in it is where training goes on from.
        host: What surrounds this worker.
    Returns:
        {"steps", "finished", "adapter_step", metrics of the last validation}; with validation on rank 0 also {"best":
        {metric: {"step", "value"}}} for every task's headline metric and the one that is watched.
    """
    with explain_resource_errors(settings):
        return _train_stage(stage, settings, run_dir, data, worker, host)


def _train_stage(
    stage: Stage, settings: TrainSettings, run_dir: Path, data: TrainingData, worker: Worker, host: Callbacks
) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    family = get_family(settings.model_id)
    front_end = family.front_end(settings.model_id)
    redraw = stage.redraw
    features, held_out = (
        Features(data.train, redraw.max_extra_prompt_tokens if redraw else None),
        Features(data.validation),
    )
    rows, held_out_rows, lost = choose_rows(stage, settings, features, held_out, front_end, data.divided)
    with_encoder = features.store != "encoder"
    model, started = build_model(
        stage.roles, settings, family, worker, with_encoder=with_encoder, lora_targets=stage.lora_targets
    )
    microbatches_per_step = planned_workers(settings.num_workers, worker) * settings.grad_accum
    start = Progress(0, microbatches_per_step, features.fingerprint(), redraw.fingerprint if redraw else "")
    start, moments = resume(run_dir, model, start)
    counts = count_parameters(model, family)  # here: ZeRO leaves the model in parts
    engine = build_engine(settings, model, family, worker, moments, with_audio=bool(features.num_windows[rows].any()))
    trainee = TrainState(model, family, engine, worker, LossScaler.for_dtype(fp16=settings.fp16))
    trainee.guard.load(start.guard)
    selection = build_best_checkpoint(settings, held_out, held_out_rows)
    selection.load(start.selection)
    plan = build_plan(stage, settings, features, rows, start.microbatches_per_step, front_end.cross_attention_positions)
    num_steps = settings.max_steps or plan.steps_in(plan.curriculum_epochs if stage.curriculum else settings.epochs)
    num_steps = min(num_steps, DEBUG_STEPS) if settings.debug else num_steps
    pin_memory = settings.pin_memory and worker.device.type == "cuda"
    masks = Masking(build_masks(settings), settings.seed)
    loader = Loader(features, front_end, plan, worker, settings.loader_workers, masks, redraw, pin_memory=pin_memory)
    monitor = Monitor(run_dir, start.step, active=worker.is_first, publish=host.publish)
    if worker.is_first:
        write_ledger(run_dir / "quarantine.jsonl", (*data.train, *data.validation), lost)
        write_json(run_dir / "parameters.json", counts)
        for line in filter(None, (started, count_lost(stage, lost))):
            monitor.say(line)
        introduce(monitor, counts, loader, start.step, num_steps)
    sizes = ValidationSizes(max(8, settings.per_device_bsz), settings.per_device_bsz, settings.eval_max_new_tokens)
    held = (front_end, held_out, held_out_rows)
    validator = Validator(trainee, *held, sizes, monitor, settings.seed, num_steps, host.report)
    if worker.is_first and len(held_out_rows):
        validator.previews = build_previews(settings, run_dir, monitor)

    upload = partial(RemoteSync.from_settings(settings).push_or, monitor.say)
    writer = CheckpointWriter(run_dir, settings.save_total_limit, upload) if worker.is_first else None
    watch = StopSignals(run_dir, host.is_leaving)
    try:
        step = fit(trainee, loader, settings, start, num_steps, monitor, validator, selection, writer, watch)
    finally:
        if writer:
            writer.close()
    finished = step >= num_steps or selection.should_stop
    chosen = selection.best_step if settings.load_best_model_at_end and selection.best_step else step
    if worker.is_first and finished:
        publish_adapter(checkpoint_folder(run_dir, chosen), run_dir / "adapter")
        for line in ending(selection, step, num_steps, chosen):
            monitor.say(line)
    found = {"steps": step, "finished": finished, "adapter_step": chosen, **selection.last}
    best = _say_best(selection, monitor)
    monitor.close()
    return {**found, "best": best} if best else found


def _say_best(selection: BestCheckpoint, monitor: Monitor) -> dict[str, Any]:
    """Say and return the best value of each metric with its step."""
    best = monitor.best_steps()
    if selection.best_step:
        best[selection.metric] = {"step": selection.best_step, "value": selection.best_value}
    for name, entry in best.items():
        monitor.say(f"best {name}: {entry['value']:.4f} at step {entry['step']}")
    return best


def build_engine(
    settings: TrainSettings,
    model: Any,
    family: ModelFamily,
    worker: Worker,
    moments: OptimizerState,
    *,
    with_audio: bool,
) -> Engine:
    """How the workers take a step together, as ``--strategy`` says.

    Args:
        moments: To go on from.
        with_audio: Whether any row to train on has audio.
    """
    engine: Engine
    rates = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.strategy == "ddp":
        engine = DataParallel(model, family, worker, **rates)
    else:
        from voxray.training.zero import Zero

        engine = Zero(model, family, worker, stage=settings.zero_stage, with_audio=with_audio, **rates)
    engine.load_moments(moments)
    return engine


def ending(selection: BestCheckpoint, step: int, num_steps: int, chosen: int) -> Iterator[str]:
    """What is said at the end of a finished run: why it ended early, and whose weights the adapter has."""
    if step < num_steps:
        bad = selection.num_bad_validations
        yield f"early stopping at step {step}: {bad} validations without a better {selection.metric}"
    if chosen != step:
        yield f"the adapter is that of step {chosen} (--load_best_model_at_end)"


def build_best_checkpoint(settings: TrainSettings, held_out: Features, rows: np.ndarray) -> BestCheckpoint:
    """Early stopping and the best checkpoint as the settings have them.

    Raises:
        SettingsError: Validating these rows never gives the metric.
    """
    metric, given = settings.metric_for_best_model, "metric_for_best_model" in settings.model_fields_set
    tasks = [name for name, code in TASK_CODES.items() if code in held_out.task[rows]]
    if tasks and given and metric not in (known := validation_metrics(tasks)):
        raise SettingsError(f"--metric_for_best_model {metric}: validation has {', '.join(known)}")
    return BestCheckpoint(metric, settings.early_stopping_patience, settings.early_stopping_threshold)


def build_previews(settings: TrainSettings, run_dir: Path, monitor: Monitor) -> Previews:
    """The run's previews; its previews.yaml, once written, holds over the flags."""
    tokens = min(settings.eval_max_new_tokens, MAX_TOKENS)
    previews = Previews.of_run(run_dir, monitor.say, PreviewSettings(rows=settings.preview_rows, max_new_tokens=tokens))
    rows = previews.settings.rows
    if "preview_rows" in settings.model_fields_set and rows != settings.preview_rows:
        monitor.say(f"previews: {previews.path} says rows: {rows}, which holds over --preview_rows")
    return previews


def build_plan(
    stage: Stage,
    settings: TrainSettings,
    features: RowLengths,
    rows: np.ndarray,
    microbatches_per_step: int,
    cross_attention_positions: int = 0,
) -> Plan:
    """The plan of a run over the rows that it may draw.

    Args:
        cross_attention_positions: Of one window, beside the tokens (see ``models.family.FrontEnd``).
    """
    variants = Variants(rows, features.sample[rows], settings.seed)
    sizes = (settings.per_device_bsz, settings.pack_tokens, stage.per_task_bsz)
    return Plan(
        features.task[variants.first],
        variants.first,
        stage.task_weights,
        settings.seed,
        Batching(settings.batching, *sizes),
        microbatches_per_step,
        settings.drop_last,
        variants,
        features.longest_tokens + features.num_windows * cross_attention_positions,
        stage.curriculum,
    )


def build_masks(settings: TrainSettings) -> SpecAugment:
    """SpecAugment as the settings have it; none for jobs without such flags."""
    names = MaskFlags.model_fields if isinstance(settings, MaskFlags) else ()
    return SpecAugment(**{name: getattr(settings, name) for name in names})


def choose_rows(
    stage: Stage,
    settings: TrainSettings,
    features: R,
    held_out: R,
    front_end: FrontEnd,
    divided: frozenset[str] = frozenset(),
) -> tuple[np.ndarray, np.ndarray, list[tuple[R, int, str, str]]]:
    """Rows to train on, rows to validate on, and those that are left out.

    Args:
        divided: See ``TrainingData``.
    Raises:
        RunError: Nothing is left to train on.
    """
    lost: list[tuple[R, int, str, str]] = []
    kept = []
    max_len = min(settings.max_len, front_end.max_positions)
    for part in (features, held_out):
        rows, too_long = part.within(max_len)
        of_stage = np.isin(part.task, [TASK_CODES[name] for name in stage.tasks])
        limit = f"tokens, over --max_len {max_len}"
        too_long = too_long[of_stage[too_long]]
        lost += [(part, int(row), "too_long", f"{part.longest_tokens[row]} {limit}") for row in too_long]
        others = np.flatnonzero(~of_stage)
        others = others[np.unique(part.sample[others], return_index=True)[1]]  # not every variant of a clip
        names = {code: name for name, code in TASK_CODES.items()}
        message = f"this job trains on {', '.join(stage.tasks)} rows"
        lost += [(part, int(row), "other_task", f"{names[int(part.task[row])]}: {message}") for row in others]
        rows = rows[of_stage[rows]]
        unfit = list(_unfit(part, rows, front_end, divided))
        lost += [(part, row, reason, message) for row, reason, message in unfit if reason]
        kept.append(rows[~np.isin(rows, [row for row, *_ in unfit])])
    rows, held_out_rows = kept
    limit_rows = DEBUG_VALIDATION_ROWS if settings.debug else settings.eval_max_rows
    held_out_rows = first_rows_per_task(held_out, held_out_rows, limit_rows)
    if settings.debug:
        rows = first_rows_per_task(features, rows, DEBUG_ROWS)
    if not len(rows):
        raise RunError(f"--train_jsonl: {_why_none(stage, settings, features)}")
    return rows, held_out_rows, lost


def _unfit(
    part: RowLengths, rows: np.ndarray, front_end: FrontEnd, divided: frozenset[str]
) -> Iterator[tuple[int, str, str]]:
    """Rows within the token limit that the family cannot be trained on, with reason and message.

    Of a row that stands again in parts the reason is empty: nothing of it is lost.
    """
    window_sec = front_end.window_frames * HOP_SAMPLES / front_end.sample_rate_hz
    for row in rows[part.num_windows[rows] > (front_end.max_windows or np.inf)].tolist():
        seconds = part.num_samples[row] / front_end.sample_rate_hz
        message = (
            f"{seconds:.1f} s, and the model is trained on {window_sec * (front_end.max_windows or 1):g} s at most;"
        )
        message += " give the row segments ({start, end, text}), at which it is divided"
        yield row, "" if part.source(row) in divided else "audio_too_long", message
    if front_end.needs_language:
        for row in rows[~part.has_language[rows]].tolist():
            yield row, "no_language", "the row names no language, which this model is told; give it one, or --language"


def _why_none(stage: Stage, settings: TrainSettings, features: RowLengths) -> str:
    if np.isin(features.task, [TASK_CODES[name] for name in stage.tasks]).any() or len(stage.tasks) == len(TASKS):
        return f"no row is within --max_len {settings.max_len} tokens"
    wanted = "; ".join(f"{name}: {', '.join(TASKS[name].keys)}" for name in stage.tasks)
    return f"holds no row of the task that this job trains on ({wanted})"


def count_lost(stage: Stage, lost: Sequence[Lost]) -> str:
    """A line on the rows of other tasks; empty if there are none."""
    others = sum(reason == "other_task" for _, _, reason, _ in lost)
    wanted = ", ".join(stage.tasks)
    return f"left out: {others} rows of other tasks than {wanted}, listed in quarantine.jsonl" if others else ""


def introduce(
    monitor: Monitor,
    counts: dict[str, dict[str, int]],
    loader: Loader,
    step: int,
    num_steps: int,
) -> None:
    """Say what is about to be trained on what: parameters per role, the plan, one decoded example per task."""
    features, front_end, plan = loader.features, loader.front_end, loader.plan
    total, trainable = (sum(entry[key] for entry in counts.values()) for key in ("total", "trainable"))
    roles = ", ".join(f"{role} {entry['trainable']:,}" for role, entry in counts.items())
    monitor.say(f"parameters: {total:,}, of which {trainable:,} train ({trainable / total:.2%}): {roles}")
    kept = ", ".join(f"{len(rows)} {name}" for name, rows in plan.rows_of_task.items())
    packs = plan.epoch_packs(0)
    size = len(packs.rows) / len(packs) * plan.microbatches_per_step
    real = f"{epoch_efficiency(plan, features):.1%} of their tokens are no padding"
    monitor.say(f"data: {kept} rows; {plan.steps_of(0)} steps of {size:.3g} rows per epoch; {real}")
    monitor.say(f"{'going on from' if step else 'starting at'} step {step} of {num_steps}")
    drawn = plan.epoch_rows(0)
    for name in plan.rows_of_task:
        of_task = features.task[drawn] == TASK_CODES[name]
        if of_task.any():
            batch = collate_training([loader.row(int(drawn[of_task.argmax()]), 0)], front_end)
            ids, answer = batch["input_ids"][0], batch["labels"][0] != IGNORED
            monitor.say(f"  {name}: {front_end.show(ids[~answer].tolist())} | {front_end.show(ids[answer].tolist())}")
