"""Tables of the report pages: runs, metrics per run, differences with their p-values, slices."""

from collections.abc import Mapping, Sequence
from typing import Any

from voxray.comparison.compare import SliceComparison, TaskComparison, overall, p_text, signed
from voxray.comparison.evaluations import Evaluation
from voxray.core.tasks import TASKS
from voxray.html.charts import Chart, IntervalRow, Value, differences
from voxray.html.page import Cell, Table
from voxray.metrics.names import OUT_OF_100, headline, higher_is_better

DECODING = ("gen_max_new_tokens", "num_beams", "temperature", "top_p", "bf16", "fp16", "quantize", "max_len")
VERDICTS = {1: ("better", "up"), -1: ("worse", "down"), 0: ("unsure", "")}
"""CSS classes in charts and in tables, by the sign of a difference that is shown."""


def metric_label(metric: str) -> str:
    """A metric with an arrow to its better values, and with its scale if that is not 0 to 1.

    Args:
        metric: A key such as ``asr/cer``, or only the metric's name.
    """
    name = metric.rpartition("/")[2]
    try:
        arrow = "\N{UPWARDS ARROW}" if higher_is_better(metric) else "\N{DOWNWARDS ARROW}"
    except ValueError:  # a metric of another version
        arrow = ""
    return f"{name}{' (0 to 100)' if name in OUT_OF_100 else ''} {arrow}".rstrip()


def about_table(runs: Sequence[Evaluation]) -> Table:
    """Models, adapters and decoding settings."""
    rows = []
    for run in runs:
        settings = run.settings
        adapter = settings.get("lora_dir") or "none"
        decoding = ", ".join(f"{name} {settings[name]}" for name in DECODING if settings.get(name))
        model, label = settings.get("model_id") or "not known", Cell(run.label, kind="name")
        rows.append([label, model, adapter, decoding, run.normalizer, run.folder])
    return Table(["run", "model", "adapter", "decoding", "normaliser", "folder"], rows)


def overview_table(
    runs: Sequence[Evaluation], comparisons: Sequence[TaskComparison], trained: Mapping[str, Sequence[str]]
) -> Table:
    """One row per run: its scores over all tasks, each task's headline metric, and the settings it was trained with.

    Args:
        trained: {flag: value per run}, see ``evaluations.training_differences``.
    """
    tasks = [task for task in comparisons if headline(task.task) in task.values]
    means = overall(comparisons)
    rows = []
    for index, run in enumerate(runs):
        row = [Cell(run.label, kind="name"), *(_number(values[index]) for values in means.values())]
        for task in tasks:
            name = headline(task.task)
            row.append(_number(task.values[name][index][0], "best" if index in task.highlighted(name) else ""))
        rows.append([*row, *(values[index] for values in trained.values())])
    heads = ["run", *means, *(f"{task.task} {metric_label(headline(task.task))}" for task in tasks), *trained]
    return Table(heads, rows, "sortable runs", "overview")


def metric_tables(runs: Sequence[Evaluation], comparisons: Sequence[TaskComparison]) -> dict[str, Table]:
    """A table per task with a row per run and a column per metric."""
    tables = {}
    for task in comparisons:
        best = {name: task.highlighted(name) for name in task.values}
        stored = {name: values for name, values in _stored_metrics(runs, task).items() if name not in task.values}
        rows = []
        for index, run in enumerate(runs):
            row = [Cell(run.label, kind="name")]
            for name in task.values:
                value, bounds = task.values[name][index]
                text = f"{value:.3f}" + (f" [{bounds[0]:.3f},\u00a0{bounds[1]:.3f}]" if bounds else "")
                row.append(Cell(text, value, "best" if index in best[name] else ""))
            rows.append([*row, *(_number(values[index]) for values in stored.values())])
        heads = ["run", *map(metric_label, (*task.values, *stored))]
        tables[task.task] = Table(heads, rows, "sortable runs", f"runs-{task.task}")
    return tables


def _stored_metrics(runs: Sequence[Evaluation], task: TaskComparison) -> dict[str, list[float]]:
    """Metrics of metrics.json, which may be no sums over rows, if the matched rows are all rows of every run."""
    if any(sum(row.task == task.task for row in run.rows) != len(task.rows[0]) for run in runs):
        return {}
    entries = [run.metrics.get(task.task, {}) for run in runs]
    names = [name for name in entries[0] if all(isinstance(e.get(name, {}).get("value"), int | float) for e in entries)]
    return {name: [entry[name]["value"] for entry in entries] for name in names}


def difference_charts(runs: Sequence[Evaluation], comparisons: Sequence[TaskComparison]) -> list[Chart]:
    """A chart per run: its metrics against the first run's, turned so that the right side is the better one."""
    charts = []
    for run in range(1, len(runs)):
        rows = []
        for task in comparisons:
            for name, entry in task.pairs[0, run].items():
                if name in TASKS[task.task].metrics:
                    sign = 1 if higher_is_better(name) else -1
                    ends = sorted(sign * end for end in entry.interval or (entry.difference, entry.difference))
                    value = Value(sign * entry.difference, *ends)
                    rows.append(IntervalRow(f"{task.task} {name}", value, VERDICTS[task.direction(run, name)][0]))
        title = f"{runs[run].label} against {runs[0].label}"
        charts.append(differences(title, rows, "worse \u2190 difference \u2192 better"))
    return [chart for chart in charts if chart]


def difference_table(runs: Sequence[Evaluation], comparisons: Sequence[TaskComparison]) -> Table:
    """Every metric of every run against the first."""
    rows = []
    for run in range(1, len(runs)):
        for task in comparisons:
            for name, entry in task.pairs[0, run].items():
                low, high = entry.interval or (entry.difference, entry.difference)
                rows.append(
                    [
                        *(Cell(runs[run].label, kind="name"), task.task, metric_label(name)),
                        *(_number(entry.first), _number(entry.second)),
                        *(_difference(entry.difference, task.direction(run, name)), f"{signed(low)} to {signed(high)}"),
                        *(_p_value(task.adjusted[0, run][name]), entry.num_rows),
                    ]
                )
    heads = ["run", "task", "metric", runs[0].label, "this run", "difference", "95 % interval", "p", "rows"]
    return Table(heads, rows, "sortable", "differences")


def slice_table(runs: Sequence[Evaluation], slices: Sequence[SliceComparison]) -> Table:
    """Headline metrics by slice: of a single run, or of every run against the first."""
    heads = ["task", "slice", "is", "rows", "metric"]
    if len(runs) == 1:
        heads += ["value", "95 % interval"]
    else:
        heads += ["run", runs[0].label, "this run", "difference", "95 % interval", "p"]
    rows = []
    for entry in slices:
        result = entry.difference
        row: list[Any] = [entry.task, entry.slice, entry.value, result.num_rows, metric_label(headline(entry.task))]
        if len(runs) == 1:
            bounds = result.first_interval
            row += [_number(result.first), f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""]
        else:
            row += [runs[entry.run].label, _number(result.first), _number(result.second)]
            row += [_difference(result.difference, entry.direction)]
            row += [" to ".join(map(signed, result.interval or ())), _p_value(entry.adjusted)]
        rows.append(row)
    return Table(heads, rows, "sortable", "slices")


def _number(value: float, kind: str = "") -> Cell:
    return Cell(f"{value:.3f}", value, kind)


def _difference(difference: float, direction: int) -> Cell:
    return Cell(signed(difference), difference, VERDICTS[direction][1])


def _p_value(p: float) -> Cell:
    return Cell(p_text(p).removeprefix("p ").removeprefix("= "), p)
