"""Validation during training: generate answers, score them, and compute the loss of the reference answers.

Rows are batched first, and the batches are then divided among the workers. So a batch has the same rows with any number
of workers. Sums are taken in the order of rows. Both make the metrics equal for any number of workers, and on each of
them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxray.batches.rank import Worker
from voxray.core.content_hash import combined_hash
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
from voxray.models.front_end import FrontEnd
from voxray.models.interface import ModelFamily
from voxray.training.engine import gather

OwnPassesContext = Callable[[], AbstractContextManager[None]]
"""See ``Engine.own_passes``."""


@dataclass(frozen=True)
class ValidationRows:
    """Rows to validate with.

    Attributes:
        features: The validation sets.
        rows: Row numbers, the same on every worker; may be empty.
    """

    front_end: FrontEnd
    features: Features
    rows: np.ndarray

    def fingerprint(self, max_new_tokens: int) -> str:
        """Hash of everything, apart from the model, that decides the metrics of a validation.

        Args:
            max_new_tokens: Maximum length of an answer, in tokens.
        """
        return combined_hash([self.features.content_fingerprint(), self.rows.tolist(), max_new_tokens])


@dataclass(frozen=True)
class Validation:
    """Result of a validation, the same on every worker.

    Attributes:
        metrics: {"<task>/<metric>" or "overall/<metric>": value}, without values that are not finite or have no rows.
        texts: {row number: generated answer} of all rows.
    """

    metrics: dict[str, float]
    texts: dict[int, str]


def first_rows_per_task(features: RowLengths, rows: np.ndarray, limit: int) -> np.ndarray:
    """The first ``limit`` rows of every task, in order; all of them if ``limit`` is 0."""
    if not limit:
        return rows
    first = [rows[features.task[rows] == code][:limit] for code in range(len(TASKS))]
    return np.sort(np.concatenate(first))


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Put a model into eval mode within the block, and restore the mode of every module after it."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:  # not model.train(), which would change the frozen modules too
            module.training = True


def validate(
    model: Any,
    family: ModelFamily,
    held_out: ValidationRows,
    worker: Worker,
    *,
    batch_size: int,
    loss_batch_size: int,
    max_new_tokens: int,
    own_passes: OwnPassesContext = nullcontext,
) -> Validation:
    """Score a model by its generated answers and by the likelihood of the reference answers. Every worker calls it.

    ``overall/weighted`` weights the tasks by all rows of the validation sets, including those that are not used.

    Args:
        batch_size: Rows of a batch for generation.
        loss_batch_size: Rows of a forward pass over prompt and answer.
        max_new_tokens: Maximum length of an answer, in tokens.
        own_passes: See ``Engine``.
    """
    features = held_out.features
    local: list[tuple[int, str, str, dict[str, int]]] = []
    with in_eval_mode(model), own_passes():
        for batch in shared_batches(features, held_out.rows, batch_size, worker):
            rows = [features.row(number) for number in batch]
            texts = generate_texts(model, family, held_out.front_end, rows, max_new_tokens=max_new_tokens)
            for number, row, text in zip(batch, rows, texts, strict=True):
                answer = {"task": row.task, "language": row.language, "reference": row.answer, "prediction": text}
                local.append((number, row.answer, text, as_row(count_row(answer))))
    with in_eval_mode(model):
        losses = answer_losses(model, family, held_out, worker, batch_size=loss_batch_size, own_passes=own_passes)
    scored = sorted((item for part in gather_lists(local, worker) for item in part), key=lambda item: item[0])
    metrics: dict[str, float] = {}
    for task, code in TASK_CODES.items():
        of_task = [item for item in scored if features.task[item[0]] == code]
        names = (*TASKS[task].metrics, *text_metric_names(task))
        entries = compute_metrics(task, [counts for *_, counts in of_task], names)
        entries |= text_metrics(task, [(reference, text) for _, reference, text, _ in of_task])
        values = {name: float(entry["value"]) for name, entry in entries.items()} | losses.get(task, {})
        metrics |= {f"{task}/{name}": value for name, value in values.items()}
    sizes = {task: int((features.task == code).sum()) for task, code in TASK_CODES.items()}
    metrics |= overall_metrics(metrics, sizes)
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    return Validation(finite, {row: text for row, _, text, _ in scored})


def answer_losses(
    model: Any,
    family: ModelFamily,
    held_out: ValidationRows,
    worker: Worker,
    *,
    batch_size: int,
    own_passes: OwnPassesContext = nullcontext,
) -> dict[str, dict[str, float]]:
    """Loss and perplexity of the reference answers, by the forward pass of training without label smoothing.

    Args:
        model: In eval mode.
    Returns:
        {task: {"loss", "perplexity"}} over the rows of all workers.
    """
    features, rows = held_out.features, held_out.rows
    local: list[tuple[int, float]] = []
    with own_passes():
        for batch in shared_batches(features, rows, batch_size, worker):
            losses = reference_losses(model, family, held_out.front_end, [features.row(number) for number in batch])
            local += zip((int(features.task[number]) for number in batch), losses, strict=True)
    gathered = [item for part in gather_lists(local, worker) for item in part]
    tokens = np.bincount(features.task[rows], features.num_target_tokens[rows], minlength=len(TASKS))
    # fsum rounds once, so the order of the workers does not matter
    nll = {code: math.fsum(loss for task, loss in gathered if task == code) for code in TASK_CODES.values()}
    return {task: likelihood_metrics(nll[code], int(tokens[code])) for task, code in TASK_CODES.items()}


def shared_batches(features: Features, rows: np.ndarray, batch_size: int, worker: Worker) -> list[list[int]]:
    """Batch the rows and return this worker's share of the batches, as row numbers."""
    batches = list(length_batches(features, rows.tolist(), batch_size))
    return batches[worker.rank :: worker.world_size]


def gather_lists(local: list[Any], worker: Worker) -> list[list[Any]]:
    """Gather the lists of all workers on every worker."""
    return list(gather(local, worker))  # type: ignore[arg-type]
