"""Comparison of runs on the same rows: values, differences, verdicts, slices, and rows that changed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from voxray.comparison.alignments import changed_rows, length_slices
from voxray.comparison.evaluations import Evaluation, MatchedEvaluations, ScoredRow, ScoringRules, metric_contributions
from voxray.comparison.significance import ALPHA, Difference, compare_rows, holm, metric_intervals, resampling_units
from voxray.core.tasks import TASKS
from voxray.evaluation.slices import slice_rows
from voxray.metrics.bootstrap import Groups
from voxray.metrics.names import headline, higher_is_better
from voxray.metrics.overall import aggregate_tasks, headline_score

MIN_SLICE_ROWS = 5
MAX_SLICES = 60  # values of one slice, such as speakers; the values with most rows are taken
MAX_NAMED = 4  # slices that a sentence names


@dataclass(frozen=True)
class TaskComparison:
    """Comparison of all runs on one task.

    Attributes:
        task: Name of the task.
        rows: The task's rows of every run.
        rules: How the rows are scored.
        units: Units of the resampling.
        values: {metric: (value, its interval) per run}.
        pairs: {(run, run): {metric: difference}} for every pair of runs, the lower index first.
        adjusted: {(run, run): {metric: p-value}}, raised by Holm's method over the pairs of a metric.
        changes: For every run but the first: see ``alignments.changed_rows``, against the first run.
    """

    task: str
    rows: tuple[tuple[ScoredRow, ...], ...]
    rules: ScoringRules
    units: Groups
    values: Mapping[str, list[tuple[float, tuple[float, float] | None]]]
    pairs: Mapping[tuple[int, int], Mapping[str, Difference]]
    adjusted: Mapping[tuple[int, int], Mapping[str, float]]
    changes: Sequence[Mapping[str, list[int]]]

    def differs(self, pair: tuple[int, int], metric: str) -> bool:
        """Whether a difference is significant, also after adjusting for the number of pairs."""
        return self.pairs[pair][metric].is_shown and self.adjusted[pair][metric] < ALPHA

    def direction(self, run: int, metric: str) -> int:
        """1 if a run is significantly better than the first, -1 if worse, 0 if no difference is shown."""
        return direction(metric, self.pairs[0, run][metric].difference, self.differs((0, run), metric))

    def best(self, metric: str) -> list[int]:
        """The best run by a metric, and the runs that do not differ significantly from it."""
        values = [value for value, _ in self.values[metric]]
        first = values.index((max if higher_is_better(metric) else min)(values))
        pairs = {other: (min(first, other), max(first, other)) for other in range(len(values)) if other != first}
        return sorted([first, *(other for other, pair in pairs.items() if not self.differs(pair, metric))])

    def highlighted(self, metric: str) -> list[int]:
        """The runs to highlight: ``best``, or none if no run is shown to differ from the best."""
        best = self.best(metric)
        return best if len(best) < len(self.rows) else []


@dataclass(frozen=True)
class SliceComparison:
    """A task's headline metric on one slice, one run against the first.

    Attributes:
        slice, value: Name of the slice, and its value.
        adjusted: p-value, raised by Holm's method over the slices.
    """

    task: str
    slice: str
    value: str
    run: int
    difference: Difference
    adjusted: float

    @property
    def direction(self) -> int:
        """1 if the run is significantly better on the slice, -1 if worse, 0 if no difference is shown."""
        return direction(headline(self.task), self.difference.difference, self.is_shown)

    @property
    def is_shown(self) -> bool:
        return self.difference.is_shown and self.adjusted < ALPHA


def direction(metric: str, difference: float, is_shown: bool = True) -> int:
    """1 for an improvement, -1 for a deterioration, 0 for no difference or one that is not shown."""
    return 0 if not (is_shown and difference) else 1 if (difference > 0) == higher_is_better(metric) else -1


def compare_tasks(matched: MatchedEvaluations, *, seed: int, num_resamples: int) -> list[TaskComparison]:
    """Compare all runs with each other, task by task."""
    comparisons = []
    for task in TASKS:
        rows = tuple(tuple(row for row in run if row.task == task) for run in matched.rows)
        if rows[0]:
            comparisons.append(_compare_task(task, rows, matched.rules, seed, num_resamples))
    return comparisons


def _compare_task(
    task: str, rows: tuple[tuple[ScoredRow, ...], ...], rules: ScoringRules, seed: int, num_resamples: int
) -> TaskComparison:
    names, metrics = metric_contributions(task, rows, rules)
    units = resampling_units([row.values for row in rows[0]])
    options = {"seed": seed, "num_resamples": num_resamples}
    pairs: dict[tuple[int, int], dict[str, Difference]] = {}
    values: dict[str, list[Any]] = {}
    for one, other in combinations(range(len(rows)), 2):
        differences = compare_rows(metrics[one], metrics[other], units, **options)
        pairs[one, other] = {name: entry for name, entry in zip(names, differences, strict=True) if entry}
    if len(rows) == 1:
        entries = zip(names, metric_intervals(metrics[0], units, **options), strict=True)
        values = {name: [(entry.first, entry.first_interval)] for name, entry in entries if entry}
    for (one, other), differences in pairs.items():
        for name, entry in differences.items():
            of_runs = values.setdefault(name, [None] * len(rows))
            of_runs[one], of_runs[other] = (entry.first, entry.first_interval), (entry.second, entry.second_interval)
    adjusted: dict[tuple[int, int], dict[str, float]] = {pair: {} for pair in pairs}
    for name in values:
        raised = holm([entry[name].p for entry in pairs.values()])
        for pair, p in zip(pairs, raised, strict=True):
            adjusted[pair][name] = p
    scores = [[{"error": row.error, "exact": row.exact} for row in run] for run in rows]
    changes = [changed_rows(scores[0], other) for other in scores[1:]]
    return TaskComparison(task, rows, rules, units, values, pairs, adjusted, changes)


def compare_slices(comparisons: Sequence[TaskComparison], *, seed: int, num_resamples: int) -> list[SliceComparison]:
    """Compare each run with the first on every slice of every task; of a single run, its own values by slice."""
    entries: list[tuple[str, str, str, int, Difference]] = []
    for task in comparisons:
        names, metrics = metric_contributions(task.task, task.rows, task.rules)
        if headline(task.task) not in names:
            continue
        by_run = [of_run[names.index(headline(task.task))] for of_run in metrics]
        for name, value, indices in _slices(task.rows[0]):
            units = resampling_units([task.rows[0][index].values for index in indices])
            of_slice = [[metric.select(indices)] for metric in by_run]
            for run in range(1, len(of_slice)) or (0,):
                difference = compare_rows(of_slice[0], of_slice[run], units, seed=seed, num_resamples=num_resamples)[0]
                if difference:
                    entries.append((task.task, name, value, run, difference))
    adjusted = [1.0] * len(entries)
    for run in {entry[3] for entry in entries}:
        indices = [index for index, entry in enumerate(entries) if entry[3] == run]
        for index, p in zip(indices, holm([entries[index][4].p for index in indices]), strict=True):
            adjusted[index] = p
    return [SliceComparison(*entry, adjusted=p) for entry, p in zip(entries, adjusted, strict=True)]


def _slices(rows: Sequence[ScoredRow]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(slice, label, row indices) of the slices that divide the rows; only the largest of very many labels."""
    slices = {**slice_rows([row.values for row in rows]), **length_slices([row.reference for row in rows])}
    for name, labels in slices.items():
        if len(labels) > 1:
            largest = set(sorted(labels, key=lambda label: -len(labels[label]))[:MAX_SLICES])
            for label, indices in labels.items():
                if label in largest and len(indices) >= MIN_SLICE_ROWS:
                    yield name, label, np.array(indices)


