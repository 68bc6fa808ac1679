"""Tables of the report pages: what was run, values run by run, differences with their p-values, slices."""

from collections.abc import Sequence
from typing import Any

from voxray.comparison.compare import SliceComparison, TaskComparison, overall, p_text, signed
from voxray.comparison.evaluations import Evaluation, training_differences
from voxray.core.tasks import TASKS
from voxray.html.charts import Value, forest
from voxray.html.page import Cell, escaped, table
from voxray.metrics.names import headline, higher_is_better

DECODING = ("gen_max_new_tokens", "num_beams", "temperature", "top_p", "bf16", "fp16", "quantize", "max_len")


def about(runs: Sequence[Evaluation]) -> str:
    """What was evaluated, and how it decoded."""
    rows = []
    for run in runs:
        settings = run.settings
        adapter = settings.get("lora_dir") or "none"
        decoding = ", ".join(f"{name} {settings[name]}" for name in DECODING if settings.get(name))
        model, label = settings.get("model_id") or "not known", Cell(run.label, kind="name")
        rows.append([label, model, adapter, decoding, run.normalizer or "not known", run.folder])
    return table(["run", "model", "adapter", "decoding", "normaliser", "folder"], rows)


def overview(runs: Sequence[Evaluation], found: Sequence[TaskComparison]) -> str:
    """One row per run: its score over all tasks, each task's headline, and what its adapter was trained with."""
    tasks = [task for task in found if headline(task.task) in task.values]
    means, trained = overall(found), training_differences(runs)
    rows = []
    for at, run in enumerate(runs):
        row = [Cell(run.label, kind="name"), *(Cell(f"{values[at]:.3f}", values[at]) for values in means.values())]
        for task in tasks:
            name = headline(task.task)
            value = task.values[name][at][0]
            row.append(Cell(f"{value:.3f}", value, "best" if at in task.marked(name) else ""))
        rows.append([*row, *(values[at] for values in trained.values())])
    heads = ["run", *means, *(f"{task.task} {headline(task.task)}" for task in tasks), *trained]
    note = (
        "macro, weighted and balance are of the tasks' scores: 1 is best, 0 worst. In bold, here and below: the best, "
        "and those that are not shown to differ from it; none where no run is shown to differ."
    )
    also = f" Trained with other {', '.join(map('--{}'.format, trained))}." if trained else ""
    return table(heads, rows, "sortable runs", "overview") + f'<p class="note">{escaped(note + also)}</p>'


def runs_table(runs: Sequence[Evaluation], found: Sequence[TaskComparison]) -> str:
    """A table per task, runs down, metrics across."""
    tables = []
    for task in found:
        best = {name: task.marked(name) for name in task.values}
        whole = {name: values for name, values in _of_whole_sets(runs, task).items() if name not in task.values}
        rows = []
        for at, run in enumerate(runs):
            row = [Cell(run.label, kind="name")]
            for name in task.values:
                value, bounds = task.values[name][at]
                shown = f"{value:.3f}" + (f" [{bounds[0]:.3f},\u00a0{bounds[1]:.3f}]" if bounds else "")
                row.append(Cell(shown, value, "best" if at in best[name] else ""))
            rows.append([*row, *(Cell(f"{values[at]:.3f}", values[at]) for values in whole.values())])
        heads = ["run", *task.values, *whole]
        tables.append(f"<h3>{escaped(task.task)}</h3>" + table(heads, rows, "sortable runs", f"runs-{task.task}"))
    return "".join(tables)


def _of_whole_sets(runs: Sequence[Evaluation], task: TaskComparison) -> dict[str, list[float]]:
    """Metrics that are no sums over rows, from metrics.json, if every run has just the matched rows."""
    if any(sum(row.task == task.task for row in run.rows) != len(task.rows[0]) for run in runs):
        return {}
    entries = [run.metrics.get(task.task, {}) for run in runs]
    names = [name for name in entries[0] if all(isinstance(e.get(name, {}).get("value"), int | float) for e in entries)]
    return {name: [entry[name]["value"] for entry in entries] for name in names}


def differences(runs: Sequence[Evaluation], found: Sequence[TaskComparison]) -> str:
    """Every metric of every run against the first: a picture of the headlines and a table of all."""
    pictures, rows = [], []
    for at in range(1, len(runs)):
        shown = []
        for task in found:
            for name, entry in task.pairs[0, at].items():
                better = task.way(at, name)
                bounds = entry.interval or (entry.difference, entry.difference)
                # Turned so that the right side is the better one, whatever the metric.
                sign = 1 if higher_is_better(name) else -1
                turned = sorted(sign * end for end in bounds)
                if name in TASKS[task.task].metrics:
                    shown.append((f"{task.task} {name}", Value(sign * entry.difference, *turned), better))
                rows.append(
                    [
                        *(Cell(runs[at].label, kind="name"), task.task, name, Cell(f"{entry.first:.3f}", entry.first)),
                        *(Cell(f"{entry.second:.3f}", entry.second), _signed_cell(entry.difference, better)),
                        *(f"{signed(bounds[0])} to {signed(bounds[1])}", _p_cell(task.adjusted[0, at][name])),
                        entry.num_rows,
                    ]
                )
        title = f"{runs[at].label} against {runs[0].label}"
        pictures.append(forest(title, shown, "", "worse \u2190 difference \u2192 better"))
    heads = ["run", "task", "metric", runs[0].label, "this run", "difference", "95 % interval", "p", "rows"]
    drawn = f'<div class="charts">{"".join(pictures)}</div>'
    return f"<h2>Against {escaped(runs[0].label)}</h2>{drawn}" + table(heads, rows, "sortable", "differences")


def _signed_cell(difference: float, better: int) -> Cell:
    return Cell(signed(difference), difference, {1: "up", -1: "down", 0: ""}[better])


def _p_cell(p: float) -> Cell:
    return Cell(p_text(p).removeprefix("p ").removeprefix("= "), p)


def slice_table(runs: Sequence[Evaluation], slices: Sequence[SliceComparison]) -> str:
    if not slices:
        return ""
    rows = []
    for entry in slices:
        found, name = entry.difference, headline(entry.task)
        first = Cell(f"{found.first:.3f}", found.first)
        own = found.first_interval
        interval = "" if own is None else f"{own[0]:.3f} to {own[1]:.3f}"
        row: list[Any] = [entry.task, entry.slice, entry.value, found.num_rows, name]
        if len(runs) == 1:
            rows.append([*row, first, interval])
            continue
        interval = "" if found.interval is None else " to ".join(map(signed, found.interval))
        row += [runs[entry.run].label, first, Cell(f"{found.second:.3f}", found.second)]
        rows.append([*row, _signed_cell(found.difference, entry.way), interval, _p_cell(entry.adjusted)])
    heads = ["task", "slice", "is", "rows", "metric"]
    tail = ["run", runs[0].label, "this run", "difference", "95 % interval", "p"]
    tail = ["value", "95 % interval"] if len(runs) == 1 else tail
    return "<h2>Slices</h2>" + table([*heads, *tail], rows, "sortable", "slices")
