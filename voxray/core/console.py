"""Console output of a job: progress bars on a terminal, a line every 10 s elsewhere (`ray job logs`)."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from voxray.core.tasks import TASKS

SECONDS_BETWEEN_LINES = 10.0
console = Console(soft_wrap=True, highlight=False)


class Bar:
    """Progress of one step of a job. ``update`` may be called at any rate."""

    def __init__(self, title: str, progress: Progress | None) -> None:
        self._title, self._progress = title, progress
        self._task = progress.add_task(title, total=None, note="") if progress else None
        self._last_line = time.monotonic()

    def update(self, done: float, total: float, note: str = "") -> None:
        """Show ``done`` of ``total`` and a note."""
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            console.print(f"{self._title}: {done:g} of {total:g}  {note}".rstrip())

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        console.print(text, markup=False)


@contextmanager
def progress_bar(title: str, *, own_eta: bool = False) -> Iterator[Bar]:
    """Show a bar for one step of a job.

    Args:
        own_eta: The notes say how much time is left. Otherwise the bar estimates it from its updates.
    """
    if not console.is_terminal or console._live_stack:  # rich shows one bar at a time
        console.print(f"{title} ...", markup=False)
        yield Bar(title, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    remaining = TextColumn("{task.fields[note]}") if own_eta else TimeRemainingColumn()
    with Progress(*columns, TimeElapsedColumn(), remaining, console=console, transient=True) as progress:
        yield Bar(title, progress)


def clock(seconds: float) -> str:
    """Format a duration as ``1:02:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def metrics_table(title: str, metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Show {task: {metric: {"value", "n"}}} as a table, with the 95 % interval where there is one.

    Args:
        metrics: May be the content of a metrics.json. Its tasks, the names of its normalisers and, for several tasks,
            its ``overall`` entry are shown.
    """
    tasks = [task for task in TASKS if task in metrics]
    shown = [*tasks, "overall"] if len(tasks) > 1 else tasks
    rows = [(task, name, entry) for task in shown for name, entry in metrics.get(task, {}).items()]
    intervals = any(entry.get("low") is not None for *_, entry in rows)
    names = ", ".join(metrics.get("normalizer", {}))
    table = Table(title=title, title_justify="left", caption=names and f"normalised by {names}", caption_justify="left")
    for name in ("task", "metric", "value", *(["95 %"] if intervals else []), "n"):
        table.add_column(name, justify="left" if name in {"task", "metric"} else "right")
    for task, name, entry in rows:
        has_interval = entry.get("low") is not None
        interval = [f"{entry['low']:.4f} - {entry['high']:.4f}" if has_interval else ""] if intervals else []
        table.add_row(task, name, f"{entry['value']:.4f}", *interval, str(entry["n"]))
    return table
