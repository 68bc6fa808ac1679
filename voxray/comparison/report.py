"""Reports as one HTML page each, of one evaluation and of a comparison; they open from disk and fetch nothing."""

from collections.abc import Iterable, Mapping, Sequence
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
from voxray.comparison.evaluations import Evaluation, MatchedEvaluations, ScoredRow, read_evaluation
from voxray.comparison.report_rows import as_script, page_rows
from voxray.comparison.report_tables import about, differences, overview, runs_table, slice_table
from voxray.core.storage import write_atomically, write_json
from voxray.core.tasks import TASKS
from voxray.html.charts import Value, bars
from voxray.html.page import Cell, asset, escaped, page, table
from voxray.metrics.bootstrap import NUM_RESAMPLES
from voxray.metrics.names import headline, higher_is_better, is_transcript

ERROR_EDGES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
CHART_SLICES = ("duration", "length")
LONGEST_WORD = 40
SAME = 1e-9  # two values of a metric that are this near are the same
LEGEND = (
    '<p class="note"><span class="key s">substituted</span> <span class="key i">added</span> '
    '<span class="key d">missing</span> The reference is above, the answer below it, both normalised; '
    "\u2423 is a space. Click on a column's name to sort.</p>"
)


def write_report(output_dir: Path, **how: Any) -> dict[str, Any]:
    """Write report.html and errors.json of a finished evaluation into its folder, see ``report_evaluation``.

    Raises:
        RunError: There is no finished evaluation.
    """
    return report_evaluation(read_evaluation(output_dir), output_dir, **how)


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
    """Write report.html and errors.json of an evaluation that has been read.

    Args:
        folder: To write to.
        seed, num_resamples: Of the intervals of slices, and of whole tasks if metrics.json has none.
        top: Errors of each kind that are listed.
        max_rows: Rows that the page holds; those with most errors if there are more.
        embed_audio_mib: Put clips into the page if they are no larger together.
    Returns:
        What errors.json holds: {task: {"units": {word or character: see ``tally_json``}, "worst", "slices"}}.
    """
    found = compare_tasks(
        MatchedEvaluations((run.rows,), "source", (), run.rules), seed=seed, num_resamples=num_resamples
    )
    slices = compare_slices(found, seed=seed, num_resamples=num_resamples)
    tallies = {task.task: tally_errors(task.rows[0], task.task) for task in found}
    errors = {task.task: _errors_json(task, tallies[task.task], slices, top) for task in found}
    parts = [
        f"<h1>Evaluation: {escaped(run.label)}</h1>{about([run])}",
        _cards(run, found),
        "<h2>Metrics</h2>" + _metrics(run, found),
        _charts([run], found, slices),
        slice_table([run], slices),
        *(_errors(task, of, top) for task, of in tallies.items()),
        *_explorer([run], found, max_rows, embed_audio_mib),
    ]
    write_json(folder / "errors.json", errors)
    write_atomically(folder / "report.html", _page(f"voxray evaluation: {run.label}", parts))
    return errors


def write_comparison(
    path: Path,
    runs: Sequence[Evaluation],
    matched: MatchedEvaluations,
    found: Sequence[TaskComparison],
    slices: Sequence[SliceComparison],
    *,
    max_rows: int,
    embed_audio_mib: int,
) -> None:
    """Write comparison.html. Args as of ``comparison.as_json`` and ``write_report``."""
    warnings = _list(matched.warnings, "warnings") if matched.warnings else ""
    heads = [run.label for run in runs]
    parts = [
        f"<h1>{escaped(' and '.join(heads[1:]) if len(heads) < 4 else f'{len(heads) - 1} runs')} against "
        f"{escaped(heads[0])}</h1>",
        f'<p class="note">{len(matched.rows[0]):,} rows that all runs have, matched by {matched.key}. Intervals are '
        "95 %, by paired bootstrap; p-values by exchanging the runs, raised by Holm where there are several.</p>",
        warnings,
        "<h2>Verdict</h2>",
        *(
            f"<h3>{escaped(summary(runs, found, run))}</h3>"
            + _list([*verdicts(runs, found, run), *slice_verdicts(runs, slices, run)], "lead")
            for run in range(1, len(runs))
        ),
        "<h2>Runs at a glance</h2>" + overview(runs, found),
        "<h2>Metrics</h2>" + runs_table(runs, found),
        _charts(runs, found, slices),
        differences(runs, found),
        "<h2>What one broke and the other had right</h2>" + _list(interference(runs, found), "lead"),
        slice_table(runs, slices),
        "<h2>Runs</h2>" + about(runs),
        *_explorer(runs, found, max_rows, embed_audio_mib),
    ]
    write_atomically(path, _page(f"voxray comparison: {', '.join(heads)}", parts))


