"""Validation during training: generate answers to the validation rows and score them, shared out over the workers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from voxray.data.features import Features
from voxray.evaluation.generate import answers, length_batches
from voxray.evaluation.metrics.counts import as_row, count, metrics_of
from voxray.models.family import Family, FrontEnd
from voxray.tasks import TASKS
from voxray.training.engine import Worker, gather


def first_rows_per_task(features: Features, rows: np.ndarray, limit: int) -> np.ndarray:
    """The first ``limit`` rows of every task, in order; all of them if ``limit`` is 0."""
    if not limit:
        return rows
    kept = [rows[features.task[rows] == code][:limit] for code in range(len(TASKS))]
    return np.sort(np.concatenate(kept))


def validate(
    model: Any,
    family: Family,
    front_end: FrontEnd,
    features: Features,
    rows: np.ndarray,
    worker: Worker,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """Score a model by what it generates.

    Args:
        rows: Row numbers to validate on, the same on every worker.
    Returns:
        {"<task>/<metric>": value} over all workers' rows, the same on every worker.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    mine: list[tuple[str, dict[str, int]]] = []
    for batch in length_batches(features, rows[worker.rank :: worker.world_size].tolist(), batch_size):
        stored = [features.row(number) for number in batch]
        texts = answers(model, family, front_end, stored, max_new_tokens=max_new_tokens)
        mine += [(row.task, as_row(count(row.answer, text))) for row, text in zip(stored, texts, strict=True)]
    for module in in_training:  # not model.train(), which would wake the frozen parts as well
        module.training = True
    scored: Sequence[Any] = [item for part in gather(mine, worker) for item in part]  # type: ignore[attr-defined]
    found = {}
    for task in TASKS:
        metrics = metrics_of(task, [counts for name, counts in scored if name == task])
        found |= {f"{task}/{name}": float(entry["value"]) for name, entry in metrics.items()}
    return found
