"""The compare job: compares evaluations with each other, or writes the report of a single one."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from voxray.commands.next_steps import page_line
from voxray.comparison.alignments import aligned_lines
from voxray.comparison.compare import TaskComparison, as_json, compare_slices, compare_tasks, interference
from voxray.comparison.evaluations import (
    Evaluation,
    ScoredRow,
    differing_settings,
    match_rows,
    read_evaluation,
    read_evaluations,
)
from voxray.comparison.report import report_evaluation, write_comparison
from voxray.config.compare import CompareSettings
from voxray.core.console import console
from voxray.core.errors import SettingsError
from voxray.core.storage import write_json
from voxray.core.tasks import TASKS
from voxray.metrics.names import headline, is_transcript
from voxray.runs.lease import folder_lease
from voxray.runs.run_folder import resolve_output_dir

SHOWN_ROWS = 3
SHOWN_ERRORS = 8
SHOWN_LINES = 12  # of an alignment


def run_compare(settings: CompareSettings) -> dict[str, Any]:
    """Compare evaluations, or report on a single one.

    Returns:
        The content of comparison.json or errors.json.
    Raises:
        RunError: A folder holds no finished evaluation, or the evaluations have no row in common.
        SettingsError: A folder is given twice, or the output folder cannot be used.
    """
    folders = [Path(run) for run in settings.runs]
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(folders):
        if resolved[index] in resolved[:index]:
            raise SettingsError(f"--runs: {folder} is given twice")
    if len(folders) == 1:
        return _report(settings, folders[0])
    output_dir = resolve_output_dir(settings.output_dir or "runs/compare", settings.storage_path)
    runs = read_evaluations(settings.runs)
    matched = match_rows(runs)
    with folder_lease(output_dir):
        resampling = {"seed": settings.seed, "num_resamples": settings.num_resamples}
        tasks = compare_tasks(matched, **resampling)
        slices = compare_slices(tasks, **resampling)
        shared = {"differing_settings": differing_settings(runs), **resampling}
        result = {**as_json(runs, matched, tasks, slices, top=settings.top), **shared}
        write_json(output_dir / "comparison.json", result)
        limits = {"max_rows": settings.max_rows, "embed_audio_mib": settings.embed_audio_mib}
        write_comparison(output_dir / "comparison.html", runs, matched, tasks, slices, **limits)
        _print_comparison(runs, tasks, result)
        console.print(f"comparison.html and comparison.json in {output_dir}", markup=False)
        console.print(page_line(output_dir / "comparison.html"), markup=False, soft_wrap=True)
        return result


def _report(settings: CompareSettings, folder: Path) -> dict[str, Any]:
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path) if settings.output_dir else folder
    run = read_evaluation(folder)  # before a folder is made, so that an error leaves none
    with folder_lease(output_dir):
        names = ("seed", "num_resamples", "top", "max_rows", "embed_audio_mib")
        errors = report_evaluation(run, output_dir, **{name: getattr(settings, name) for name in names})
        for task, task_errors in errors.items():
            for unit, entry in task_errors["units"].items():
                console.print(_errors_table(f"{run.label}, {task}, by {unit}", entry))
        worst = sorted((row for row in run.rows if not row.exact), key=lambda row: -row.error)[:SHOWN_ROWS]
        for row in worst:
            console.print(f"{row.task} {row.values.get('id') or ''}, error {row.error:.2f}", markup=False)
            console.print(aligned(row), markup=False)
        console.print(f"report.html and errors.json in {output_dir}", markup=False)
        console.print(page_line(output_dir / "report.html"), markup=False, soft_wrap=True)
        return errors


def aligned(row: ScoredRow) -> str:
    """A row's reference and prediction, aligned one above the other: transcripts by character, answers by word."""
    texts = (row.reference, row.prediction)
    if is_transcript(row.task):
        lines = aligned_lines(*texts, width=console.width, joint="").split("\n")
    else:
        lines = aligned_lines(*(text.split() for text in texts), width=console.width).split("\n")
    more = [f"... {len(lines) - SHOWN_LINES} more lines"] if len(lines) > SHOWN_LINES else []
    return "\n".join([*lines[:SHOWN_LINES], *more])


def _errors_table(title: str, entry: dict[str, Any]) -> Table:
    """The most frequent errors of a unit (words or characters), one column per kind."""
    table = Table(title=escape(title), title_justify="left")
    kinds = ("substitutions", "deletions", "insertions")
    for name in kinds:
        table.add_column(f"{entry[f'num_{name}']:,} {name}")
    columns = [[_error_text(error) for error in entry[name][:SHOWN_ERRORS]] for name in kinds]
    for texts in itertools.zip_longest(*columns, fillvalue=""):
        table.add_row(*map(escape, texts))
    return table


def _error_text(error: dict[str, Any]) -> str:
    texts = [error[name] for name in ("reference", "prediction") if name in error]
    return f"{' -> '.join(texts)}  {error['times']}"


def _print_comparison(runs: Sequence[Evaluation], tasks: Sequence[TaskComparison], result: dict[str, Any]) -> None:
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", markup=False)
    for task in tasks:
        table = Table(title=f"{task.task}, {len(task.rows[0])} rows", title_justify="left")
        table.add_column("run")
        names = [name for name in TASKS[task.task].metrics if name in task.values]
        for name in names:
            table.add_column(name, justify="right")
        best = {name: task.highlighted(name) for name in names}
        for index, run in enumerate(runs):
            table.add_row(escape(run.label), *(_metric_text(task, name, index, best[name]) for name in names))
        console.print(table)
    marked = "* the best run and those that do not differ significantly from it; no mark if all are alike"
    console.print(f"{marked}; intervals are 95 %", markup=False)
    console.print(f"normalised by {result['normalizer']}", markup=False)
    for sentence in (*result["summaries"], *result["verdicts"], *result["slice_verdicts"], *interference(runs, tasks)):
        console.print(sentence, markup=False)
    for task in tasks:
        for run, rows, change in zip(runs[1:], task.rows[1:], task.changes, strict=True):
            for index in change["broken"][:SHOWN_ROWS]:
                row = rows[index]
                console.print(f"broken by {run.label}: {task.task} {row.values.get('id') or ''}", markup=False)
                console.print(aligned(row), markup=False)


def _metric_text(task: TaskComparison, metric: str, run: int, best: Sequence[int]) -> str:
    value, bounds = task.values[metric][run]
    interval = f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds and metric == headline(task.task) else ""
    return f"{value:.3f}{'*' if run in best else ' '}{interval}"
