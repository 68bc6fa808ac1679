"""HTML reports of one evaluation and of a comparison: one page each that opens from disk and fetches nothing."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxray.comparison.alignments import ErrorTally, tally
from voxray.comparison.compare import (
    SliceComparison,
    TaskComparison,
    compare_slices,
    compare_tasks,
    interference,
    slice_verdicts,
    summary,
    verdicts,
)
from voxray.comparison.evaluations import (
    Evaluation,
    MatchedEvaluations,
    ScoredRow,
    read_evaluation,
    training_differences,
)
from voxray.comparison.report_rows import page_rows
from voxray.comparison.report_tables import (
    about_table,
    difference_charts,
    difference_table,
    metric_label,
    metric_tables,
    overview_table,
    slice_table,
)
from voxray.core.storage import write_atomically, write_json
from voxray.core.tasks import TASKS
from voxray.html.charts import Chart, Value, bars
from voxray.html.page import Cell, Table, render_page
from voxray.metrics.bootstrap import NUM_RESAMPLES
from voxray.metrics.names import headline, is_transcript

ASSETS = ("report.css", "report.js")
ERROR_EDGES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
CHART_SLICES = ("duration", "length")
TOLERANCE = 1e-9  # values of a metric closer than this are the same


def write_report(output_dir: Path, **options: Any) -> dict[str, Any]:
    """Write report.html and errors.json of a finished evaluation into its folder, see ``report_evaluation``.

    Raises:
        RunError: There is no finished evaluation.
    """
    return report_evaluation(read_evaluation(output_dir), output_dir, **options)


def report_evaluation(
    run: Evaluation,
    folder: Path,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
    top: int = 20,
    max_rows: int = 10_000,
    embed_audio_mib: int = 16,
) -> dict[str, Any]:
    """Write report.html and errors.json of an evaluation.

    Args:
        folder: Folder to write to.
        seed, num_resamples: Bootstrap of the intervals of slices, and of whole tasks if metrics.json has none.
        top: Number of errors listed of each kind.
        max_rows: Maximum number of rows in the page; those with the most errors are taken.
        embed_audio_mib: Embed the clips if their total size is at most this.
    Returns:
        What errors.json holds: {task: {"units": {word or character: see ``tally_json``}, "worst", "slices"}}.
    """
    bootstrap = {"seed": seed, "num_resamples": num_resamples}
    comparisons = compare_tasks(MatchedEvaluations((run.rows,), "source", (), run.rules), **bootstrap)
    slices = compare_slices(comparisons, **bootstrap)
    errors = {task.task: _errors_json(task, slices, top) for task in comparisons}
    metrics, outdated = _metrics_table(run, comparisons)
    page = render_page(
        "evaluation.html",
        f"voxray evaluation: {run.label}",
        ASSETS,
        run=run,
        about=about_table([run]),
        figures=_figures(run, comparisons),
        metrics=metrics,
        outdated=outdated,
        charts=_charts([run], comparisons, slices),
        slices=slice_table([run], slices),
        errors=errors,
        top=top,
        explorer=_explorer([run], comparisons, max_rows, embed_audio_mib),
    )
    write_json(folder / "errors.json", errors)
    write_atomically(folder / "report.html", page)
    return errors


def write_comparison(
    path: Path,
    runs: Sequence[Evaluation],
    matched: MatchedEvaluations,
    comparisons: Sequence[TaskComparison],
    slices: Sequence[SliceComparison],
    *,
    max_rows: int,
    embed_audio_mib: int,
) -> None:
    """Write comparison.html. Args as in ``compare.as_json`` and ``report_evaluation``."""
    labels = [run.label for run in runs]
    trained = training_differences(runs)
    sentences = [
        (
            summary(runs, comparisons, run),
            [*verdicts(runs, comparisons, run), *slice_verdicts(runs, slices, run)],
        )
        for run in range(1, len(runs))
    ]
    page = render_page(
        "comparison.html",
        f"voxray comparison: {', '.join(labels)}",
        ASSETS,
        labels=labels,
        matched=matched,
        verdicts=sentences,
        trained=trained,
        overview=overview_table(runs, comparisons, trained),
        task_metrics=metric_tables(runs, comparisons),
        charts=_charts(runs, comparisons, slices),
        difference_charts=difference_charts(runs, comparisons),
        differences=difference_table(runs, comparisons),
        interference=interference(runs, comparisons),
        slices=slice_table(runs, slices),
        about=about_table(runs),
        explorer=_explorer(runs, comparisons, max_rows, embed_audio_mib),
    )
    write_atomically(path, page)


def tally_errors(rows: Sequence[ScoredRow], task: str) -> dict[str, ErrorTally]:
    """Count a task's errors by word and, for transcripts, by character without spaces."""
    tallies = {"word": tally((row.reference.split(), row.prediction.split()) for row in rows)}
    if is_transcript(task):
        texts = ((row.reference.replace(" ", ""), row.prediction.replace(" ", "")) for row in rows)
        tallies["character"] = tally(texts)
    return tallies


def tally_json(entry: ErrorTally, top: int) -> dict[str, Any]:
    """The most frequent errors of each kind and the total number of each."""
    substitutions = [
        {"reference": reference, "prediction": prediction, "times": times}
        for (reference, prediction), times in entry.substitutions.most_common(top)
    ]
    return {
        "num_reference": entry.num_reference,
        "num_substitutions": entry.substitutions.total(),
        "num_insertions": entry.insertions.total(),
        "num_deletions": entry.deletions.total(),
        "substitutions": substitutions,
        "insertions": [{"prediction": unit, "times": times} for unit, times in entry.insertions.most_common(top)],
        "deletions": [{"reference": unit, "times": times} for unit, times in entry.deletions.most_common(top)],
    }


