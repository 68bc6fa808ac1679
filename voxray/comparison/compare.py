"""Runs against each other on the same rows: values, differences, verdicts, slices, and what changed."""

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
from voxray.metrics.overall import figures, headline_score

MIN_SLICE_ROWS = 5
MAX_SLICES = 60  # values of one slice, of the speakers say; the largest are taken
MAX_NAMED = 4  # slices that a sentence names


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
    rows: tuple[tuple[ScoredRow, ...], ...]
    rules: ScoringRules
    units: Groups
    values: Mapping[str, list[tuple[float, tuple[float, float] | None]]]
    pairs: Mapping[tuple[int, int], Mapping[str, Difference]]
    adjusted: Mapping[tuple[int, int], Mapping[str, float]]
    changes: Sequence[Mapping[str, list[int]]]

    def differs(self, pair: tuple[int, int], metric: str) -> bool:
        """Whether a difference is shown, all pairs considered."""
        return self.pairs[pair][metric].is_shown and self.adjusted[pair][metric] < ALPHA

    def way(self, run: int, metric: str) -> int:
        """1 if a run is shown to be better than the first, -1 if worse, 0 if no difference is shown."""
        return way(metric, self.pairs[0, run][metric].difference, self.differs((0, run), metric))

    def best(self, metric: str) -> list[int]:
        """The best run by a metric, and those that are not shown to differ from it."""
        values = [value for value, _ in self.values[metric]]
        first = values.index((max if higher_is_better(metric) else min)(values))
        pairs = {other: (min(first, other), max(first, other)) for other in range(len(values)) if other != first}
        return sorted([first, *(other for other, pair in pairs.items() if not self.differs(pair, metric))])

    def marked(self, metric: str) -> list[int]:
        """``best``, but none where no run is shown to differ from it."""
        best = self.best(metric)
        return best if len(best) < len(self.rows) else []


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
    def way(self) -> int:
        """1 if the run is shown to be better there, -1 if worse, 0 if no difference is shown."""
        return way(headline(self.task), self.difference.difference, self.is_shown)

    @property
    def is_shown(self) -> bool:
        return self.difference.is_shown and self.adjusted < ALPHA


def way(metric: str, difference: float, is_shown: bool = True) -> int:
    """1 for a difference to the better, -1 for one to the worse, 0 for none, or one that is not shown."""
    return 0 if not (is_shown and difference) else 1 if (difference > 0) == higher_is_better(metric) else -1


def compare_tasks(matched: MatchedEvaluations, *, seed: int, num_resamples: int) -> list[TaskComparison]:
    """Compare all runs with each other, task by task."""
    found = []
    for task in TASKS:
        rows = tuple(tuple(row for row in run if row.task == task) for run in matched.rows)
        if rows[0]:
            found.append(_compare_task(task, rows, matched.rules, seed, num_resamples))
    return found


def _compare_task(
    task: str, rows: tuple[tuple[ScoredRow, ...], ...], rules: ScoringRules, seed: int, num_resamples: int
) -> TaskComparison:
    metrics, parts = metric_contributions(task, rows, rules)
    units = resampling_units([row.values for row in rows[0]])
    options = {"seed": seed, "num_resamples": num_resamples}
    pairs: dict[tuple[int, int], dict[str, Difference]] = {}
    values: dict[str, list[Any]] = {}
    for one, other in combinations(range(len(rows)), 2):
        differences = compare_rows(parts[one], parts[other], units, **options)
        pairs[one, other] = {name: entry for name, entry in zip(metrics, differences, strict=True) if entry}
    if len(rows) == 1:
        own = zip(metrics, metric_intervals(parts[0], units, **options), strict=True)
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
        names, parts = metric_contributions(task.task, task.rows, task.rules)
        if headline(task.task) not in names:
            continue
        column = slice(names.index(headline(task.task)), names.index(headline(task.task)) + 1)
        for slice_name, value, places in _slices(task.rows[0]):
            units = resampling_units([task.rows[0][at].values for at in places])
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


def _slices(rows: Sequence[ScoredRow]) -> Iterator[tuple[str, str, np.ndarray]]:
    """(slice, label, row numbers) of the slices that divide the rows; of a slice with very many labels the largest."""
    found = {**slice_rows([row.values for row in rows]), **length_slices([row.reference for row in rows])}
    for name, labels in found.items():
        if len(labels) > 1:
            kept = set(sorted(labels, key=lambda label: -len(labels[label]))[:MAX_SLICES])
            for label, numbers in labels.items():
                if label in kept and len(numbers) >= MIN_SLICE_ROWS:
                    yield name, label, np.array(numbers)


def overall(found: Sequence[TaskComparison]) -> dict[str, list[float]]:
    """{macro, weighted, balance: per run} of the tasks' scores on the matched rows, see ``metrics.overall.figures``."""
    tasks = [task for task in found if headline(task.task) in task.values]
    if not tasks:
        return {}
    scores = [[headline_score(task.task, value) for value, _ in task.values[headline(task.task)]] for task in tasks]
    weights = np.array([len(task.rows[0]) for task in tasks])
    return {name: [float(value) for value in values] for name, values in figures(np.array(scores), weights).items()}