def tally_errors(rows: Sequence[ScoredRow], task: str) -> dict[str, ErrorTally]:
    """Errors of a task's rows by word and, for transcripts, by character without spaces."""
    found = {"word": tally((row.reference.split(), row.prediction.split()) for row in rows)}
    if is_transcript(task):
        found["character"] = tally((_solid(row.reference), _solid(row.prediction)) for row in rows)
    return found


def _solid(text: str) -> str:
    return text.replace(" ", "")


def tally_json(entry: ErrorTally, top: int) -> dict[str, Any]:
    """The most frequent errors of each kind, and how many there are in all."""
    substitutions = [
        {"reference": one, "prediction": other, "times": times}
        for (one, other), times in entry.substitutions.most_common(top)
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


def _errors_json(
    task: TaskComparison, tallies: Mapping[str, ErrorTally], slices: Sequence[SliceComparison], top: int
) -> dict[str, Any]:
    """A task's part of errors.json."""
    worst = sorted((row for row in task.rows[0] if row.error > 0), key=lambda row: -row.error)[:top]
    by_slice = []
    for entry in slices:
        if entry.task == task.task:
            low, high = entry.difference.first_interval or (None, None)
            values = {"metric": headline(task.task), "value": entry.difference.first, "low": low, "high": high}
            by_slice.append({"slice": entry.slice, "is": entry.value, **values, "n": entry.difference.num_rows})
    named = ("id", "source", "reference", "prediction")
    return {
        "units": {unit: tally_json(entry, top) for unit, entry in tallies.items()},
        "worst": [{**{name: row.values.get(name) for name in named}, "error": row.error} for row in worst],
        "slices": by_slice,
    }


def _page(title: str, parts: Iterable[str]) -> bytes:
    style, script = (asset(f"report.{kind}") for kind in ("css", "js"))
    return page(title, "".join(parts), style=style, script=script)


def _list(sentences: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{escaped(text)}</li>" for text in sentences) + "</ul>"


def _cards(run: Evaluation, found: Sequence[TaskComparison]) -> str:
    cards = {"rows": f"{len(run.rows):,}", "right to the letter": f"{sum(row.exact for row in run.rows):,}"}
    for task in found:
        name = headline(task.task)
        if name in task.values:
            cards[f"{task.task} {name}"] = f"{task.values[name][0][0]:.3f}"
    shown = "".join(f'<div class="card"><b>{escaped(v)}</b><span>{escaped(k)}</span></div>' for k, v in cards.items())
    return f'<div class="cards">{shown}</div>'


def _metrics(run: Evaluation, found: Sequence[TaskComparison]) -> str:
    """What metrics.json holds, but sums over rows counted anew, so that all figures of a page agree."""
    own = {(task.task, name): values[0] for task in found for name, values in task.values.items()}
    stored = {
        (task, name): entry
        for task in (*TASKS, "overall")
        for name, entry in run.metrics.get(task, {}).items()
        if isinstance(entry, dict) and isinstance(entry.get("value"), int | float)
    }
    rows, other = [], []
    for task, name in sorted({**stored, **own}, key=lambda key: [*TASKS, "overall"].index(key[0])):
        entry = stored.get((task, name), {})
        value, bounds = own.get((task, name)) or (entry["value"], None)
        if entry and abs(entry["value"] - value) > SAME:
            other.append(f"{task} {name}")
        elif entry.get("low") is not None:
            bounds = entry["low"], entry["high"]
        interval = f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""
        row = [task, name, Cell(f"{value:.4f}", value), interval, entry.get("n", "")]
        rows.append([*row, _direction(f"{task}/{name}")])
    note = f"metrics.json holds other values of {', '.join(other)}: it was made by other rules than this page."
    shown = table(["task", "metric", "value", "95 % interval", "n", ""], rows, "sortable", "metrics")
    return shown + (_list([note], "warnings") if other else "")


def _direction(metric: str) -> str:
    try:
        return f"{'higher' if higher_is_better(metric) else 'lower'} is better"
    except ValueError:  # a metric of another version
        return ""


def _charts(runs: Sequence[Evaluation], found: Sequence[TaskComparison], slices: Sequence[SliceComparison]) -> str:
    pictures = []
    for task in found:
        name = headline(task.task)
        groups, series = _histogram(runs, task)
        pictures.append(bars(f"{task.task}: rows by their error", groups, series, "rows"))
        for kind in CHART_SLICES:
            entries = [entry for entry in slices if (entry.task, entry.slice) == (task.task, kind)]
            labels = list(dict.fromkeys(entry.value for entry in entries))
            if len(labels) > 1:
                values = [
                    (run.label, [_slice_value(entries, label, at) for label in labels]) for at, run in enumerate(runs)
                ]
                pictures.append(bars(f"{task.task}: {name} by {kind}", labels, values, name))
    return f'<div class="charts">{"".join(pictures)}</div>'


def _histogram(
    runs: Sequence[Evaluation], task: TaskComparison
) -> tuple[list[str], list[tuple[str, Sequence[Value | None]]]]:
    names = ["0", *(f"to {edge:g}" for edge in ERROR_EDGES[1:]), f"over {ERROR_EDGES[-1]:g}"]
    series: list[tuple[str, Sequence[Value | None]]] = []
    for run, rows in zip(runs, task.rows, strict=True):
        counts = [0] * len(names)
        for row in rows:
            counts[next((at for at, edge in enumerate(ERROR_EDGES) if row.error <= edge), len(ERROR_EDGES))] += 1
        series.append((run.label, [Value(count) for count in counts]))
    return names, series


def _slice_value(entries: Sequence[SliceComparison], label: str, run: int) -> Value | None:
    """One run's value on a slice; the first run's stands in every comparison with it."""
    for entry in entries:
        if entry.value == label and run in (0, entry.run):
            found = entry.difference
            bounds = found.first_interval if run == 0 else found.second_interval
            return Value(found.first if run == 0 else found.second, *(bounds or (None, None)))
    return None


def _errors(task: str, tallies: Mapping[str, ErrorTally], top: int) -> str:
    parts = []
    for unit, entry in tallies.items():
        tables = [
            (
                "substituted",
                ["reference", "answer", "times"],
                [[*map(_short, k), n] for k, n in entry.substitutions.most_common(top)],
            ),
            ("missing", ["reference", "times"], [[_short(k), n] for k, n in entry.deletions.most_common(top)]),
            ("added", ["answer", "times"], [[_short(k), n] for k, n in entry.insertions.most_common(top)]),
        ]
        totals = [entry.substitutions.total(), entry.deletions.total(), entry.insertions.total()]
        shown = [
            f"<div><h3>{unit}s {name}: {total:,}</h3>{table(heads, rows, 'sortable') if rows else ''}</div>"
            for (name, heads, rows), total in zip(tables, totals, strict=True)
        ]
        said = f"<b>by {unit}</b>of {entry.num_reference:,} {unit}s; the {top} most frequent of each kind"
        parts.append(f'<details open><summary>{said}</summary><div class="side">{"".join(shown)}</div></details>')
    return f"<h2>Errors: {escaped(task)}</h2>{''.join(parts)}"


def _short(unit: str) -> str:
    """A word for a table; one of a model that repeats itself without spaces may be thousands of characters."""
    return unit if len(unit) <= LONGEST_WORD else f"{unit[:LONGEST_WORD]}\u2026 ({len(unit):,} characters)"


def _explorer(
    runs: Sequence[Evaluation], found: Sequence[TaskComparison], max_rows: int, embed_audio_mib: int
) -> list[str]:
    rows = [[row for task in found for row in task.rows[at]] for at in range(len(runs))]
    kept, left, clips = page_rows(rows, max_rows=max_rows, embed_audio_mib=embed_audio_mib)
    data = as_script({"runs": [run.label for run in runs], "rows": kept, "left": left})
    first = "those with the largest changes first" if len(runs) > 1 else "those with most errors first"
    said = f"{len(kept):,} rows, {first}. {clips}" + (
        f" {left:,} more are left out (--max_rows {max_rows})." if left else ""
    )
    return [
        f'<h2>Rows</h2><p class="note">{escaped(said)}</p>{LEGEND}<div id="explorer"></div>',
        f'<script type="application/json" id="data">{data}</script>',
    ]
