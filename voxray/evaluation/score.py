"""Score prediction rows: metrics with confidence intervals per task, per slice and over all tasks (metrics.json).

Counts are always computed from the raw texts, so predictions of other versions and other systems are scored by the same
rules.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxray.core.errors import RunError
from voxray.core.tasks import TASKS
from voxray.evaluation.slices import slice_rows
from voxray.metrics.bootstrap import (
    LEVEL,
    NUM_RESAMPLES,
    Groups,
    group_by_speaker,
    interval,
    resampled_sums,
    resamples_for,
)
from voxray.metrics.captions import Caption
from voxray.metrics.counts import Ratio, as_columns, as_row, metric_ratio
from voxray.metrics.meteor_spice import java_metrics
from voxray.metrics.names import (
    evaluation_metrics,
    headline,
    higher_is_better,
    is_caption,
    is_transcript,
    is_translation,
)
from voxray.metrics.ngrams import SummedMetric
from voxray.metrics.overall import aggregate_tasks, headline_score, likelihood_metrics
from voxray.metrics.rows import PredictionRow, check_row, count_row, row_normalizer, row_references
from voxray.metrics.terms import RowTerms, count_terms
from voxray.metrics.texts import TextScores, score_texts
from voxray.text.normalize import DEFAULT_NORMALIZERS, Normalizers

SLICE_RESAMPLES = 1_000
MAX_LISTED_SPEAKERS = 5
MAX_LISTED_TERMS = 20
WHOLE_SET = frozenset(("cider_d",))
"""Metrics without slices: weights of CIDEr-D's n-grams depend on all captions of the set."""
NO_INTERVAL_DISTINCT = "an answer drawn twice brings no new n-gram, so that drawn sets would score lower: no interval"
NO_INTERVAL_JAVA = "a figure of the whole set, from a program in Java: no interval"

MetricEntry = dict[str, float | int | None]


@dataclass(frozen=True)
class CountedRows:
    """The rows of one task with their counts.

    Attributes:
        columns: {count: (rows,)}.
        terms: Of every row; empty without terms.
        metrics: {metric: its columns over the rows}.
        distinct: Metrics that cannot be computed from sums over rows, see ``score_texts``.
        signatures: {metric: signature}.
    """

    task: str
    rows: Sequence[PredictionRow]
    columns: Mapping[str, np.ndarray]
    terms: Sequence[RowTerms]
    metrics: Mapping[str, SummedMetric]
    distinct: TextScores
    signatures: dict[str, str]


def score(
    rows: Iterable[PredictionRow],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    terms: Sequence[str] = (),
    normalizers: Normalizers = DEFAULT_NORMALIZERS,
    caption_jars: str = "",
) -> dict[str, Any]:
    """Score predictions.

    Args:
        rows: Prediction rows, see ``metrics.rows``.
        seed: Of the bootstrap.
        num_resamples: Draws of the bootstrap for whole tasks; slices use at most 1,000. 0 computes no intervals.
        terms: Terms whose recall in transcripts is measured; if empty, those of each row's context.
        normalizers: Of transcripts, by language.
        caption_jars: Folder with the jars that METEOR and SPICE need, see ``metrics.meteor_spice``.
    Returns:
        {task: {metric: {"value", "low", "high", "n"}}}, and next to the tasks: ``overall`` (macro, weighted, balance,
        with the same keys), ``slices``, ``normalizer`` ({name: rows}), ``signatures``, ``intervals``, ``counts``,
        ``not_available`` and ``terms``. ``low`` and ``high`` are null if there is no interval.
    Raises:
        RunError: There are no rows, or one cannot be scored.
    """
    rows = list(rows)
    for number, row in enumerate(rows, start=1):
        check_row(row, f"row {number} ({row.get('id') or row.get('source') or 'no id'})")
    if not rows:
        raise RunError("no prediction to score")
    rows.sort(key=_sort_key)  # the bootstrap draws row indices; sorted, rows in any order have the same intervals
    rows_by_task = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    counted = {
        task: count_rows(task, task_rows, terms=terms, normalizers=normalizers)
        for task, task_rows in rows_by_task.items()
        if task_rows
    }
    metrics: dict[str, Any] = {}
    details: dict[str, Any] = {"signatures": {}, "intervals": {}, "not_available": {}}
    headline_samples: dict[str, np.ndarray] = {}
    for task, data in counted.items():
        task_seed = (seed, list(TASKS).index(task))
        metrics[task], task_details, samples = _score_task(data, task_seed, num_resamples, caption_jars)
        headline_samples |= {task: samples[headline(task)]} if headline(task) in samples else {}
        for name, value in task_details.items():
            details[name] |= {task: value} if value else {}
    metrics["overall"] = _overall(metrics, {task: len(data.rows) for task, data in counted.items()}, headline_samples)
    metrics["slices"] = {task: _slices(data, seed, num_resamples) for task, data in counted.items()}
    metrics["normalizer"] = dict(Counter(row_normalizer(row, normalizers).name for row in rows).most_common())
    metrics["counts"] = {task: _counts(data) for task, data in counted.items()}
    row_terms = [pair for data in counted.values() for pair in data.terms]
    if terms or row_terms:
        metrics["terms"] = _terms(row_terms, len(set(terms)))
    return {**metrics, **details}