def summary(runs: Sequence[Evaluation], found: Sequence[TaskComparison], run: int) -> str:
    """The tasks on which a run is better than the first, and those on which it is worse."""
    ways = {task.task: task.way(run, headline(task.task)) for task in found if headline(task.task) in task.values}
    words = {1: "better on", -1: "worse on", 0: "no difference can be shown on"}
    named = {word: [task for task, own in ways.items() if own == which] for which, word in words.items()}
    parts = [f"{word} {', '.join(tasks)}" for word, tasks in named.items() if tasks]
    return f"{runs[run].label} against {runs[0].label}: {'; '.join(parts) or 'no task has a figure to compare'}"


def slice_verdicts(runs: Sequence[Evaluation], slices: Sequence[SliceComparison], run: int) -> list[str]:
    """A sentence per task: in how many slices is a run better or worse than the first, and in which worse."""
    said = []
    for task in dict.fromkeys(entry.task for entry in slices):
        entries = [entry for entry in slices if (entry.task, entry.run) == (task, run)]
        worse = [entry for entry in entries if entry.way == -1]
        perhaps = [e for e in entries if not e.is_shown and way(headline(task), e.difference.difference) == -1]
        num_better = sum(entry.way == 1 for entry in entries)
        counts = f"better in {num_better} of {len(entries)}, worse in {len(worse) or 'none'}{_named(worse)}"
        chance = f"; worse values that may be chance in {len(perhaps)}{_named(perhaps)}" if perhaps else ""
        said.append(f"{task} by slice: {runs[run].label} is {counts}{chance}")
    return said


def _named(entries: Sequence[SliceComparison]) -> str:
    """The slices with the smallest p-values, by name."""
    if not entries:
        return ""
    shown = [
        f"{e.slice} {e.value} {e.difference.first:.3f} -> {e.difference.second:.3f}, {p_text(e.adjusted)}"
        for e in sorted(entries, key=lambda e: e.difference.p)[:MAX_NAMED]
    ]
    more = [f"{len(entries) - MAX_NAMED} more"] if len(entries) > MAX_NAMED else []
    return f" ({'; '.join([*shown, *more])})"


def verdicts(runs: Sequence[Evaluation], found: Sequence[TaskComparison], run: int) -> list[str]:
    """A sentence per task: is a run better than the first, by how much, and how sure is that."""
    names = {task.task: headline(task.task) for task in found}
    judged = [task for task in found if names[task.task] in task.values]
    return [_verdict(runs[0].label, runs[run].label, task, run, names[task.task]) for task in judged]


def _verdict(first: str, second: str, task: TaskComparison, run: int, metric: str) -> str:
    entry, p = task.pairs[0, run][metric], task.adjusted[0, run][metric]
    said = f"{metric} {entry.first:.3f} -> {entry.second:.3f}, difference {signed(entry.difference)}"
    if entry.interval:
        said += f" [{signed(entry.interval[0])}, {signed(entry.interval[1])}]"
    drawn = f"{entry.num_rows} rows"
    speakers = len({row.values.get("speaker") for row in task.rows[0]} - {None, ""})
    if task.units.unit == "speaker":
        drawn += f" of {speakers} speakers"
    elif speakers:
        drawn += f" of {speakers} speaker(s), too few to say anything of others"
    said += f", {p_text(p)}; {drawn}"
    shown = task.way(run, metric)
    if not shown:
        return f"{task.task}: no difference can be shown between {first} and {second} ({said})"
    return f"{task.task}: {second} is {'better' if shown > 0 else 'worse'} than {first} ({said})"


def signed(value: float) -> str:
    return f"{value:+.3f}"


def p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def interference(runs: Sequence[Evaluation], found: Sequence[TaskComparison]) -> list[str]:
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
    runs: Sequence[Evaluation],
    matched: MatchedEvaluations,
    found: Sequence[TaskComparison],
    slices: Sequence[SliceComparison],
    *,
    top: int,
) -> dict[str, Any]:
    """Everything that is said, as comparison.json holds it, with the ``top`` most changed rows of each kind."""
    labels, others = [run.label for run in runs], range(1, len(runs))
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
        "summaries": [summary(runs, found, run) for run in others],
        "verdicts": [said for run in others for said in verdicts(runs, found, run)],
        "slice_verdicts": [said for run in others for said in slice_verdicts(runs, slices, run)],
        "warnings": list(matched.warnings),
        "num_matched": len(matched.rows[0]),
        "matched_by": matched.key,
        "runs": [{"label": run.label, "folder": str(run.folder), "num_rows": len(run.rows)} for run in runs],
        "overall": {name: dict(zip(labels, values, strict=True)) for name, values in overall(found).items()},
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
