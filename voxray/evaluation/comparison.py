"""Runs against each other on the same rows: values, differences, verdicts, slices, and what changed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from voxray.evaluation.errors import changed_rows, length_slices
from voxray.evaluation.metrics.names import headline, higher_is_better
from voxray.evaluation.paired import ALPHA, Difference, compare_rows, holm, interval_of, units_of
from voxray.evaluation.runs import Matched, Row, Rules, Run, parts_of
from voxray.evaluation.slices import slices_of
from voxray.evaluation.stats import Groups
from voxray.tasks import TASKS

MIN_SLICE_ROWS = 5
MAX_SLICES = 60  # values of one slice, of the speakers say; the largest are taken


@dataclass(frozen=True)
class TaskComparison:
    """What is said of one task.

    Attributes:
        task: Its name.
        rows: Per run, its rows.
        rules: What they are counted by.
        units: What was drawn.
        values: {metric: per run (value, its interval)}.
        pairs: {(run, run): {metric: difference}}, every pair of runs, the earlier first.
        adjusted: The same with p-values raised by Holm over the pairs of a metric.
        changes: Per run but the first: row numbers broken, mended, worse, better against the first.
    """

    task: str
    rows: tuple[tuple[Row, ...], ...]
    rules: Rules
    units: Groups
    values: Mapping[str, list[tuple[float, tuple[float, float] | None]]]
    pairs: Mapping[tuple[int, int], Mapping[str, Difference]]
    adjusted: Mapping[tuple[int, int], Mapping[str, float]]
    changes: Sequence[Mapping[str, list[int]]]

    def differs(self, pair: tuple[int, int], metric: str) -> bool:
        """Whether a difference is shown, all pairs considered."""
        return self.pairs[pair][metric].is_shown and self.adjusted[pair][metric] < ALPHA

    def best(self, metric: str) -> list[int]:
        """The best run by a metric, and those that are not shown to differ from it."""
        values = [value for value, _ in self.values[metric]]
        first = values.index((max if higher_is_better(metric) else min)(values))
        pairs = {other: (min(first, other), max(first, other)) for other in range(len(values)) if other != first}
        return sorted([first, *(other for other, pair in pairs.items() if not self.differs(pair, metric))])


@dataclass(frozen=True)
class SliceComparison:
    """A task's headline metric on some of its rows, one run against the first; p is raised by Holm over the slices."""

    task: str
    slice: str
    value: str
    run: int
    difference: Difference
    adjusted: float

    @property
    def is_shown(self) -> bool:
        return self.difference.is_shown and self.adjusted < ALPHA


def compare_tasks(matched: Matched, *, seed: int, num_resamples: int) -> list[TaskComparison]:
    """Compare all runs with each other, task by task."""
    found = []
    for task in TASKS:
        rows = tuple(tuple(row for row in run if row.task == task) for run in matched.rows)
        if rows[0]:
            found.append(_compare_task(task, rows, matched.rules, seed, num_resamples))
    return found


def _compare_task(
    task: str, rows: tuple[tuple[Row, ...], ...], rules: Rules, seed: int, num_resamples: int
) -> TaskComparison:
    metrics, parts = parts_of(task, rows, rules)
    units = units_of([row.values for row in rows[0]])
    options = {"seed": seed, "num_resamples": num_resamples}
    pairs: dict[tuple[int, int], dict[str, Difference]] = {}
    values: dict[str, list[Any]] = {}
    for one, other in combinations(range(len(rows)), 2):
        differences = compare_rows(parts[one], parts[other], units, **options)
        pairs[one, other] = {name: entry for name, entry in zip(metrics, differences, strict=True) if entry}
    if len(rows) == 1:
        own = zip(metrics, interval_of(parts[0], units, **options), strict=True)
        values = {name: [(entry.first, entry.first_interval)] for name, entry in own if entry}
    for (one, other), differences in pairs.items():
        for name, entry in differences.items():
            values.setdefault(name, [None] * len(rows))
            values[name][one], values[name][other] = (
                (entry.first, entry.first_interval),
                (entry.second, entry.second_interval),
            )
    adjusted: dict[tuple[int, int], dict[str, float]] = {pair: {} for pair in pairs}
    for name in values:
        raised = holm([entry[name].p for entry in pairs.values()])
        for pair, p in zip(pairs, raised, strict=True):
            adjusted[pair][name] = p
    marks = [[{"error": row.error, "exact": row.exact} for row in run] for run in rows]
    changes = [changed_rows(marks[0], other) for other in marks[1:]]
    return TaskComparison(task, rows, rules, units, values, pairs, adjusted, changes)