def overall(comparisons: Sequence[TaskComparison]) -> dict[str, list[float]]:
    """{macro, weighted, balance: value per run} on the matched rows, see ``metrics.overall.aggregate_tasks``."""
    tasks = [task for task in comparisons if headline(task.task) in task.values]
    if not tasks:
        return {}
    scores = [[headline_score(task.task, value) for value, _ in task.values[headline(task.task)]] for task in tasks]
    weights = np.array([len(task.rows[0]) for task in tasks])
    return {
        name: [float(value) for value in values] for name, values in aggregate_tasks(np.array(scores), weights).items()
    }


def summary(runs: Sequence[Evaluation], comparisons: Sequence[TaskComparison], run: int) -> str:
    """The tasks on which a run is better than the first, and those on which it is worse."""
    directions = {t.task: t.direction(run, headline(t.task)) for t in comparisons if headline(t.task) in t.values}
    words = {1: "better on", -1: "worse on", 0: "no difference can be shown on"}
    tasks_by_word = {
        word: [task for task, direction in directions.items() if direction == key] for key, word in words.items()
    }
    parts = [f"{word} {', '.join(tasks)}" for word, tasks in tasks_by_word.items() if tasks]
    return f"{runs[run].label} against {runs[0].label}: {'; '.join(parts) or 'no task has a figure to compare'}"


def slice_verdicts(runs: Sequence[Evaluation], slices: Sequence[SliceComparison], run: int) -> list[str]:
    """A sentence per task: in how many slices a run is better or worse than the first, and in which it is worse."""
    sentences = []
    for task in dict.fromkeys(entry.task for entry in slices):
        entries = [entry for entry in slices if (entry.task, entry.run) == (task, run)]
        worse = [entry for entry in entries if entry.direction == -1]
        unsure = [e for e in entries if not e.is_shown and direction(headline(task), e.difference.difference) == -1]
        num_better = sum(entry.direction == 1 for entry in entries)
        counts = f"better in {num_better} of {len(entries)}, worse in {len(worse) or 'none'}{_named(worse)}"
        chance = f"; worse values that may be chance in {len(unsure)}{_named(unsure)}" if unsure else ""
        sentences.append(f"{task} by slice: {runs[run].label} is {counts}{chance}")
    return sentences


