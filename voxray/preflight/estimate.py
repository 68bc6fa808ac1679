"""Estimates of a run's duration and of the disk space it needs."""

import math
from dataclasses import dataclass

import numpy as np

from voxray.audio.logmel import HOP_SAMPLES
from voxray.batches.plan import Plan
from voxray.config.train import TrainSettings
from voxray.preflight.pack_sizes import validation_batch_size
from voxray.preflight.rows import RunRows
from voxray.preflight.trial_steps import GenerationCost, StepCost
from voxray.recipes.run_stage import DEBUG_STEPS

TOKEN_BYTES, ROW_BYTES = 4, 512  # per token id in a shard; per row for its lengths and texts
CHECKPOINT_COPIES = 3  # float32 copies of the trained weights: the weights and AdamW's two moments


@dataclass(frozen=True)
class RunTime:
    """Estimated duration of a run.

    Attributes:
        num_steps: Optimizer steps.
        training_sec: Duration of all steps; None if no step was timed.
        num_validations: Number of validations.
        validation_sec: Duration of all validations; None if no answer was timed.
    """

    num_steps: int
    training_sec: float | None
    num_validations: int
    validation_sec: float | None

    @property
    def total_sec(self) -> float | None:
        if self.training_sec is None or (self.num_validations and self.validation_sec is None):
            return self.training_sec
        return self.training_sec + (self.validation_sec or 0.0)


def total_steps(settings: TrainSettings, rows: RunRows, plan: Plan) -> int:
    """Optimizer steps of a run (see ``recipes.run_stage``)."""
    epochs = plan.curriculum_epochs if rows.run.stage.curriculum else settings.epochs
    steps = settings.max_steps or plan.total_steps(epochs)
    return min(steps, DEBUG_STEPS) if settings.debug else steps


def run_time(
    settings: TrainSettings,
    rows: RunRows,
    plan: Plan,
    num_workers: int,
    average: StepCost | None,
    answering: GenerationCost | None,
) -> RunTime:
    """Estimate the duration of a run from measurements of one step and one batch of answers.

    Args:
        num_workers: Training processes; each computes ``grad_accum`` packs of a step.
        average: Cost of the average pack.
        answering: Cost of generating answers to a batch.
    """
    steps = total_steps(settings, rows, plan)
    held_out = rows.held_out_rows
    epochs = max(1, math.ceil(plan.epochs_done(steps)))
    num_validations = math.ceil(steps / settings.eval_steps) if settings.eval_steps else epochs
    num_validations = num_validations if len(held_out) else 0
    training_sec = steps * settings.grad_accum * average.sec if average else None
    validation_sec = None
    if answering and num_validations:
        batches = math.ceil(math.ceil(len(held_out) / validation_batch_size(settings)) / num_workers)
        tokens = min(float(rows.held_out.num_target_tokens[held_out].mean()), settings.eval_max_new_tokens)
        validation_sec = num_validations * batches * (answering.prompt_sec + tokens * answering.token_sec)
    return RunTime(steps, training_sec, num_validations, validation_sec)


def features_bytes(settings: TrainSettings, rows: RunRows) -> int:
    """Size of the feature shards of all rows."""
    front_end, total = rows.front_end, 0
    for lengths in (rows.train, rows.held_out):
        samples = int(lengths.num_samples.sum())
        if settings.store == "pcm16":
            audio = 2 * samples
        elif settings.store == "mel":
            audio = 2 * front_end.num_mel_bins * (samples // HOP_SAMPLES)
        else:
            size = 4 if settings.cache_dtype == "float32" else 2
            audio = int(lengths.num_windows.sum()) * front_end.encoder_positions * front_end.encoder_dim * size
        total += audio + TOKEN_BYTES * int(lengths.num_tokens.sum()) + ROW_BYTES * len(np.atleast_1d(lengths.task))
    return total


def checkpoints_bytes(settings: TrainSettings, num_trained: int) -> int:
    """Peak size of the checkpoints: the ``save_total_limit`` newest, the best one, and the one being written."""
    return (settings.save_total_limit + 2) * CHECKPOINT_COPIES * 4 * num_trained + 4 * num_trained