def _sort_key(row: PredictionRow) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("id", "dataset", "references", "reference", "prediction"))


def by_task(metrics: Mapping[str, Any]) -> dict[str, dict[str, MetricEntry]]:
    """{task: {metric: {"value", ...}}} from the content of a metrics.json."""
    return {task: metrics[task] for task in TASKS if task in metrics}


def count_rows(
    task: str,
    rows: Sequence[PredictionRow],
    *,
    terms: Sequence[str] = (),
    normalizers: Normalizers = DEFAULT_NORMALIZERS,
    counts: Sequence[Mapping[str, int]] | None = None,
    needs_texts: bool = True,
) -> CountedRows:
    """Count the rows of one task.

    Args:
        normalizers: Of transcripts, by language.
        counts: Counts of each row, if this version has computed them already.
        needs_texts: Compute the metrics of ``score_texts`` of all tasks, not only those of translations.
    """
    columns = as_columns([as_row(count_row(row, normalizers)) for row in rows] if counts is None else counts)
    row_terms, term_columns = count_terms(rows, terms, normalizers) if is_transcript(task) else ([], {})
    columns |= term_columns
    ratios = {name: metric_ratio(task, name, columns) for name in evaluation_metrics(task)}
    if not columns["two_readings"].any():
        ratios |= {"cer_phonetic": None, "cer_best": None}
    ratios["loss"] = _loss(rows)
    available = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    pairs = [(row_references(row), row["prediction"]) for row in rows] if needs_texts or is_translation(task) else []
    text_sums, distinct, signatures = score_texts(task, pairs)
    return CountedRows(task, rows, columns, row_terms, {**available, **text_sums}, distinct, signatures)


def _loss(rows: Sequence[PredictionRow]) -> Ratio | None:
    """Loss per token of the reference answers, over the rows with a finite ``nll``."""
    sums = []
    for row in rows:
        nll, num_tokens = row.get("nll"), row.get("num_tokens") or 0
        if nll is None or not math.isfinite(nll) or num_tokens <= 0:
            nll, num_tokens = 0.0, 0
        sums.append((float(nll), float(num_tokens)))
    nll_sums, token_sums = np.array(sums).T
    n = int((token_sums > 0).sum())
    return Ratio(nll_sums, token_sums, n) if n else None


