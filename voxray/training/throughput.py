"""Speed of training steps: rows, tokens and seconds of audio per second, padding, and time spent waiting for data."""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from voxray.batches.loader import Loader
from voxray.batches.plan import Plan
from voxray.core.tasks import TASKS
from voxray.features.reader import Features
from voxray.training.gpu_stats import GpuStats

T = TypeVar("T")


class Throughput:
    """Times the steps of a run on this worker. Rows, tokens and audio are counted over all workers.

    Args:
        loader: Loader whose steps are timed.
        device: Device of this worker's model.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._plan, self._features = loader.plan, loader.features
        self._rate_hz = loader.front_end.sample_rate_hz
        self._gpu_stats = GpuStats(device)
        self._requested = self._received = time.perf_counter()

    def timed(self, steps: Iterable[T]) -> Iterator[T]:
        """Yield the same steps. The time of a step starts when the loader is asked for it."""
        iterator = iter(steps)
        while True:
            self._requested = time.perf_counter()
            try:
                step = next(iterator)
            except StopIteration:
                return
            self._received = time.perf_counter()
            yield step

    def record(self, step: int) -> dict[str, float]:
        """The values to record with a step that has just ended; steps count from 0.

        Returns:
            sec: Seconds since the loader was asked for the step, without validation and saving.
            data_wait: Share of that time in which this worker waited for the loader.
            samples_per_sec, tokens_per_sec: Rows, and their tokens without padding, per second.
            audio_sec_per_sec: Seconds of audio of these rows per second: the clips' length at the model's sampling
                rate, as stored in the index of the features (variants of another speed have their own length), without
                the padding of windows.
            efficiency: See ``efficiency``.
            The values of ``GpuStats.read``.
        """
        seconds, rows = time.perf_counter() - self._requested, step_rows(self._plan, step)
        return {
            "sec": seconds,
            "data_wait": (self._received - self._requested) / seconds,
            "samples_per_sec": len(rows) / seconds,
            "tokens_per_sec": float(self._features.num_tokens[rows].sum()) / seconds,
            "audio_sec_per_sec": float(self._features.num_samples[rows].sum()) / self._rate_hz / seconds,
            "efficiency": efficiency(self._plan, self._features, step),
            **self._gpu_stats.read(),
        }


def step_rows(plan: Plan, step: int) -> np.ndarray:
    """Row numbers of a step, over all workers, without filler microbatches."""
    return np.concatenate(_microbatch_rows(plan, step))


def _microbatch_rows(plan: Plan, step: int) -> list[np.ndarray]:
    return [microbatch.rows for microbatch in plan.step_microbatches(step) if not microbatch.is_filler]


def answer_tokens(plan: Plan, features: Features, step: int) -> np.ndarray:
    """Number of answer tokens of each task in a step, over all workers. Shape (number of tasks,)."""
    rows = step_rows(plan, step)
    return np.bincount(features.task[rows], features.num_labels(rows), minlength=len(TASKS))


def efficiency(plan: Plan, features: Features, step: int) -> float:
    """Share of a step's tokens that are not padding. A pack counts as ``pack_tokens``, the same for every rank."""
    microbatches = _microbatch_rows(plan, step)
    return _efficiency(plan, features, np.concatenate(microbatches), np.cumsum([len(rows) for rows in microbatches]))


def epoch_efficiency(plan: Plan, features: Features, epoch: int = 0) -> float:
    """Share of an epoch's tokens that are not padding."""
    microbatches = plan.epoch_microbatches(epoch)
    return _efficiency(plan, features, microbatches.rows, microbatches.ends)


def _efficiency(plan: Plan, features: Features, rows: np.ndarray, ends: np.ndarray) -> float:
    tokens, sizes = features.num_tokens[rows], np.diff(ends, prepend=0)
    if plan.batching.kind == "packed":
        return float(tokens.sum() / (len(sizes) * plan.batching.pack_tokens))
    return float(tokens.sum() / (sizes * np.maximum.reduceat(tokens, ends - sizes)).sum())


def epoch_record(records: Iterable[Mapping[str, Any]], plan: Plan, features: Features, step: int) -> dict[str, float]:
    """Summarize an epoch.

    Args:
        records: The run's training records, including those written before it was resumed.
        step: Steps done at the end of the epoch.
    Returns:
        epoch: Number of the epoch, from 1.
        steps: Number of its steps.
        sec: Total time of its steps in seconds. A step that a resumed run repeated counts once.
        loss, loss/<task>: Means over the epoch's answer tokens, of the steps with a finite loss.
    """
    epoch, _ = plan.locate(step - 1)
    first = plan.total_steps(epoch)
    in_epoch = [record for record in records if first < record["step"] <= step]
    sums, counts = np.zeros(len(TASKS)), np.zeros(len(TASKS))
    for record in in_epoch:
        tokens = answer_tokens(plan, features, record["step"] - 1)
        for code, name in enumerate(TASKS):
            loss = record.get(f"loss/{name}")
            if loss is not None:
                sums[code] += loss * tokens[code]
                counts[code] += tokens[code]
    seconds = sum(record.get("sec") or 0.0 for record in in_epoch)
    summary = {"epoch": epoch + 1, "steps": len(in_epoch), "sec": seconds}
    if counts.any():
        summary["loss"] = float(sums.sum() / counts.sum())
    per_task = zip(TASKS, sums, counts, strict=True)
    return summary | {f"loss/{name}": float(total / count) for name, total, count in per_task if count}
