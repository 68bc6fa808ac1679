"""One training process from feature sets to adapter. Every worker calls ``train``."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from voxray.audio.augment import SpecAugment
from voxray.batches.collate import collate_training
from voxray.batches.context_sampler import ContextSampler
from voxray.batches.loader import Loader, Masking
from voxray.batches.packing import Batching
from voxray.batches.plan import Plan, Variants
from voxray.cards.card import card_text, read_card_facts
from voxray.cards.facts import read_run
from voxray.config.flag_groups import MaskFlags
from voxray.config.train import TrainSettings
from voxray.core.errors import SettingsError, one_line
from voxray.core.storage import write_json
from voxray.features.featurize import write_ledger
from voxray.features.reader import Features, RowLengths
from voxray.features.shards import TASK_CODES
from voxray.metrics.names import validation_metrics
from voxray.models.adapters.lora import count_parameters
from voxray.models.interface import IGNORED
from voxray.models.parts.arithmetic import set_deterministic, set_tf32
from voxray.recipes.build_model import build_model, resume, training_dtypes
from voxray.recipes.choose_rows import LostRow, choose_rows, count_lost
from voxray.recipes.run_context import RunContext
from voxray.recipes.stages import Stage
from voxray.recipes.trained_rows import describe_trained_rows
from voxray.recipes.training_data import TrainingData
from voxray.runs.layout import TRAINED_ROWS_FILE, checkpoint_folder
from voxray.training.best_checkpoint import BestCheckpoint
from voxray.training.callbacks import planned_workers
from voxray.training.checkpoint import CheckpointWriter, Progress, publish_adapter
from voxray.training.engine import DataParallel, Engine, OptimizerState
from voxray.training.loop import Hooks, StopSignals, TrainState, fit, warmup_warning
from voxray.training.loss_scaling import LossScaler
from voxray.training.previews import MAX_TOKENS, Previews, PreviewSettings
from voxray.training.records import Monitor
from voxray.training.resource_errors import explain_resource_errors
from voxray.training.throughput import epoch_efficiency
from voxray.training.validate import ValidationRows
from voxray.training.validation_hook import ValidationSizes, Validator

DEBUG_STEPS = 4


def train(run: RunContext, data: TrainingData) -> dict[str, Any]:
    """Train one adapter, from the newest checkpoint of the run folder if there is one.

    Returns:
        {"steps", "finished", "adapter_step", metrics of the last validation}. On rank 0, with validation rows, also
        {"best": {metric: {"step", "value"}}} for the headline metric of every task and --metric_for_best_model.
    """
    with explain_resource_errors(run.settings):
        set_tf32(run.settings.tf32)
        set_deterministic(run.settings.deterministic)
        sampler = run.stage.prompt_sampler
        extra_tokens = sampler.max_extra_prompt_tokens if sampler else None
        features = Features((*data.train, *data.replay), extra_tokens, num_replay_sets=len(data.replay))
        held_out = Features(data.validation)
        rows, held_out_rows, lost = choose_rows(
            run.stage, run.settings, features, held_out, run.front_end, data.divided
        )
        validation = ValidationRows(run.front_end, held_out, held_out_rows)
        state, lines = _build_state(run, features, rows, validation)
        loader = _build_loader(run, features, rows, state.start.microbatches_per_step)
        num_steps = _count_steps(run, loader.plan)
        monitor = Monitor(
            run.run_dir,
            state.start.step,
            active=run.worker.is_first,
            trackers=run.settings.report_to,
            settings=run.settings.model_dump(mode="json"),
            publish=run.callbacks.publish,
        )
        if run.worker.is_first:
            _write_start(run, data, lost, state.parameters)
            _write_trained_rows(run, features, rows, loader.plan)
            for line in filter(None, (*lines, count_lost(run.stage, lost))):
                monitor.say(line)
            describe_run(monitor, state.parameters, loader, state.start.step, num_steps)
            if (warning := warmup_warning(run.settings, num_steps)) and not run.settings.debug:
                monitor.say(warning)
        step = _fit(run, state, loader, num_steps, monitor, validation)
        return _finish(run, state.best, step, num_steps, monitor)


def _build_state(
    run: RunContext, features: Features, rows: np.ndarray, validation: ValidationRows
) -> tuple[TrainState, tuple[str, ...]]:
    """The model with all state of a checkpoint, and log lines on what it starts from; empty ones say nothing."""
    settings, stage = run.settings, run.stage
    model, init_line = build_model(run, with_encoder=features.store != "encoder")
    microbatches_per_step = planned_workers(settings.num_workers, run.worker) * settings.grad_accum
    prompts = stage.prompt_sampler.fingerprint if stage.prompt_sampler else ""
    start = Progress(0, microbatches_per_step, features.fingerprint(), prompts)
    start, optimizer_state = resume(run.run_dir, model, start, features.content_fingerprint())
    parameters = count_parameters(model, run.family)  # before the engine: ZeRO-3 shards the parameters
    engine = build_engine(run, model, optimizer_state, with_audio=bool(features.num_windows[rows].any()))
    scaler, best = LossScaler.for_dtype(fp16=settings.fp16), build_best_checkpoint(settings, validation)
    scaler.load(start.loss_scaler)
    dropped = best.load(start.best, start.step)
    state = TrainState(model, run.family, engine, run.worker, start, scaler, best, parameters)
    line = "the validation rows are others than before, so the best checkpoint is chosen anew" if dropped else ""
    return state, (init_line, line)


def build_engine(run: RunContext, model: Any, optimizer_state: OptimizerState, *, with_audio: bool) -> Engine:
    """Create the engine of ``--strategy``.

    Args:
        optimizer_state: State of a checkpoint; empty for a new run.
        with_audio: Whether any training row has audio.
    """
    engine: Engine
    settings = run.settings
    rates: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    rates["fused"] = settings.fuses_optimizer
    sharding: dict[str, Any] = {"dtypes": training_dtypes(model, run), "with_audio": with_audio}
    if settings.strategy == "ddp":
        engine = DataParallel(model, run.family, run.worker, **rates)
    elif settings.strategy == "fsdp":
        from voxray.training.fsdp import Fsdp

        engine = Fsdp(model, run.family, run.worker, offload_optimizer=settings.offload_optimizer, **sharding, **rates)
    else:
        from voxray.training.zero import Zero

        engine = Zero(model, run.family, run.worker, stage=settings.zero_stage, **sharding, **rates)
    engine.load_optimizer_state(optimizer_state)
    return engine


def build_best_checkpoint(settings: TrainSettings, validation: ValidationRows) -> BestCheckpoint:
    """Create the tracker of the best checkpoint and of early stopping, as the settings say.

    Raises:
        SettingsError: The metric cannot be computed from the validation rows.
    """
    metric, is_set = settings.metric_for_best_model, "metric_for_best_model" in settings.model_fields_set
    codes = validation.features.task[validation.rows]
    tasks = [name for name, code in TASK_CODES.items() if code in codes]
    if tasks and is_set and metric not in (known := validation_metrics(tasks)):
        raise SettingsError(f"--metric_for_best_model {metric}: validation has {', '.join(known)}")
    fingerprint = validation.fingerprint(settings.eval_max_new_tokens)
    return BestCheckpoint(metric, settings.early_stopping_patience, settings.early_stopping_threshold, rows=fingerprint)


def _build_loader(run: RunContext, features: Features, rows: np.ndarray, microbatches_per_step: int) -> Loader:
    settings, worker = run.settings, run.worker
    positions = run.front_end.cross_attention_positions
    plan = build_plan(run.stage, settings, features, rows, microbatches_per_step, positions)
    masks = Masking(build_masks(settings), settings.seed)
    pin_memory = settings.pin_memory and worker.device.type == "cuda"
    return Loader(
        features,
        run.front_end,
        plan,
        worker,
        settings.loader_workers,
        masks,
        run.stage.prompt_sampler,
        ContextSampler(features, rows, run.front_end, settings.context_shares, settings.seed),
        pin_memory=pin_memory,
    )


def build_plan(
    stage: Stage,
    settings: TrainSettings,
    features: RowLengths,
    rows: np.ndarray,
    microbatches_per_step: int,
    cross_attention_positions: int = 0,
) -> Plan:
    """Create the plan of a run.

    Args:
        rows: Row numbers to train on.
        cross_attention_positions: Positions per window, in addition to the tokens (see ``models.front_end.FrontEnd``).
    """
    variants, num_tokens = Variants(rows, features.sample[rows], settings.seed), features.longest_tokens
    if cross_attention_positions:
        num_tokens = num_tokens + features.num_windows * cross_attention_positions
    return Plan(
        features.task[variants.first],
        variants.first,
        stage.task_weights,
        settings.seed,
        Batching(settings.batching, settings.per_device_bsz, settings.pack_tokens, stage.per_task_bsz),
        microbatches_per_step,
        settings.drop_last,
        variants,
        num_tokens,
        stage.curriculum,
        variants.first >= features.first_replay,
        settings.replay_share,
    )


def build_masks(settings: TrainSettings) -> SpecAugment:
    """Create SpecAugment as the settings say. Jobs without these flags use no masks."""
    names = MaskFlags.model_fields if isinstance(settings, MaskFlags) else ()
    return SpecAugment(**{name: getattr(settings, name) for name in names})


def _count_steps(run: RunContext, plan: Plan) -> int:
    settings = run.settings
    epochs = plan.curriculum_epochs if run.stage.curriculum else settings.epochs
    num_steps = settings.max_steps or plan.total_steps(epochs)
    return min(num_steps, DEBUG_STEPS) if settings.debug else num_steps


def _write_start(
    run: RunContext, data: TrainingData, lost: list[LostRow], parameters: dict[str, dict[str, int]]
) -> None:
    write_ledger(run.run_dir / "quarantine.jsonl", data.folders, lost)
    write_json(run.run_dir / "parameters.json", parameters)


def _write_trained_rows(run: RunContext, features: Features, rows: np.ndarray, plan: Plan) -> None:
    trained = describe_trained_rows(features, rows, run.front_end.sample_rate_hz)
    write_json(run.run_dir / TRAINED_ROWS_FILE, {**trained, "rows_per_step": rows_per_step(plan)})


def rows_per_step(plan: Plan) -> float:
    """Rows of an optimizer step, on average over the first epoch."""
    microbatches = plan.epoch_microbatches(0)
    return len(microbatches.rows) / len(microbatches) * plan.microbatches_per_step


def describe_run(
    monitor: Monitor, parameters: Mapping[str, Mapping[str, int]], loader: Loader, step: int, num_steps: int
) -> None:
    """Log the parameters per role, the plan, and one decoded example per task."""
    features, front_end, plan = loader.features, loader.front_end, loader.plan
    total, trainable = (sum(entry[key] for entry in parameters.values()) for key in ("total", "trainable"))
    roles = ", ".join(f"{role} {entry['trainable']:,}" for role, entry in parameters.items())
    monitor.say(f"parameters: {total:,}, of which {trainable:,} train ({trainable / total:.2%}): {roles}")
    rows = ", ".join(f"{len(rows)} {name}" for name, rows in plan.rows_by_task.items())
    steps = f"{plan.steps_in_epoch(0)} steps of {rows_per_step(plan):.3g} rows per epoch"
    monitor.say(f"data: {rows} rows; {steps}; {epoch_efficiency(plan, features):.1%} of their tokens are not padding")
    monitor.say(f"{'resuming from' if step else 'starting at'} step {step} of {num_steps}")
    first_epoch = plan.epoch_rows(0)
    for name in (name for name in plan.rows_by_task if name in TASK_CODES):
        of_task = features.task[first_epoch] == TASK_CODES[name]
        if of_task.any():
            batch = collate_training([loader.row(int(first_epoch[of_task.argmax()]), 0)], front_end)
            ids, is_answer = batch["input_ids"][0], batch["labels"][0] != IGNORED
            prompt, answer = (front_end.show(ids[part].tolist()) for part in (~is_answer, is_answer))
            monitor.say(f"  {name}: {prompt} | {answer}")


def _fit(
    run: RunContext,
    state: TrainState,
    loader: Loader,
    num_steps: int,
    monitor: Monitor,
    validation: ValidationRows,
) -> int:
    """Run the training loop with validation, previews and checkpoints; returns the number of steps done."""
    settings, is_first = run.settings, run.worker.is_first
    sizes = ValidationSizes(max(8, settings.per_device_bsz), settings.per_device_bsz, settings.eval_max_new_tokens)
    validator = Validator(state, validation, sizes, monitor, settings.seed, num_steps, run.callbacks.report)
    if is_first and len(validation.rows):
        validator.previews = build_previews(run, monitor)
    upload = partial(run.remote.try_push, monitor.say)
    writer = CheckpointWriter(run.run_dir, settings.save_total_limit, upload) if is_first else None
    hooks = Hooks(monitor, validator, writer, StopSignals(run.run_dir, run.callbacks.is_leaving))
    try:
        return fit(state, loader, settings, num_steps, hooks)
    finally:
        if writer:
            writer.close()


def build_previews(run: RunContext, monitor: Monitor) -> Previews:
    """Create the previews of a run. An existing previews.yaml takes precedence over the flags."""
    settings = run.settings
    tokens = min(settings.eval_max_new_tokens, MAX_TOKENS)
    defaults = PreviewSettings(rows=settings.preview_rows, max_new_tokens=tokens)
    previews = Previews.of_run(run.run_dir, monitor.say, defaults)
    rows = previews.settings.rows
    if "preview_rows" in settings.model_fields_set and rows != settings.preview_rows:
        monitor.say(f"previews: {previews.path} says rows: {rows}, which overrides --preview_rows")
    return previews


def _finish(run: RunContext, best: BestCheckpoint, step: int, num_steps: int, monitor: Monitor) -> dict[str, Any]:
    """Publish the adapter of a finished run, and log and return its result."""
    finished = step >= num_steps or best.should_stop
    adapter_step = best.best_step if run.settings.load_best_model_at_end and best.best_step else step
    if run.worker.is_first and finished:
        checkpoint = checkpoint_folder(run.run_dir, adapter_step)
        publish_adapter(checkpoint, run.run_dir / "adapter", _card(run, checkpoint, adapter_step, monitor))
        for line in _last_lines(best, step, num_steps, adapter_step):
            monitor.say(line)
    result = {"steps": step, "finished": finished, "adapter_step": adapter_step, **best.last}
    best_steps = monitor.best_steps(best.first_step)
    if best.best_step:
        best_steps[best.metric] = {"step": best.best_step, "value": best.best_value}
    for name, entry in best_steps.items():
        monitor.say(f"best {name}: {entry['value']:.4f} at step {entry['step']}")
    monitor.close()
    return {**result, "best": best_steps} if best_steps else result


def _card(run: RunContext, checkpoint: Path, step: int, monitor: Monitor) -> str:
    """Text of the model card of a checkpoint; "" if it cannot be made, which must not end a run."""
    try:
        facts = read_card_facts(checkpoint, run.settings.model_id, run=read_run(run.run_dir, step))
        return card_text(facts)
    except Exception as error:  # it reads files that others wrote, such as the card of the base
        monitor.say(f"no model card: {one_line(error, 200)}")
        return ""


def _last_lines(best: BestCheckpoint, step: int, num_steps: int, adapter_step: int) -> Iterator[str]:
    if step < num_steps:
        num_bad = best.num_bad_validations
        yield f"early stopping at step {step}: {num_bad} validations without a better {best.metric}"
    if adapter_step != step:
        yield f"the adapter is that of step {adapter_step} (--load_best_model_at_end)"