def _score_task(
    data: CountedRows, seed: Sequence[int], num_resamples: int, caption_jars: str
) -> tuple[dict[str, MetricEntry], dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Score one task.

    Returns:
        {metric: entry} in the order of ``evaluation_metrics``; signatures, intervals and unavailable metrics;
        {metric: (draws,)}, the values of each bootstrap draw.
    """
    groups = group_by_speaker(data.rows)
    entries, samples = _entries_with_intervals(data.metrics, groups, seed, num_resamples)
    entries |= {name: _entry(float(score["value"]), int(score["n"])) for name, score in data.distinct.items()}
    without_interval, not_available = dict.fromkeys(data.distinct, NO_INTERVAL_DISTINCT), {}
    if is_caption(data.task):
        pairs = [(row_references(row), row["prediction"]) for row in data.rows]
        values, not_available = _java(pairs, float(entries["cider_d"]["value"] or 0), caption_jars)
        entries |= {name: _entry(value, len(pairs)) for name, value in values.items()}
        without_interval |= dict.fromkeys(values, NO_INTERVAL_JAVA)
    draws = resamples_for(groups.num, num_resamples)
    intervals = {"level": LEVEL, "resampled": groups.unit, "groups": groups.num, "num_resamples": draws}
    details = {
        "signatures": data.signatures,
        "intervals": intervals | ({"without": without_interval} if without_interval else {}),
        "not_available": not_available,
    }
    return {name: entries[name] for name in evaluation_metrics(data.task) if name in entries}, details, samples


def _entries_with_intervals(
    metrics: Mapping[str, SummedMetric], groups: Groups, seed: Sequence[int], num_resamples: int
) -> tuple[dict[str, MetricEntry], dict[str, np.ndarray]]:
    """Entries of metrics computed from sums, and their values in each bootstrap draw. All metrics share the draws."""
    samples: dict[str, np.ndarray] = {}
    if num_resamples and groups.num > 1 and metrics:
        columns = [metric.columns for metric in metrics.values()]
        sums = resampled_sums(np.hstack(columns), groups, seed=seed, num_resamples=num_resamples)
        ends = np.cumsum([part.shape[1] for part in columns])
        for (name, metric), end, part in zip(metrics.items(), ends, columns, strict=True):
            samples[name] = metric.from_sums(sums[:, end - part.shape[1] : end])
    entries = {name: _entry(metric.value, metric.n, samples.get(name)) for name, metric in metrics.items()}
    if "loss" in entries:
        del entries["loss"]
        nll, tokens = metrics["loss"].columns.sum(axis=0)
        loss_samples = samples.get("loss")
        for name, value in likelihood_metrics(float(nll), int(tokens)).items():
            with np.errstate(over="ignore"):  # the interval ignores infinite draws
                draws = loss_samples if name == "loss" or loss_samples is None else np.exp(loss_samples)
            entries[name] = _entry(value, metrics["loss"].n, draws)
    return entries, samples


def _entry(value: float, n: int, samples: np.ndarray | None = None) -> MetricEntry:
    low, high = (None, None) if samples is None else interval(samples)
    return {"value": value, "low": low, "high": high, "n": n}


def _java(pairs: Sequence[Caption], cider_d: float, caption_jars: str) -> tuple[dict[str, float], dict[str, str]]:
    """METEOR, SPICE and SPIDEr, and for those not available the reason."""
    values, not_available = java_metrics(pairs, caption_jars)
    if "spice" in values:
        values["spider"] = (values["spice"] + cider_d) / 2
    elif "spice" in not_available:
        not_available["spider"] = f"it is the mean of CIDEr-D and SPICE: {not_available['spice']}"
    return values, not_available


def _overall(
    metrics: Mapping[str, Mapping[str, MetricEntry]], sizes: Mapping[str, int], samples: Mapping[str, np.ndarray]
) -> dict[str, MetricEntry]:
    """Aggregates over the tasks; for their intervals the rows of every task are drawn independently.

    Args:
        sizes: {task: number of rows}.
        samples: {task: (draws,)}, the task's headline metric in each draw.
    """
    tasks = [task for task in sizes if headline(task) in metrics[task]]
    if not tasks:
        return {}
    weights = np.array([sizes[task] for task in tasks])
    scores = [headline_score(task, float(metrics[task][headline(task)]["value"] or 0)) for task in tasks]
    aggregates = aggregate_tasks(np.array(scores)[:, None], weights)
    drawn: dict[str, np.ndarray] = {}
    if all(task in samples for task in tasks):
        draws = min(len(samples[task]) for task in tasks)
        drawn = aggregate_tasks(np.stack([headline_score(task, samples[task][:draws]) for task in tasks]), weights)
    return {name: _entry(float(value[0]), int(weights.sum()), drawn.get(name)) for name, value in aggregates.items()}


def _slices(data: CountedRows, seed: int, num_resamples: int) -> dict[str, Any]:
    """{dimension: {label: {"n", metric: entry}}}. For speakers only their number, the best and the worst."""
    names = [name for name in TASKS[data.task].metrics if name in data.metrics and name not in WHOLE_SET]
    slices: dict[str, Any] = {}
    for dimension, groups in slice_rows(data.rows).items():
        if dimension == "speaker":
            slices[dimension] = _speakers(data, groups)
            continue
        slices[dimension] = {
            label: {"n": len(rows), **_slice(data, rows, names, seed, min(num_resamples, SLICE_RESAMPLES))}
            for label, rows in groups.items()
        }
    return slices


def _slice(
    data: CountedRows, row_indices: Sequence[int], names: Sequence[str], seed: int, num_resamples: int
) -> dict[str, MetricEntry]:
    metrics = {name: data.metrics[name].select(np.array(row_indices)) for name in names}
    not_empty = {name: metric for name, metric in metrics.items() if metric.n}
    groups = group_by_speaker([data.rows[index] for index in row_indices])
    return _entries_with_intervals(not_empty, groups, (seed,), num_resamples)[0]


def _speakers(data: CountedRows, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    name = headline(data.task)
    if name not in data.metrics:
        return {"num_speakers": len(groups)}
    parts = [(speaker, len(rows), data.metrics[name].select(np.array(rows))) for speaker, rows in groups.items()]
    entries = [{"speaker": speaker, "n": n, name: part.value} for speaker, n, part in parts if part.n]
    entries.sort(key=lambda entry: float(entry[name]), reverse=higher_is_better(name))
    best, worst = entries[:MAX_LISTED_SPEAKERS], entries[::-1][:MAX_LISTED_SPEAKERS]
    return {"num_speakers": len(groups), "best": best, "worst": worst}


def _counts(data: CountedRows) -> dict[str, Any]:
    """The sums from which the rates are computed, so that several evaluations can be added up."""
    if not is_transcript(data.task):
        return {"rows": len(data.rows)}
    columns = data.columns
    is_empty = columns["solid_ref"] == 0
    counts: dict[str, Any] = {"rows": len(data.rows)}
    for name, prefix in (("characters", "solid"), ("words", "word")):
        kinds = {"substitutions": "sub", "deletions": "del", "insertions": "ins", "reference": "ref"}
        counts[name] = {kind: int(columns[f"{prefix}_{key}"][~is_empty].sum()) for kind, key in kinds.items()}
    characters, words = (int(columns[f"{prefix}_ins"][is_empty].sum()) for prefix in ("solid", "word"))
    counts["empty_references"] = {"n": int(is_empty.sum()), "inserted_characters": characters, "inserted_words": words}
    return counts | {"two_readings": int(columns["two_readings"].sum())}


def _terms(pairs: Sequence[RowTerms], num_terms: int) -> dict[str, Any]:
    """How often terms occur in references and are in the predictions, and which terms are missed most often."""
    in_references: Counter[str] = Counter()
    recalled: Counter[str] = Counter()
    for in_reference, in_both in pairs:
        in_references.update(in_reference)
        recalled.update(in_both)
    missed = in_references - recalled
    worst = sorted(missed, key=lambda term: (-missed[term], term))[:MAX_LISTED_TERMS]
    listed = [{"term": term, "n": in_references[term], "found": recalled[term]} for term in worst]
    return {
        "num_terms": num_terms or len(in_references),
        "n": in_references.total(),
        "found": recalled.total(),
        "missed": listed,
    }
