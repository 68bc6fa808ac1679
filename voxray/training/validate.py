"""Validation during training: generate answers to the validation rows, score them, and weigh the reference answers.

Rows are put into batches first and the batches are then shared out over the workers, so a batch is computed alike by
any number of them, and what is added up is added up in the order of rows: the figures are the same for any number of
workers, and on each of them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxray.batches.rank import Worker
from voxray.core.tasks import TASKS
from voxray.features.reader import Features, RowLengths
from voxray.features.shards import TASK_CODES
from voxray.generation.generate import generate_texts, length_batches
from voxray.generation.likelihood import reference_losses
from voxray.metrics.counts import as_row, compute_metrics
from voxray.metrics.names import text_metric_names
from voxray.metrics.overall import likelihood_metrics, overall_metrics
from voxray.metrics.rows import count_row
from voxray.metrics.texts import text_metrics
from voxray.models.interface import FrontEnd, ModelFamily
from voxray.training.engine import gather


@dataclass(frozen=True)
class Validation:
    """What a validation gave, the same on every worker.

    Attributes:
        metrics: {"<task>/<metric>" or "overall/<figure>": value}; what is not finite or has no rows is absent.
        texts: {row number: generated answer} of all rows.
    """

    metrics: dict[str, float]
    texts: dict[int, str]


def first_rows_per_task(features: RowLengths, rows: np.ndarray, limit: int) -> np.ndarray:
    """The first ``limit`` rows of every task, in order; all of them if ``limit`` is 0."""
    if not limit:
        return rows
    kept = [rows[features.task[rows] == code][:limit] for code in range(len(TASKS))]
    return np.sort(np.concatenate(kept))


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Dropout off meanwhile; after it every module is in the mode in which it was."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:  # not model.train(), which would wake the frozen parts as well
            module.training = True


def validate(
    model: Any,
    family: ModelFamily,
    front_end: FrontEnd,
    features: Features,
    rows: np.ndarray,
    worker: Worker,
    *,
    batch_size: int,
    loss_batch_size: int,
    max_new_tokens: int,
) -> Validation:
    """Score a model by what it generates, and by how likely it finds the reference answers. Every worker calls it.

    Args:
        features: The validation sets; ``overall/weighted`` counts all of their rows, used or not.
        rows: Row numbers to validate on, the same on every worker.
        batch_size: Rows generated together.
        loss_batch_size: Rows of a forward pass over prompt and answer.
    """
    mine: list[tuple[int, str, str, dict[str, int]]] = []
    with in_eval_mode(model):
        for batch in shared_batches(features, rows, batch_size, worker):
            stored = [features.row(number) for number in batch]
            texts = generate_texts(model, family, front_end, stored, max_new_tokens=max_new_tokens)
            for number, row, text in zip(batch, stored, texts, strict=True):
                answered = {"task": row.task, "language": row.language, "reference": row.answer, "prediction": text}
                mine.append((number, row.answer, text, as_row(count_row(answered))))
        losses = answer_losses(model, family, front_end, features, rows, worker, batch_size=loss_batch_size)
    scored = sorted((item for part in gather_lists(mine, worker) for item in part), key=lambda item: item[0])
    metrics: dict[str, float] = {}
    for task, code in TASK_CODES.items():
        of_task = [item for item in scored if features.task[item[0]] == code]
        names = (*TASKS[task].metrics, *text_metric_names(task))
        found = compute_metrics(task, [counts for *_, counts in of_task], names)
        found |= text_metrics(task, [(reference, text) for _, reference, text, _ in of_task])
        values = {name: float(entry["value"]) for name, entry in found.items()} | losses.get(task, {})
        metrics |= {f"{task}/{name}": value for name, value in values.items()}
    sizes = {task: int((features.task == code).sum()) for task, code in TASK_CODES.items()}
    metrics |= overall_metrics(metrics, sizes)
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return Validation(finite, {row: text for row, _, text, _ in scored})


def answer_losses(
    model: Any,
    family: ModelFamily,
    front_end: FrontEnd,
    features: Features,
    rows: np.ndarray,
    worker: Worker,
    *,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Loss and perplexity of the reference answers, by the forward pass of training without label smoothing.

    Args:
        model: In eval mode.
    Returns:
        {task: {"loss", "perplexity"}} over all workers' rows.
    """
    mine: list[tuple[int, float]] = []
    for batch in shared_batches(features, rows, batch_size, worker):
        losses = reference_losses(model, family, front_end, [features.row(number) for number in batch])
        mine += zip((int(features.task[number]) for number in batch), losses, strict=True)
    found = [item for part in gather_lists(mine, worker) for item in part]
    tokens = np.bincount(features.task[rows], features.num_target_tokens[rows], minlength=len(TASKS))
    # fsum rounds once, so that the order in which workers come does not matter
    nll = {code: math.fsum(loss for task, loss in found if task == code) for code in TASK_CODES.values()}
    return {task: likelihood_metrics(nll[code], int(tokens[code])) for task, code in TASK_CODES.items()}


def shared_batches(features: Features, rows: np.ndarray, batch_size: int, worker: Worker) -> list[list[int]]:
    """This worker's share of the batches of some rows."""
    batches = list(length_batches(features, rows.tolist(), batch_size))
    return batches[worker.rank :: worker.world_size]


def gather_lists(mine: list[Any], worker: Worker) -> list[list[Any]]:
    """Every worker's list, on every worker."""
    return list(gather(mine, worker))  # type: ignore[arg-type]