def compare_slices(found: Sequence[TaskComparison], *, seed: int, num_resamples: int) -> list[SliceComparison]:
    """Each run against the first on every slice of every task; with a single run, its own values by slice."""
    entries: list[tuple[str, str, str, int, Difference]] = []
    for task in found:
        names, parts = parts_of(task.task, task.rows, task.rules)
        if headline(task.task) not in names:
            continue
        column = slice(names.index(headline(task.task)), names.index(headline(task.task)) + 1)
        for slice_name, value, places in _slices(task.rows[0]):
            units = units_of([task.rows[0][at].values for at in places])
            cut = [(top[places, column], bottom[places, column]) for top, bottom in parts]
            for run in range(1, len(cut)) or (0,):
                difference = compare_rows(cut[0], cut[run], units, seed=seed, num_resamples=num_resamples)[0]
                if difference:
                    entries.append((task.task, slice_name, value, run, difference))
    raised = [1.0] * len(entries)
    for run in {entry[3] for entry in entries}:
        places = [at for at, entry in enumerate(entries) if entry[3] == run]
        for at, p in zip(places, holm([entries[at][4].p for at in places]), strict=True):
            raised[at] = p
    return [SliceComparison(*entry, adjusted=p) for entry, p in zip(entries, raised, strict=True)]


