"""The report of an audit: one HTML page with embedded style and images, without a script, that fetches nothing."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voxray.audit.advice import FAULTS, WARNINGS
from voxray.audit.findings import UNITS, RowStatistics
from voxray.core.storage import write_atomically
from voxray.html.page import Table, data_uri, path_cell, render_page

MAX_BINS, DPI = 60, 150
MAX_OPEN = 40  # findings; with more of them the examples of every reason are collapsed
LONG_TAIL = 4.0  # the axis is logarithmic if the maximum is over this many times the 95th percentile
NEAR_LIMIT = 3.0  # a limit over this many times the maximum is not drawn
COLOURS = ("#2563a8", "#e08a2e", "#3d9970", "#9b59b6", "#777777")
TITLES = {"duration_sec": "Duration", "num_tokens": "Length in tokens (prompt, audio, answer)"}
TITLES |= {"num_chars": "Length in characters (prompt and answer)", "num_bytes": "Length in bytes of UTF-8"}
TITLES |= {"chars_per_sec": "Speaking rate (transcripts)"}
SUMMARY = ("rows", "min", "mean", "p50", "p90", "p95", "p99", "max")


def write_report(
    output_dir: Path,
    figures: Mapping[str, Any],
    numbers: Mapping[str, RowStatistics],
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Write the histograms and report.html.

    Args:
        figures: See ``commands.audit.audit_figures``.
        numbers: Measurements of the usable rows by task.
        examples: Findings by reason.
    """
    length = "num_tokens" if figures["model_id"] else "num_chars"
    images = []
    for name, file in ((length, "tokens" if figures["model_id"] else "characters"), ("duration_sec", "duration")):
        for old in ("tokens", "characters") if name == length else (file,):
            (output_dir / f"{old}.png").unlink(missing_ok=True)
        png = histogram(numbers, name, figures["max_len"] if name == "num_tokens" else None)
        if png:
            write_atomically(output_dir / f"{file}.png", png)
            images.append((TITLES[name], png))
    write_atomically(output_dir / "report.html", _page(figures, images, examples))


def histogram(numbers: Mapping[str, RowStatistics], name: str, limit: float | None = None) -> bytes | None:
    """Stacked histogram of one measurement by task, as PNG; None if nothing was measured.

    Args:
        name: Key of ``RowStatistics.values``.
        limit: Drawn as a line, unless it is far from all values.
    """
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    values = {task: np.asarray(entry.values[name]) for task, entry in sorted(numbers.items()) if entry.values[name]}
    if not values:
        return None
    together = np.concatenate(list(values.values()))
    low, high = float(together.min()), float(together.max())
    is_near = limit is not None and limit <= NEAR_LIMIT * high  # a far limit would squeeze the bars
    high = max(high, limit or 0.0) if is_near else high
    is_long = low > 0 and high > LONG_TAIL * float(np.percentile(together, 95))
    num_bins = int(min(MAX_BINS, max(8, 2 * len(together) ** 0.5)))
    if high - low < 0.2 * high:  # do not magnify small differences
        low, high = 0.8 * low, 1.2 * high
    edges = np.geomspace(low, high * 1.001, num_bins + 1) if is_long else np.linspace(low, high + 1e-9, num_bins + 1)
    figure = Figure(figsize=(9, 3.0), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{task} ({len(entry)})" for task, entry in values.items()]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(values))]
    axes.hist(list(values.values()), bins=edges.tolist(), stacked=True, label=labels, color=colours, linewidth=0)
    if is_long:
        axes.set_xscale("log")
    if limit and is_near:
        axes.axvline(limit, color="#b3372f", linewidth=1.2, linestyle="--", label=f"max_len {limit:g}")
    axes.set_xlabel(UNITS[name])
    axes.set_ylabel("rows")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _page(
    figures: Mapping[str, Any],
    images: Sequence[tuple[str, bytes]],
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> bytes:
    is_compared = any(file["side"] for file in figures["files"])
    names = {"rows": "rows", "hours": "hours of audio", "rows_with_faults": "rows with faults"}
    names |= {"rows_with_warnings": "rows with warnings", "clean_rows": "clean rows"}
    return render_page(
        "audit.html",
        "voxray audit",
        ["audit.css"],
        audit=figures,
        num_faults=sum(figures["faults"].values()),
        figures={
            name: f"{figures[key]:,.2f}" if key == "hours" else f"{figures[key]:,}" for key, name in names.items()
        },
        files=_files_table(figures["files"], is_compared),
        is_compared=is_compared,
        lengths=_lengths_table(figures),
        images=[(title, data_uri(png, "image/png")) for title, png in images],
        findings=[
            ("Faults", _findings(figures["faults"], examples, FAULTS, "faults.jsonl")),
            ("Warnings", _findings(figures["warnings"], examples, WARNINGS, "warnings.jsonl")),
        ],
    )


def _files_table(files: Sequence[Mapping[str, Any]], is_compared: bool) -> Table:
    """Rows, faults and hours of every file, and its side if sides are compared."""
    names = ["file", *(["side"] if is_compared else []), "rows", "with faults", "hours"]
    rows = [
        [
            path_cell(file["path"]),
            *([file["side"]] if is_compared else []),
            file["rows"],
            file["bad"],
            f"{file['hours']:.3f}",
        ]
        for file in files
    ]
    return Table(names, rows)


def _lengths_table(figures: Mapping[str, Any]) -> Table:
    names = [name for name in TITLES if any(entry.get(name) for entry in figures["tasks"].values())]
    entries = {**figures["tasks"], **({"all": figures["all"]} if len(figures["tasks"]) > 1 else {})}
    rows = []
    for name in names:
        for task, entry in entries.items():
            if summary := entry.get(name):
                values = [f"{summary[key]:,.5g}" if summary[key] < 1e5 else f"{summary[key]:,.0f}" for key in SUMMARY]
                rows.append([UNITS[name], task, *values])
    return Table(["in", "task", *SUMMARY], rows)


def _findings(
    counts: Mapping[str, int],
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
    advice: Mapping[str, tuple[str, str]],
    file: str,
) -> dict[str, Any]:
    """The faults or the warnings: a table of the reasons, and for every reason the first rows that have it.

    Args:
        counts: {reason: number of rows}.
        advice: {reason: (what it is, what to do)}.
        file: The file that lists all of them.
    """
    overview = [[reason, count, *advice.get(reason, ("", ""))] for reason, count in counts.items()]
    reasons = []
    for reason, count in counts.items():
        shown = examples[reason]
        note = f" (the first {len(shown)}; all are in {file})" if count > len(shown) else ""
        rows = [
            [f"{entry['source_file']}:{entry['line']}", entry["id"], entry["text"], entry["message"]] for entry in shown
        ]
        reasons.append((reason, f"{count}{note}", Table(["where", "id", "begins with", "message"], rows, "findings")))
    return {
        "overview": Table(["reason", "rows", "what it is", "what to do"], overview),
        "reasons": reasons,
        "is_open": sum(len(examples[reason]) for reason in counts) <= MAX_OPEN,
    }
