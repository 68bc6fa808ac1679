"""An audit as one HTML page that opens anywhere: style and pictures are in it, no script, nothing is fetched."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voxray.audit.advice import FAULTS, WARNINGS
from voxray.audit.findings import UNITS, Numbers
from voxray.core.storage import write_atomically
from voxray.html.page import escaped, page, picture, table

MAX_BINS, DPI = 60, 150
MAX_UNFOLDED = 40  # findings; with more of them each reason is folded
LONG_TAIL = 4.0  # a maximum over so many times the 95th percentile puts the axis on a logarithmic scale
NEAR_LIMIT = 3.0  # a limit further out than so many times the maximum is not drawn
COLOURS = ("#2563a8", "#e08a2e", "#3d9970", "#9b59b6", "#777777")
TITLES = {"duration_sec": "Duration", "num_tokens": "Length in tokens (prompt, audio, answer)"}
TITLES |= {"num_chars": "Length in characters (prompt and answer)", "num_bytes": "Length in bytes of UTF-8"}
TITLES |= {"chars_per_sec": "Speaking rate (transcripts)"}
SUMMARY = ("rows", "min", "mean", "p50", "p90", "p95", "p99", "max")
STYLE = """
.findings{table-layout:fixed}
.findings th:nth-child(1){width:26%}
.findings th:nth-child(2){width:9%}
.findings th:nth-child(3){width:22%}
"""


def write_report(
    output_dir: Path,
    figures: Mapping[str, Any],
    numbers: Mapping[str, Numbers],
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Write the pictures and report.html.

    Args:
        figures: See ``audit_job.figures_of``.
        numbers: Figures of the usable rows by task.
        examples: Findings by reason.
    """
    length = "num_tokens" if figures["model_id"] else "num_chars"
    pictures = []
    for name, file in ((length, "tokens" if figures["model_id"] else "characters"), ("duration_sec", "duration")):
        for old in ("tokens", "characters") if name == length else (file,):
            (output_dir / f"{old}.png").unlink(missing_ok=True)
        png = histogram(numbers, name, figures["max_len"] if name == "num_tokens" else None)
        if png:
            write_atomically(output_dir / f"{file}.png", png)
            pictures.append((TITLES[name], png))
    write_atomically(output_dir / "report.html", _page(figures, pictures, examples))


def histogram(numbers: Mapping[str, Numbers], name: str, limit: float | None = None) -> bytes | None:
    """Stacked histogram of one figure by task, as PNG; None if nothing was measured.

    Args:
        limit: Drawn as a line, unless it is far from all values.
    """
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    values = {task: np.asarray(entry.values[name]) for task, entry in sorted(numbers.items()) if entry.values[name]}
    if not values:
        return None
    together = np.concatenate(list(values.values()))
    low, high = float(together.min()), float(together.max())
    near = limit is not None and limit <= NEAR_LIMIT * high  # else the line would leave no room for the bars
    high = max(high, limit or 0.0) if near else high
    is_long = low > 0 and high > LONG_TAIL * float(np.percentile(together, 95))
    num_bins = int(min(MAX_BINS, max(8, 2 * len(together) ** 0.5)))
    if high - low < 0.2 * high:  # values that hardly differ are not to look as if they did
        low, high = 0.8 * low, 1.2 * high
    edges = np.geomspace(low, high * 1.001, num_bins + 1) if is_long else np.linspace(low, high + 1e-9, num_bins + 1)
    figure = Figure(figsize=(9, 3.0), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{task} ({len(entry)})" for task, entry in values.items()]
    colours = [COLOURS[at % len(COLOURS)] for at in range(len(values))]
    axes.hist(list(values.values()), bins=edges.tolist(), stacked=True, label=labels, color=colours, linewidth=0)
    if is_long:
        axes.set_xscale("log")
    if limit and near:
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
    pictures: Sequence[tuple[str, bytes]],
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
) -> bytes:
    count = sum(figures["faults"].values())
    verdict = f'<span class="verdict">{count} fault(s)</span>' if count else '<span class="verdict good">clean</span>'
    unit = f"tokens of {figures['model_id']}, against --max_len {figures['max_len']}" if figures["model_id"] else ""
    unit = unit or "characters and bytes: no --model_id was given, so no tokens were counted"
    cards = {
        "rows": f"{figures['rows']:,}",
        "hours of audio": f"{figures['hours']:,.2f}",
        "rows with faults": f"{figures['rows_with_faults']:,}",
        "rows with warnings": f"{figures['rows_with_warnings']:,}",
        "clean rows": f"{figures['clean_rows']:,}",
    }
    shown = "".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for name, value in cards.items())
    parts = [
        f'<h1>Audit</h1><p>{verdict}</p><p class="note">Lengths are in {escaped(unit)}.</p>',
        f'<div class="cards">{shown}</div>',
        "<h2>Files</h2>" + _files(figures["files"]),
        "<h2>Lengths</h2>" + _lengths(figures),
        *(f'<div class="box"><h2>{escaped(title)}</h2>{picture(title, png)}</div>' for title, png in pictures),
        "<h2>Faults</h2>" + _findings(figures["faults"], examples, FAULTS, "faults.jsonl"),
        "<h2>Warnings</h2>" + _findings(figures["warnings"], examples, WARNINGS, "warnings.jsonl"),
    ]
    return page("voxray audit", "".join(parts), style=STYLE)


def _files(files: Iterable[Mapping[str, Any]]) -> str:
    compared = any(file["side"] for file in files)
    names = ["file", *(["side"] if compared else []), "rows", "with faults", "hours"]
    rows = [
        [file["path"], *([file["side"]] if compared else []), file["rows"], file["bad"], f"{file['hours']:.3f}"]
        for file in files
    ]
    note = "Leaks were looked for between the sides; a row that leaks counts against the earlier one."
    return table(names, rows) + (f'<p class="note">{note}</p>' if compared else "")


def _lengths(figures: Mapping[str, Any]) -> str:
    names = [name for name in TITLES if any(entry.get(name) for entry in figures["tasks"].values())]
    rows = []
    for name in names:
        entries = {**figures["tasks"], **({"all": figures["all"]} if len(figures["tasks"]) > 1 else {})}
        for task, entry in entries.items():
            summary = entry.get(name)
            if summary:
                values = [f"{summary[key]:,.5g}" if summary[key] < 1e5 else f"{summary[key]:,.0f}" for key in SUMMARY]
                rows.append([UNITS[name], task, *values])
    return table(["in", "task", *SUMMARY], rows) if rows else '<p class="note">No row could be measured.</p>'


def _findings(
    counts: Mapping[str, int],
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
    advice: Mapping[str, tuple[str, str]],
    file: str,
) -> str:
    if not counts:
        return '<p class="note">None.</p>'
    overview = [[reason, count, *advice.get(reason, ("", ""))] for reason, count in counts.items()]
    parts = [table(["reason", "rows", "what it is", "what to do"], overview)]
    unfolded = " open" if sum(len(examples[reason]) for reason in counts) <= MAX_UNFOLDED else ""
    for reason, count in counts.items():
        found = examples[reason]
        more = f" (the first {len(found)}; all are in {file})" if count > len(found) else ""
        rows = [
            [f"{entry['source_file']}:{entry['line']}", entry["id"], entry["text"], entry["message"]] for entry in found
        ]
        shown = table(["where", "id", "begins with", "message"], rows, "findings")
        parts.append(
            f"<details{unfolded}><summary><b>{escaped(reason)}</b>{count}{escaped(more)}</summary>{shown}</details>"
        )
    return "".join(parts)
