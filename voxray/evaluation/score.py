"""From prediction rows to the content of metrics.json: figures with intervals, per task, slice, and over all tasks.

Everything is counted anew from the raw texts, so predictions of another version, or of another system, are scored by
the same rules.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from voxray.metrics.names import evaluation_metrics, headline, higher_is_better, is_caption, is_transcript
from voxray.metrics.ngrams import Summed
from voxray.metrics.overall import figures, headline_score, likelihood_metrics
from voxray.metrics.rows import PredictionRow, check_row, count_row, row_normalizer, row_readings, row_references
from voxray.metrics.terms import Terms
from voxray.metrics.texts import scored_texts
from voxray.text.normalize import ENGLISH, Normalizer, english_with

SLICE_RESAMPLES = 1_000
SPEAKERS_NAMED = 5
TERMS_NAMED = 20
OF_DISTINCT = "an answer drawn twice brings no new n-gram, so that drawn sets would score lower: no interval"
OF_JAVA = "a figure of the whole set, from a program in Java: no interval"

MetricEntry = dict[str, float | int | None]


@dataclass(frozen=True)
class CountedRows:
    """The rows of one task with all that adds up over them.

    Attributes:
        ratios: {metric: its two columns}, one number per row.
        columns: {count: array}.
        terms: (in the reference, found), per row; empty without terms.
    """

    task: str
    rows: Sequence[PredictionRow]
    columns: Mapping[str, np.ndarray]
    terms: Sequence[tuple[Counter[str], Counter[str]]]
    ratios: Mapping[str, Ratio]


def score(
    rows: Iterable[PredictionRow],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    terms: Sequence[str] = (),
    english_spelling: str = "",
    caption_jars: str = "",
) -> dict[str, Any]:
    """Score predictions.

    Args:
        rows: Prediction rows, see ``metrics.rows``.
        seed: Of the bootstrap.
        num_resamples: Draws of the bootstrap for whole tasks; slices take 1,000 at most. 0 gives no intervals.
        terms: Terms whose recall in transcripts is measured.
        english_spelling: File with Whisper's table of spellings, for English transcripts.
        caption_jars: Folder with what METEOR and SPICE need besides pycocoevalcap, see ``metrics.java``.
    Returns:
        {task: {metric: {"value", "low", "high", "n"}}} and beside the tasks: ``overall`` (macro, weighted, balance, of
        the same form), ``slices``, ``normalizer`` ({name: rows}), ``signatures``, ``intervals``, ``counts``,
        ``not_available`` and ``terms``. ``low`` and ``high`` are null where there is no interval.
    Raises:
        RunError: There are no rows, or one cannot be scored.
    """
    rows = list(rows)
    for at, row in enumerate(rows, start=1):
        check_row(row, f"row {at} ({row.get('id') or row.get('source') or 'no id'})")
    if not rows:
        raise RunError("no prediction to score")
    rows.sort(key=_order)  # what is drawn is drawn by place: the same rows in another order have the same intervals
    english = english_with(english_spelling) if english_spelling else ENGLISH
    names = [task for task in TASKS if any(row["task"] == task for row in rows)]
    of_tasks = {
        task: counted(task, [row for row in rows if row["task"] == task], terms=terms, english=english)
        for task in names
    }
    found: dict[str, Any] = {}
    about: dict[str, Any] = {"signatures": {}, "intervals": {}, "not_available": {}}
    drawn: dict[str, np.ndarray] = {}
    for task, data in of_tasks.items():
        found[task], told, samples = _figures(data, (seed, list(TASKS).index(task)), num_resamples, caption_jars)
        drawn |= {task: samples[headline(task)]} if headline(task) in samples else {}
        for name, value in told.items():
            about[name] |= {task: value} if value else {}
    found["overall"] = _overall(found, {task: len(data.rows) for task, data in of_tasks.items()}, drawn)
    found["slices"] = {task: _slices(data, seed, num_resamples) for task, data in of_tasks.items()}
    found["normalizer"] = dict(Counter(row_normalizer(row, english).name for row in rows).most_common())
    found["counts"] = {task: _counts(data) for task, data in of_tasks.items()}
    if terms:
        found["terms"] = _terms([pair for data in of_tasks.values() for pair in data.terms], len(set(terms)))
    return {**found, **about}


def _order(row: PredictionRow) -> tuple[str, ...]:
    return tuple(str(row.get(name)) for name in ("id", "dataset", "references", "reference", "prediction"))


def by_task(metrics: Mapping[str, Any]) -> dict[str, dict[str, MetricEntry]]:
    """Of the content of a metrics.json only {task: {metric: {"value", ...}}}."""
    return {task: metrics[task] for task in TASKS if task in metrics}


def counted(
    task: str,
    rows: Sequence[PredictionRow],
    *,
    terms: Sequence[str] = (),
    english: Normalizer = ENGLISH,
    counts: Sequence[Mapping[str, int]] | None = None,
) -> CountedRows:
    """Count the rows of one task; what a metric's ratio is made of stands in ``ratios``, row by row.

    Args:
        counts: Of each row, if they have been counted by this very version already.
    """
    columns = as_columns([as_row(count_row(row, english)) for row in rows] if counts is None else counts)
    found_terms: list[tuple[Counter[str], Counter[str]]] = []
    if terms and is_transcript(task):
        lists = {name: Terms(terms, name) for name in {row_normalizer(row, english) for row in rows}}
        for row in rows:
            own = lists[row_normalizer(row, english)]
            wanted = own.count(row_readings(row)[0] if len(row_references(row)) == 1 else row_references(row)[0])
            found_terms.append((wanted, wanted & own.count(row["prediction"])))
        columns["terms_ref"] = np.array([wanted.total() for wanted, _ in found_terms])
        columns["terms_found"] = np.array([both.total() for _, both in found_terms])
    ratios = {name: metric_ratio(task, name, columns) for name in evaluation_metrics(task)}
    if not columns["two_readings"].any():
        ratios |= {"cer_phonetic": None, "cer_best": None}
    ratios["loss"] = _loss(rows)
    kept = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    return CountedRows(task, rows, columns, found_terms, kept)


def _loss(rows: Sequence[PredictionRow]) -> Ratio | None:
    """-ln p of the reference answers, by tokens, of the rows that know theirs."""
    known = [(row.get("nll"), row.get("num_tokens") or 0) for row in rows]
    summed = [
        (float(nll), float(tokens)) if nll is not None and math.isfinite(nll) and tokens > 0 else (0.0, 0.0)
        for nll, tokens in known
    ]
    top, bottom = np.array(summed).T
    n = int((bottom > 0).sum())
    return Ratio(top, bottom, n) if n else None


def _figures(
    data: CountedRows, seed: Sequence[int], num_resamples: int, caption_jars: str
) -> tuple[dict[str, MetricEntry], dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Entries of one task in their order, what is told of them beside, and the values in each draw."""
    groups = group_by_speaker(data.rows)
    pairs = [(row_references(row), row["prediction"]) for row in data.rows]
    summed, distinct, signatures = scored_texts(data.task, pairs)
    found, samples = _rates({**data.ratios, **summed}, groups, seed, num_resamples)
    found |= {name: _entry(float(entry["value"]), int(entry["n"])) for name, entry in distinct.items()}
    without, missing = dict.fromkeys(distinct, OF_DISTINCT), {}
    if is_caption(data.task):
        values, missing = _java(pairs, float(found["cider_d"]["value"] or 0), caption_jars)
        found |= {name: _entry(value, len(pairs)) for name, value in values.items()}
        without |= dict.fromkeys(values, OF_JAVA)
    draws = resamples_for(groups.num, num_resamples)
    intervals = {"level": LEVEL, "resampled": groups.unit, "groups": groups.num, "num_resamples": draws}
    told = {
        "signatures": signatures,
        "intervals": intervals | ({"without": without} if without else {}),
        "not_available": missing,
    }
    return {name: found[name] for name in evaluation_metrics(data.task) if name in found}, told, samples