def _slices(rows: Sequence[Row]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(slice, label, row numbers) of the slices that divide the rows; of a slice with very many labels the largest."""
    found = {**slices_of([row.values for row in rows]), **length_slices([row.reference for row in rows])}
    for name, labels in found.items():
        if len(labels) > 1:
            kept = set(sorted(labels, key=lambda label: -len(labels[label]))[:MAX_SLICES])
            for label, numbers in labels.items():
                if label in kept and len(numbers) >= MIN_SLICE_ROWS:
                    yield name, label, np.array(numbers)


def verdicts(runs: Sequence[Run], found: Sequence[TaskComparison]) -> list[str]:
    """A sentence per run and task: is it better than the first run, by how much, and how sure is that."""
    said = []
    for run in range(1, len(runs)):
        for task in found:
            name = headline(task.task)
            if name in task.values:
                said.append(_verdict(runs[0].label, runs[run].label, task, run, name))
    return said


def _verdict(first: str, second: str, task: TaskComparison, run: int, metric: str) -> str:
    entry, p = task.pairs[0, run][metric], task.adjusted[0, run][metric]
    figures = f"{metric} {entry.first:.3f} -> {entry.second:.3f}, difference {signed(entry.difference)}"
    if entry.interval:
        figures += f" [{signed(entry.interval[0])}, {signed(entry.interval[1])}]"
    drawn = f"{entry.num_rows} rows"
    speakers = len({row.values.get("speaker") for row in task.rows[0]} - {None, ""})
    if task.units.unit == "speaker":
        drawn += f" of {speakers} speakers"
    elif speakers:
        drawn += f" of {speakers} speaker(s), too few to say anything of others"
    figures += f", {p_text(p)}; {drawn}"
    if not task.differs((0, run), metric):
        return f"{task.task}: no difference can be shown between {first} and {second} ({figures})"
    better = (entry.difference > 0) == higher_is_better(metric)
    return f"{task.task}: {second} is {'better' if better else 'worse'} than {first} ({figures})"


def signed(value: float) -> str:
    return f"{value:+.3f}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def interference(runs: Sequence[Run], found: Sequence[TaskComparison]) -> list[str]:
    """A sentence per run and task on the rows that it broke and mended."""
    said = []
    for run in range(1, len(runs)):
        for task in found:
            change = task.changes[run - 1]
            counts = {name: len(rows) for name, rows in change.items()}
            same = len(task.rows[0]) - sum(counts.values())
            said.append(
                f"{task.task}: {runs[run].label} broke {counts['broken']} that {runs[0].label} had right, mended "
                f"{counts['mended']}; wrong in both: {counts['better']} better, {counts['worse']} worse; {same} as "
                "before"
            )
    return said


def as_json(
    runs: Sequence[Run],
    matched: Matched,
    found: Sequence[TaskComparison],
    slices: Sequence[SliceComparison],
    *,
    top: int,
) -> dict[str, Any]:
    """Everything that is said, as comparison.json holds it, with the ``top`` most changed rows of each kind."""
    labels = [run.label for run in runs]
    tasks: dict[str, Any] = {}
    for task in found:
        metrics = {}
        for name, values in task.values.items():
            shown = [
                {"run": label, "value": value, **_bounds(bounds)}
                for label, (value, bounds) in zip(labels, values, strict=True)
            ]
            best = [labels[at] for at in task.best(name)]
            metrics[name] = {"runs": shown, "best_or_not_shown_to_differ": best}
        differences = [
            {
                **{"first": labels[one], "second": labels[other], "metric": name, **_difference(entry)},
                **{"p_adjusted": task.adjusted[one, other][name], "is_shown": task.differs((one, other), name)},
            }
            for (one, other), entries in task.pairs.items()
            for name, entry in entries.items()
        ]
        changes = [
            {
                "run": labels[at + 1],
                **{f"num_{name}": len(rows) for name, rows in change.items()},
                **{name: [_changed(task, at + 1, row) for row in rows[:top]] for name, rows in change.items()},
            }
            for at, change in enumerate(task.changes)
        ]
        resampled = {"resampled": task.units.unit, "num_units": task.units.num}
        tasks[task.task] = {"num_rows": len(task.rows[0]), **resampled, "metrics": metrics}
        tasks[task.task] |= {"differences": differences, "changes": changes}
    by_slice = [
        {
            **{"task": entry.task, "slice": entry.slice, "value": entry.value, "run": labels[entry.run]},
            **{"metric": headline(entry.task), **_difference(entry.difference)},
            **{"p_adjusted": entry.adjusted, "is_shown": entry.is_shown},
        }
        for entry in slices
    ]
    return {
        "verdicts": verdicts(runs, found),
        "warnings": list(matched.warnings),
        "num_matched": len(matched.rows[0]),
        "matched_by": matched.key,
        "runs": [{"label": run.label, "folder": str(run.folder), "num_rows": len(run.rows)} for run in runs],
        "tasks": tasks,
        "slices": by_slice,
    }


def _bounds(interval: tuple[float, float] | None) -> dict[str, float | None]:
    return dict(zip(("low", "high"), interval or (None, None), strict=True))


def _difference(entry: Difference) -> dict[str, Any]:
    return {
        **{"first_value": entry.first, "second_value": entry.second, "difference": entry.difference},
        **{**_bounds(entry.interval), "p": entry.p, "num_rows": entry.num_rows},
    }


def _changed(task: TaskComparison, run: int, row: int) -> dict[str, Any]:
    before, after = task.rows[0][row], task.rows[run][row]
    return {
        **{name: before.values.get(name) for name in ("id", "source", "reference")},
        "first_prediction": before.values["prediction"],
        "second_prediction": after.values["prediction"],
        "first_error": before.error,
        "second_error": after.error,
    }