def _errors_json(task: TaskComparison, slices: Sequence[SliceComparison], top: int) -> dict[str, Any]:
    """A task's part of errors.json."""
    worst = sorted((row for row in task.rows[0] if row.error > 0), key=lambda row: -row.error)[:top]
    by_slice = []
    for entry in slices:
        if entry.task == task.task:
            low, high = entry.difference.first_interval or (None, None)
            values = {"metric": headline(task.task), "value": entry.difference.first, "low": low, "high": high}
            by_slice.append({"slice": entry.slice, "is": entry.value, **values, "n": entry.difference.num_rows})
    names = ("id", "source", "reference", "prediction")
    return {
        "units": {unit: tally_json(entry, top) for unit, entry in tally_errors(task.rows[0], task.task).items()},
        "worst": [{**{name: row.values.get(name) for name in names}, "error": row.error} for row in worst],
        "slices": by_slice,
    }


def _figures(run: Evaluation, comparisons: Sequence[TaskComparison]) -> dict[str, str]:
    """The figures at the top of the page."""
    figures = {"rows": f"{len(run.rows):,}", "right to the letter": f"{sum(row.exact for row in run.rows):,}"}
    for task in comparisons:
        name = headline(task.task)
        if name in task.values:
            figures[f"{task.task} {name}"] = f"{task.values[name][0][0]:.3f}"
    return figures


def _metrics_table(run: Evaluation, comparisons: Sequence[TaskComparison]) -> tuple[Table, list[str]]:
    """The metrics of metrics.json. Sums over rows are counted again, so that all figures of a page agree.

    Returns:
        The table, and the metrics whose value in metrics.json is another one.
    """
    computed = {(task.task, name): values[0] for task in comparisons for name, values in task.values.items()}
    order = [*TASKS, "overall"]
    stored = {
        (task, name): entry
        for task in order
        for name, entry in run.metrics.get(task, {}).items()
        if isinstance(entry, dict) and isinstance(entry.get("value"), int | float)
    }
    rows, outdated = [], []
    for task, name in sorted({**stored, **computed}, key=lambda key: order.index(key[0])):
        entry = stored.get((task, name), {})
        value, bounds = computed.get((task, name)) or (entry["value"], None)
        if entry and abs(entry["value"] - value) > TOLERANCE:
            outdated.append(f"{task} {name}")
        elif entry.get("low") is not None:
            bounds = entry["low"], entry["high"]
        interval = f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
        rows.append([task, metric_label(f"{task}/{name}"), Cell(f"{value:.4f}", value), interval, entry.get("n", "")])
    return Table(["task", "metric", "value", "95 % interval", "n"], rows, "sortable", "metrics"), outdated


def _charts(
    runs: Sequence[Evaluation], comparisons: Sequence[TaskComparison], slices: Sequence[SliceComparison]
) -> list[Chart]:
    """Per task: a histogram of row errors, and the headline metric by duration and by length."""
    charts = []
    for task in comparisons:
        name = headline(task.task)
        groups, series = _histogram(runs, task)
        charts.append(bars(f"{task.task}: rows by their error", groups, series, "rows"))
        for kind in CHART_SLICES:
            entries = [entry for entry in slices if (entry.task, entry.slice) == (task.task, kind)]
            labels = list(dict.fromkeys(entry.value for entry in entries))
            if len(labels) > 1:
                values = [
                    (run.label, [_slice_value(entries, label, index) for label in labels])
                    for index, run in enumerate(runs)
                ]
                charts.append(bars(f"{task.task}: {name} by {kind}", labels, values, name))
    return [chart for chart in charts if chart]


def _histogram(
    runs: Sequence[Evaluation], task: TaskComparison
) -> tuple[list[str], list[tuple[str, Sequence[Value | None]]]]:
    names = ["0", *(f"to {edge:g}" for edge in ERROR_EDGES[1:]), f"over {ERROR_EDGES[-1]:g}"]
    series: list[tuple[str, Sequence[Value | None]]] = []
    for run, rows in zip(runs, task.rows, strict=True):
        counts = Counter(bisect_left(ERROR_EDGES, row.error) for row in rows)
        series.append((run.label, [Value(counts[index]) for index in range(len(names))]))
    return names, series


def _slice_value(entries: Sequence[SliceComparison], label: str, run: int) -> Value | None:
    """One run's value on a slice; the first run's is part of every comparison with it."""
    for entry in entries:
        if entry.value == label and run in (0, entry.run):
            result = entry.difference
            bounds = result.first_interval if run == 0 else result.second_interval
            return Value(result.first if run == 0 else result.second, *(bounds or (None, None)))
    return None


def _explorer(
    runs: Sequence[Evaluation], comparisons: Sequence[TaskComparison], max_rows: int, embed_audio_mib: int
) -> dict[str, Any]:
    """A sentence on the rows that the page holds, and the JSON that report.js reads."""
    rows = [[row for task in comparisons for row in task.rows[index]] for index in range(len(runs))]
    shown, num_left, clips_note = page_rows(rows, max_rows=max_rows, embed_audio_mib=embed_audio_mib)
    order = "those with the largest changes first" if len(runs) > 1 else "those with most errors first"
    note = f"{len(shown):,} rows, {order}. {clips_note}"
    if num_left:
        note += f" {num_left:,} more are left out (--max_rows {max_rows})."
    return {"note": note, "data": {"runs": [run.label for run in runs], "rows": shown, "left": num_left}}
