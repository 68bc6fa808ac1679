"""How fast a run goes: rows, tokens and seconds of audio a second, what is padding, and how long the data took."""

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
    """Times the steps of a run on this worker; rows, tokens and audio are counted over all workers.

    Args:
        loader: Whose steps are timed.
        device: Where this worker's model is.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._plan, self._features = loader.plan, loader.features
        self._rate_hz = loader.front_end.sample_rate_hz
        self._hardware = GpuStats(device)
        self._asked = self._given = time.perf_counter()

    def timed(self, steps: Iterable[T]) -> Iterator[T]:
        """The same steps; a step's time begins when the next one is asked for."""
        waiting = iter(steps)
        while True:
            self._asked = time.perf_counter()
            try:
                step = next(waiting)
            except StopIteration:
                return
            self._given = time.perf_counter()
            yield step

    def record(self, step: int) -> dict[str, float]:
        """Figures of a step that has just ended; step from 0.

        Returns:
            sec: Seconds from asking the loader for the step to now; validation and saving are not in it.
            data_wait: Share of them until the loader had given this worker its packs.
            samples_per_sec, tokens_per_sec: Rows, and their tokens without padding.
            audio_sec_per_sec: Seconds of audio of these rows: the clips' own length at the model's rate as stored in
                the features' index (of a variant at another speed its own), without the padding of windows.
            efficiency: See ``efficiency``.
            And what ``GpuStats.read`` gives.
        """
        seconds, rows = time.perf_counter() - self._asked, step_rows(self._plan, step)
        return {
            "sec": seconds,
            "data_wait": (self._given - self._asked) / seconds,
            "samples_per_sec": len(rows) / seconds,
            "tokens_per_sec": float(self._features.num_tokens[rows].sum()) / seconds,
            "audio_sec_per_sec": float(self._features.num_samples[rows].sum()) / self._rate_hz / seconds,
            "efficiency": efficiency(self._plan, self._features, step),
            **self._hardware.read(),
        }


def step_rows(plan: Plan, step: int) -> np.ndarray:
    """Row numbers of a step, over all workers, fillers left out."""
    return np.concatenate([pack.rows for pack in plan.step_packs(step) if not pack.is_filler])


def answer_tokens(plan: Plan, features: Features, step: int) -> np.ndarray:
    """Answer tokens of each task in a step, over all workers."""
    rows = step_rows(plan, step)
    return np.bincount(features.task[rows], features.num_target_tokens[rows], minlength=len(TASKS))


def efficiency(plan: Plan, features: Features, step: int) -> float:
    """Share of a step's tokens that are no padding; packs count as their whole budget, which balances the ranks."""
    packs = [pack.rows for pack in plan.step_packs(step) if not pack.is_filler]
    return _efficiency(plan, features, np.concatenate(packs), np.cumsum([len(rows) for rows in packs]))


def epoch_efficiency(plan: Plan, features: Features, epoch: int = 0) -> float:
    """The same of a whole epoch."""
    packs = plan.epoch_packs(epoch)
    return _efficiency(plan, features, packs.rows, packs.ends)


def _efficiency(plan: Plan, features: Features, rows: np.ndarray, ends: np.ndarray) -> float:
    tokens, sizes = features.num_tokens[rows], np.diff(ends, prepend=0)
    if plan.batching.kind == "packed":
        return float(tokens.sum() / (len(sizes) * plan.batching.pack_tokens))
    return float(tokens.sum() / (sizes * np.maximum.reduceat(tokens, ends - sizes)).sum())


def epoch_record(records: Iterable[Mapping[str, Any]], plan: Plan, features: Features, step: int) -> dict[str, float]:
    """What an epoch came to.

    Args:
        records: The run's training records, those of earlier starts of it included.
        step: Steps done, at the end of an epoch.
    Returns:
        epoch: Its number, from 1.
        steps: How many steps it had.
        sec: Sum of the time of its steps, each counted once however often the run was started again.
        loss, loss/<task>: Means over the epoch's answer tokens, of the steps whose loss was a number.
    """
    epoch, _ = plan.locate(step - 1)
    first = plan.steps_in(epoch) if epoch else 0
    mine = [record for record in records if first < record["step"] <= step]
    sums, counts = np.zeros(len(TASKS)), np.zeros(len(TASKS))
    for record in mine:
        tokens = answer_tokens(plan, features, record["step"] - 1)
        for code, name in enumerate(TASKS):
            loss = record.get(f"loss/{name}")
            if loss is not None:
                sums[code] += loss * tokens[code]
                counts[code] += tokens[code]
    found = {"epoch": epoch + 1, "steps": len(mine), "sec": sum(record.get("sec") or 0.0 for record in mine)}
    if counts.any():
        found["loss"] = float(sums.sum() / counts.sum())
    per_task = zip(TASKS, sums, counts, strict=True)
    return found | {f"loss/{name}": float(total / count) for name, total, count in per_task if count}