def _named(entries: Sequence[SliceComparison]) -> str:
    """The slices with the smallest p-values, in words."""
    if not entries:
        return ""
    shown = [
        f"{e.slice} {e.value} {e.difference.first:.3f} -> {e.difference.second:.3f}, {p_text(e.adjusted)}"
        for e in sorted(entries, key=lambda e: e.difference.p)[:MAX_NAMED]
    ]
    more = [f"{len(entries) - MAX_NAMED} more"] if len(entries) > MAX_NAMED else []
    return f" ({'; '.join([*shown, *more])})"


def verdicts(runs: Sequence[Evaluation], comparisons: Sequence[TaskComparison], run: int) -> list[str]:
    """A sentence per task: whether a run is better than the first, by how much, and how certain that is."""
    labels = runs[0].label, runs[run].label
    return [_verdict(*labels, task, run, name) for task in comparisons if (name := headline(task.task)) in task.values]


def _verdict(first: str, second: str, task: TaskComparison, run: int, metric: str) -> str:
    entry, p = task.pairs[0, run][metric], task.adjusted[0, run][metric]
    details = f"{metric} {entry.first:.3f} -> {entry.second:.3f}, difference {signed(entry.difference)}"
    if entry.interval:
        details += f" [{signed(entry.interval[0])}, {signed(entry.interval[1])}]"
    details += f", {p_text(p)}; {entry.num_rows} rows"
    speakers = len({row.values.get("speaker") for row in task.rows[0]} - {None, ""})
    if task.units.unit == "speaker":
        details += f" of {speakers} speakers"
    elif speakers:
        details += f" of {speakers} speaker(s), too few to say anything of others"
    direction = task.direction(run, metric)
    if not direction:
        return f"{task.task}: no difference can be shown between {first} and {second} ({details})"
    return f"{task.task}: {second} is {'better' if direction > 0 else 'worse'} than {first} ({details})"


def signed(value: float) -> str:
    return f"{value:+.3f}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def interference(runs: Sequence[Evaluation], comparisons: Sequence[TaskComparison]) -> list[str]:
    """A sentence per run and task on the rows that the run broke and mended."""
    sentences = []
    for run in range(1, len(runs)):
        for task in comparisons:
            change = task.changes[run - 1]
            counts = {name: len(rows) for name, rows in change.items()}
            same = len(task.rows[0]) - sum(counts.values())
            sentences.append(
                f"{task.task}: {runs[run].label} broke {counts['broken']} that {runs[0].label} had right, mended "
                f"{counts['mended']}; wrong in both: {counts['better']} better, {counts['worse']} worse; {same} as "
                "before"
            )
    return sentences


def as_json(
    runs: Sequence[Evaluation],
    matched: MatchedEvaluations,
    comparisons: Sequence[TaskComparison],
    slices: Sequence[SliceComparison],
    *,
    top: int,
) -> dict[str, Any]:
    """The content of comparison.json, with the ``top`` most changed rows of each kind."""
    labels, others = [run.label for run in runs], range(1, len(runs))
    tasks: dict[str, Any] = {}
    for task in comparisons:
        metrics = {}
        for name, values in task.values.items():
            of_runs = [
                {"run": label, "value": value, **_bounds(bounds)}
                for label, (value, bounds) in zip(labels, values, strict=True)
            ]
            best = [labels[index] for index in task.best(name)]
            metrics[name] = {"runs": of_runs, "best_or_not_shown_to_differ": best}
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
                "run": labels[run],
                **{f"num_{name}": len(rows) for name, rows in change.items()},
                **{name: [_changed(task, run, row) for row in rows[:top]] for name, rows in change.items()},
            }
            for run, change in enumerate(task.changes, 1)
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
        "summaries": [summary(runs, comparisons, run) for run in others],
        "verdicts": [sentence for run in others for sentence in verdicts(runs, comparisons, run)],
        "slice_verdicts": [sentence for run in others for sentence in slice_verdicts(runs, slices, run)],
        "warnings": list(matched.warnings),
        "num_matched": len(matched.rows[0]),
        "matched_by": matched.key,
        "normalizer": runs[0].normalizer,
        "runs": [{"label": run.label, "folder": str(run.folder), "num_rows": len(run.rows)} for run in runs],
        "overall": {name: dict(zip(labels, values, strict=True)) for name, values in overall(comparisons).items()},
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
