"""Evaluations in a model card: the rows of its tables, and the entries of the hub's model index."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult

from voxray.cards.facts import AdapterFacts, BaseFacts, plain_name
from voxray.comparison.evaluations import Evaluation, ScoredRow, match_rows, metric_contributions, read_evaluation
from voxray.comparison.significance import Difference, compare_rows, resampling_units
from voxray.core.content_hash import file_hash
from voxray.core.errors import RunError
from voxray.core.tasks import TASKS
from voxray.evaluation.slices import slice_rows
from voxray.metrics.names import headline
from voxray.models.adapters.lora import find_adapter
from voxray.models.adapters.read_files import weights_file
from voxray.models.hf_files import HUB_ID, hub_id

TASK_TYPES = {"asr": "automatic-speech-recognition"}
"""{task: its name on the hub}; all others are ``ANY_AUDIO``."""
ANY_AUDIO = "audio-text-to-text"
METRIC_TYPES = {"cer_nospace": "cer", "rouge_l": "rouge", "cider_d": "cider"}
"""{metric: its name on the hub}, where that differs."""
LEVEL = 0.95
MAX_NAMES = 5
"""Names of more data sets than these are not written in one cell."""


@dataclass(frozen=True)
class CardEvaluation:
    """An evaluation of the adapter, or of its base.

    Attributes:
        scale: Share of the adapter's LoRA; 0 for the base.
    """

    evaluation: Evaluation
    scale: float

    @property
    def is_base(self) -> bool:
        return self.scale == 0


@dataclass(frozen=True)
class MetricResult:
    """A metric of one task on one data set, or on all rows of the task.

    Attributes:
        dataset: Name of the data set; the names of all if the rows are of several.
        value: The metric, with the ends of its 95 % interval; None if there is no interval.
        n: Number of rows, or of words or other units, as metrics.json counts them.
        scale: See ``CardEvaluation``.
    """

    task: str
    dataset: str
    metric: str
    value: float
    low: float | None
    high: float | None
    n: int
    scale: float

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None


@dataclass(frozen=True)
class DatasetDifference:
    """The headline metric of a task on one data set: the base, the adapter, and the paired difference."""

    task: str
    dataset: str
    metric: str
    difference: Difference


def read_card_evaluations(folders: Sequence[str], adapter: AdapterFacts, base: BaseFacts) -> list[CardEvaluation]:
    """Read evaluations for the card of an adapter.

    Raises:
        RunError: A folder holds no finished evaluation, or one of another adapter or another base.
    """
    return [_read_card_evaluation(Path(folder), adapter, base) for folder in folders]


def _read_card_evaluation(folder: Path, adapter: AdapterFacts, base: BaseFacts) -> CardEvaluation:
    try:
        evaluation = read_evaluation(folder)
    except RunError as error:
        raise RunError(f"--evaluations {error}") from None
    settings = evaluation.settings
    if settings.get("score_only"):
        raise RunError(f"--evaluations {folder}: scores answers of {settings['score_only']}, not those of this adapter")
    if not evaluation.metrics.keys() & TASKS.keys():
        raise RunError(f"--evaluations {folder}: its metrics.json has no metric of a task")
    lora_dir = str(settings.get("lora_dir") or "")
    if not lora_dir:
        model_id = str(settings.get("model_id") or "")
        names = {hub_id(model_id), model_id.rstrip("/").rpartition("/")[2]} - {""}
        if names.isdisjoint({base.hub_id, base.name}):
            raise RunError(f"--evaluations {folder}: is of the model {model_id}, and the adapter's base is {base.name}")
        return CardEvaluation(evaluation, 0.0)
    if not (weights := _weights(lora_dir)):
        raise RunError(f"--evaluations {folder}: its adapter {lora_dir} is not here any more, so it cannot be compared")
    if file_hash(weights) != adapter.weights_sha256:
        raise RunError(f"--evaluations {folder}: is of the adapter {lora_dir}, which holds other weights than this one")
    scale = settings.get("lora_scale", 1.0)
    return CardEvaluation(evaluation, float(scale[0] if isinstance(scale, list) else scale))


def _weights(lora_dir: str) -> Path | None:
    """File of an adapter's weights, None if the adapter is not on this machine any more."""
    try:
        return weights_file(find_adapter(lora_dir))
    except RunError:
        return None