def _rates(
    figured: Mapping[str, Ratio | Summed], groups: Groups, seed: Sequence[int], num_resamples: int
) -> tuple[dict[str, MetricEntry], dict[str, np.ndarray]]:
    """Entries of metrics that derive from sums, and their values in each draw, which is the same for all."""
    samples: dict[str, np.ndarray] = {}
    if num_resamples and groups.num > 1 and figured:
        columns = [each.columns for each in figured.values()]
        sums = resampled_sums(np.hstack(columns), groups, seed=seed, num_resamples=num_resamples)
        ends = np.cumsum([part.shape[1] for part in columns])
        for (name, each), end, part in zip(figured.items(), ends, columns, strict=True):
            samples[name] = each.of_sums(sums[:, end - part.shape[1] : end])
    found = {name: _entry(each.value, each.n, samples.get(name)) for name, each in figured.items()}
    if "loss" in found:
        ratio = figured["loss"]
        nll, tokens = ratio.columns.sum(axis=0)
        likely = likelihood_metrics(float(nll), int(tokens))
        del found["loss"]
        drawn_loss = samples.get("loss")
        for name, value in likely.items():
            with np.errstate(over="ignore"):  # what is no float any more is left out of the interval
                of_draws = drawn_loss if name == "loss" or drawn_loss is None else np.exp(drawn_loss)
            found[name] = _entry(value, ratio.n, of_draws)
    return found, samples


def _entry(value: float, n: int, samples: np.ndarray | None = None) -> MetricEntry:
    low, high = (None, None) if samples is None else interval(samples)
    return {"value": value, "low": low, "high": high, "n": n}


def _java(pairs: Sequence[Caption], cider_d: float, caption_jars: str) -> tuple[dict[str, float], dict[str, str]]:
    """METEOR, SPICE and SPIDEr, and of those that cannot be had why not."""
    values, missing = java_metrics(pairs, caption_jars)
    if "spice" in values:
        values["spider"] = (values["spice"] + cider_d) / 2
    elif "spice" in missing:
        missing["spider"] = f"it is the mean of CIDEr-D and SPICE: {missing['spice']}"
    return values, missing