def metric_results(evaluation: CardEvaluation) -> Iterator[MetricResult]:
    """The metrics of the task table, of every task on all its rows, and then on every data set if there are several."""
    metrics = evaluation.evaluation.metrics
    for task in (task for task in TASKS if task in metrics):
        by_dataset = metrics.get("slices", {}).get(task, {}).get("dataset", {})
        names = [plain_name(name) for name in by_dataset]
        parts: list[tuple[str, Mapping[str, Any]]] = [(_join_names(names), metrics[task])]
        if len(by_dataset) > 1:
            parts += zip(names, by_dataset.values(), strict=True)
        for dataset, entries in parts:
            for name in TASKS[task].metrics:
                entry = entries.get(name)
                if entry and entry.get("value") is not None:
                    value, low, high, n = (entry.get(key) for key in ("value", "low", "high", "n"))
                    yield MetricResult(task, dataset, name, value, low, high, n, evaluation.scale)


def _join_names(datasets: Sequence[str]) -> str:
    return f"{len(datasets)} data sets" if len(datasets) > MAX_NAMES else ", ".join(datasets) or "all rows"


def eval_results(evaluations: Sequence[CardEvaluation], scale: float) -> list[EvalResult]:
    """Entries of the hub's model index: all metrics of the adapter at a share of its LoRA, not those of the base.

    The index has no field for intervals, and ``args`` of a metric is the only one that its reader keeps as it is. The
    hub takes entries with the same types of task and data set for one, so the data set's ``config`` holds our task.
    """
    return [
        EvalResult(
            task_type=TASK_TYPES.get(result.task, ANY_AUDIO),
            task_name=result.task,
            dataset_type=result.dataset if HUB_ID.fullmatch(result.dataset) else _as_identifier(result.dataset),
            dataset_name=result.dataset,
            dataset_config=result.task,
            metric_type=METRIC_TYPES.get(result.metric, result.metric),
            metric_name=f"{result.task}/{result.metric}",
            metric_value=result.value,
            metric_args={"low": result.low, "high": result.high, "level": LEVEL} if result.has_interval else None,
        )
        for evaluation in evaluations
        if evaluation.scale == scale
        for result in metric_results(evaluation)
    ]


def _as_identifier(name: str) -> str:
    return "-".join(name.replace(",", " ").split()).lower()


def dataset_differences(evaluations: Sequence[CardEvaluation]) -> list[DatasetDifference]:
    """What the adapter gained and lost on every data set against its base, on the rows that both answered.

    Returns:
        An entry per task and data set; empty if there are no two data sets that base and adapter both have.
    """
    entries: dict[tuple[str, str], DatasetDifference] = {}
    bases = [each.evaluation for each in evaluations if each.is_base]
    tuned = [each.evaluation for each in evaluations if not each.is_base]
    for base, other in product(bases, tuned):
        with suppress(RunError):  # they have no row in common
            matched = match_rows([base, other])
            for task in TASKS:
                rows = tuple(tuple(row for row in run if row.task == task) for run in matched.rows)
                for dataset, difference in _differences(task, rows, matched.rules):
                    entry = DatasetDifference(task, dataset, headline(task), difference)
                    entries.setdefault((task, dataset), entry)
    return list(entries.values()) if len({dataset for _, dataset in entries}) > 1 else []


def _differences(task: str, rows: Sequence[Sequence[ScoredRow]], rules: Any) -> Iterator[tuple[str, Difference]]:
    if not rows[0]:
        return
    names, metrics = metric_contributions(task, rows, rules)
    if headline(task) not in names:
        return
    base, tuned = (of_run[names.index(headline(task))] for of_run in metrics)
    values = [row.values for row in rows[0]]
    for dataset, in_slice in slice_rows(values).get("dataset", {}).items():
        indices = np.array(in_slice)
        units = resampling_units([values[index] for index in in_slice])
        [difference] = compare_rows([base.select(indices)], [tuned.select(indices)], units)
        if difference:
            yield plain_name(dataset), difference