def _overall(
    found: Mapping[str, Mapping[str, MetricEntry]], sizes: Mapping[str, int], drawn: Mapping[str, np.ndarray]
) -> dict[str, MetricEntry]:
    """Figures over the tasks; their intervals draw every task's rows by themselves."""
    tasks = [task for task in sizes if headline(task) in found[task]]
    if not tasks:
        return {}
    weights = np.array([sizes[task] for task in tasks])
    values = [headline_score(task, float(found[task][headline(task)]["value"] or 0)) for task in tasks]
    single = figures(np.array(values)[:, None], weights)
    samples: dict[str, np.ndarray] = {}
    if all(task in drawn for task in tasks):
        draws = min(len(drawn[task]) for task in tasks)
        samples = figures(np.stack([headline_score(task, drawn[task][:draws]) for task in tasks]), weights)
    return {name: _entry(float(value[0]), int(weights.sum()), samples.get(name)) for name, value in single.items()}


def _slices(data: CountedRows, seed: int, num_resamples: int) -> dict[str, Any]:
    """{dimension: {label: {"n", metric: entry}}}; of speakers only how many there are, the best and the worst."""
    found: dict[str, Any] = {}
    shown = [name for name in TASKS[data.task].metrics if name in data.ratios]
    for dimension, parts in slice_rows(data.rows).items():
        if dimension == "speaker":
            found[dimension] = _speakers(data, parts)
            continue
        found[dimension] = {
            label: {"n": len(at), **_part(data, np.array(at), shown, seed, min(num_resamples, SLICE_RESAMPLES))}
            for label, at in parts.items()
        }
    return found


def _part(
    data: CountedRows, at: np.ndarray, names: Sequence[str], seed: int, num_resamples: int
) -> dict[str, MetricEntry]:
    ratios = {name: _taken(data.ratios[name], at) for name in names}
    kept = {name: ratio for name, ratio in ratios.items() if ratio.n}
    rows = [data.rows[place] for place in at]
    return _rates(kept, group_by_speaker(rows), (seed,), num_resamples)[0]


def _taken(ratio: Ratio, at: np.ndarray) -> Ratio:
    return Ratio(ratio.top[at], ratio.bottom[at], int((ratio.bottom[at] > 0).sum()))


def _speakers(data: CountedRows, parts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    name = headline(data.task)
    if name not in data.ratios:
        return {"num_speakers": len(parts)}
    of_speakers = [(label, len(at), _taken(data.ratios[name], np.array(at))) for label, at in parts.items()]
    listed = [{"speaker": label, "n": n, name: ratio.value} for label, n, ratio in of_speakers if ratio.n]
    listed.sort(key=lambda entry: float(entry[name]), reverse=higher_is_better(name))
    best, worst = listed[:SPEAKERS_NAMED], listed[::-1][:SPEAKERS_NAMED]
    return {"num_speakers": len(parts), "best": best, "worst": worst}


def _counts(data: CountedRows) -> dict[str, Any]:
    """Sums that stand behind the rates, for whoever adds up several evaluations."""
    if not is_transcript(data.task):
        return {"rows": len(data.rows)}
    scored, sums = data.columns["solid_ref"] > 0, data.columns
    found: dict[str, Any] = {"rows": len(data.rows)}
    for name, kind in (("characters", "solid"), ("words", "word")):
        values = {word: int(sums[f"{kind}_{part}"][scored].sum()) for word, part in _KINDS.items()}
        found[name] = values | {"reference": int(sums[f"{kind}_ref"][scored].sum())}
    silent = ~scored
    characters, words = (int(sums[f"{kind}_ins"][silent].sum()) for kind in ("solid", "word"))
    found["empty_references"] = {"n": int(silent.sum()), "inserted_characters": characters, "inserted_words": words}
    return found | {"two_readings": int(sums["two_readings"].sum())}


def _terms(pairs: Sequence[tuple[Counter[str], Counter[str]]], num_terms: int) -> dict[str, Any]:
    """How many terms there are, and which are missed the most."""
    wanted: Counter[str] = Counter()
    given: Counter[str] = Counter()
    for in_reference, both in pairs:
        wanted.update(in_reference)
        given.update(both)
    missed = sorted(wanted, key=lambda term: (given[term] - wanted[term], term))[:TERMS_NAMED]
    named = [{"term": term, "n": wanted[term], "found": given[term]} for term in missed if given[term] < wanted[term]]
    return {"num_terms": num_terms, "n": wanted.total(), "found": given.total(), "missed": named}


def read_terms(path: str | Path) -> tuple[str, ...]:
    """Terms of a text file, one a line; blank lines and those that begin with # are passed over.

    Raises:
        RunError: The file cannot be read, or has no term.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot read the list of terms: {error}") from None
    terms = tuple(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")))
    if not terms:
        raise RunError(f"{path}: no term in this list; write one a line")
    return terms


_KINDS = {"substitutions": "sub", "deletions": "del", "insertions": "ins"}
