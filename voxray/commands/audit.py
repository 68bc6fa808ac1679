"""The audit job: measures the rows of manifests and writes report, figures, findings and, with --fix, clean rows."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from voxray.audio.quality import QualityLimits
from voxray.audit.findings import UNITS, Audit, AuditSummary, RowStatistics, Splits, assign_splits, write_findings
from voxray.audit.fix import FixSummary, write_clean
from voxray.audit.measure_rows import AuditLimits, Measurements, measure_manifests, plan_chunks
from voxray.audit.report import write_report
from voxray.cluster.actor_pool import MIN_ACTORS
from voxray.cluster.session import ray_session
from voxray.commands.next_steps import page_line
from voxray.config.audit import AuditSettings
from voxray.core.console import console, progress_bar
from voxray.core.errors import RunError
from voxray.core.storage import write_json
from voxray.core.units import format_duration
from voxray.models.front_end import FrontEnd
from voxray.models.registry import get_family
from voxray.runs.lease import folder_lease
from voxray.runs.run_folder import check_output_files, make_folder, resolve_output_dir

SHOWN_FAULTS = 12


def run_audit_job(settings: AuditSettings, *, use_ray: bool = True) -> dict[str, Any]:
    """Audit manifests.

    Args:
        use_ray: Whether to measure in Ray Data processes; False measures in this process.
    Returns:
        The content of audit.json.
    Raises:
        RunError: There are faults and ``--fix`` is not set, ``--fix`` has no row left to write, or an input cannot be
            read.
        SettingsError: An output path cannot be used.
    """
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    fix = resolve_output_dir(settings.fix, settings.storage_path, flag="--fix") if settings.fix else None
    if fix:
        check_output_files({"--fix": fix}, settings.input)
    plan_chunks(settings.input, output_dir, settings.rows_per_chunk)  # report missing files before making a folder
    model_id, trim_audio = settings.model_id, settings.trim_audio_tokens
    front_end = get_family(model_id).front_end(model_id, trim_audio=trim_audio) if model_id else None
    if not front_end and "max_len" in settings.model_fields_set:
        console.print("--max_len is not checked: tokens can be counted only with --model_id", markup=False)
    with folder_lease(output_dir):
        if fix:
            make_folder(fix.parent, "--fix")
        for leftover in output_dir.glob(".audit-*"):  # of a killed job, since this one holds the lease
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=".audit-", dir=output_dir))
        try:
            measurements = _measure(settings, front_end, work, output_dir, use_ray=use_ray)
            length = "num_tokens" if front_end else "num_chars"
            splits = assign_splits(settings.input, settings.compare)
            is_scripted = settings.leaks == "scripted"
            audit = Audit(measurements, splits, length=length, spread=settings.outlier_spread, scripted=is_scripted)
            summary = write_findings(audit, output_dir, settings.max_examples)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        has_clean_rows = sum(audit.rows.values()) > summary.num_bad
        fix_summary = write_clean(settings.input, summary.bad_lines, fix) if fix and has_clean_rows else None
        figures = audit_figures(settings, audit, summary, fix_summary)
        write_json(output_dir / "audit.json", figures)
        write_report(output_dir, figures, audit.numbers, summary.examples)
        _print_summary(figures, summary, output_dir)
        _print_result(figures, summary, fix, fix_summary, output_dir)
        return figures


def _measure(
    settings: AuditSettings, front_end: FrontEnd | None, work: Path, output_dir: Path, *, use_ray: bool
) -> Measurements:
    items = plan_chunks(settings.input, work, settings.rows_per_chunk)
    shared = set(QualityLimits.__dataclass_fields__) & set(AuditSettings.model_fields)
    quality = QualityLimits(**{name: getattr(settings, name) for name in shared})
    names = set(AuditLimits.__dataclass_fields__) - {"quality"}
    limits = AuditLimits(quality=quality, **{name: getattr(settings, name) for name in names})
    options = {"num_actors": settings.num_actors, "use_ray": use_ray}
    if not use_ray:
        return measure_manifests(settings.input, items, limits, front_end, **options)
    with (
        ray_session(output_dir / "ray.log", max(MIN_ACTORS, settings.num_actors)),
        progress_bar("measuring") as bar,
    ):
        return measure_manifests(settings.input, items, limits, front_end, on_progress=bar.update, **options)


def audit_figures(
    settings: AuditSettings, audit: Audit, summary: AuditSummary, fix_summary: FixSummary | None
) -> dict[str, Any]:
    """The content of audit.json.

    Raises:
        RunError: The inputs have no rows.
    """
    if not audit.rows:
        raise RunError(f"--input {', '.join(settings.input)}: no row, every line is blank")
    by_file, by_task = _totals(audit, 0), _totals(audit, 1)
    tokens = ["num_tokens"] if settings.model_id else []
    names = ["duration_sec", *tokens, "num_chars", "num_bytes", "chars_per_sec"]
    files = [
        {"path": path, "side": _split(audit.splits, number), **by_file[number], "bad": len(summary.bad_lines[number])}
        for number, path in enumerate(settings.input)
    ]
    tasks = {
        task or "unknown": total | {name: audit.numbers[task].summary(name) for name in names if task in audit.numbers}
        for task, total in sorted(by_task.items())
    }
    num_rows, all_numbers = sum(audit.rows.values()), _merge_tasks(audit)
    return {
        "rows": num_rows,
        "rows_with_faults": summary.num_bad,
        "rows_with_warnings": summary.num_warned,
        "clean_rows": num_rows - summary.num_bad,
        "hours": round(sum(audit.seconds.values()) / 3600, 4),
        "length_unit": "tokens" if settings.model_id else "characters and bytes",
        "model_id": settings.model_id,
        "max_len": settings.max_len if settings.model_id else None,
        "files": files,
        "tasks": tasks,
        "all": {name: all_numbers.summary(name) for name in names},
        "faults": dict(summary.faults.most_common()),
        "warnings": dict(summary.warnings.most_common()),
        "fixed": vars(fix_summary) if fix_summary else None,
        "settings": settings.model_dump(mode="json"),
    }


def _totals(audit: Audit, part: int) -> dict[Any, dict[str, Any]]:
    """Rows, usable rows and hours by file (part 0) or task (part 1)."""
    keys = dict.fromkeys(cell[part] for cell in audit.rows) if part else range(len(audit.splits.by_file))
    totals: dict[Any, dict[str, Any]] = {}
    for key in keys:
        cells = [cell for cell in audit.rows if cell[part] == key]
        seconds = sum(audit.seconds[cell] for cell in cells)
        rows, usable = (sum(counts[cell] for cell in cells) for counts in (audit.rows, audit.usable))
        totals[key] = {"rows": rows, "usable": usable, "hours": round(seconds / 3600, 4)}
    return totals


def _merge_tasks(audit: Audit) -> RowStatistics:
    numbers = RowStatistics()
    for task in audit.numbers.values():
        for name, values in numbers.values.items():
            values.extend(task.values[name])
    return numbers


def _split(splits: Splits, number: int) -> str:
    """Name of a file's split; "" if all files are of one split."""
    return splits.names[splits.by_file[number]] if len(set(splits.by_file)) > 1 else ""


def _print_summary(figures: dict[str, Any], summary: AuditSummary, output_dir: Path) -> None:
    table = Table(title="audit", title_justify="left")
    length = "num_tokens" if figures["model_id"] else "num_chars"
    for name in ("task", "rows", "audio", f"{UNITS[length]} p50", "p95", "max", "sec p50", "max"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, entry in figures["tasks"].items():
        lengths, seconds = entry.get(length, {}), entry.get("duration_sec", {})
        values = [lengths.get(name) for name in ("p50", "p95", "max")] + [seconds.get(name) for name in ("p50", "max")]
        cells = ["" if value is None else f"{value:g}" for value in values]
        table.add_row(task, str(entry["rows"]), format_duration(entry["hours"] * 3600), *cells)
    console.print(table)
    if not figures["model_id"]:
        console.print("lengths are in characters (bytes in the report): no --model_id, so no tokens were counted")
    splits: dict[str, list[str]] = {}
    for file in figures["files"]:
        splits.setdefault(file["side"], []).append(Path(file["path"]).name)
    if len(splits) > 1:
        text = " | ".join(f"{split}: {', '.join(names)}" for split, names in splits.items())
        console.print(f"leaks were looked for between {text}", markup=False)
    elif len(figures["files"]) > 1:
        console.print("all files are of one split, so no leaks were looked for; --compare files does", markup=False)
    for kind in ("faults", "warnings"):
        counts = ", ".join(f"{reason} {count}" for reason, count in figures[kind].items())
        console.print(f"{kind}: {counts or 'none'}", markup=False)
    _print_faults(figures, summary, output_dir)
    console.print(page_line(output_dir / "report.html"), markup=False, soft_wrap=True)


def _print_faults(figures: dict[str, Any], summary: AuditSummary, output_dir: Path) -> None:
    first = [summary.examples[reason][0] for reason in figures["faults"]][:SHOWN_FAULTS]
    for finding in first:
        text = f"{finding['source_file']}:{finding['line']}: {finding['reason']}: {finding['message']}"
        console.print(f"  {escape(text.encode('utf-8', 'backslashreplace').decode())}")
    if sum(figures["faults"].values()) > len(first):
        console.print(f"  the first of each kind; all are in {output_dir / 'faults.jsonl'}", markup=False)
    if figures["tasks"].get("unknown", {}).get("rows") == figures["rows"]:
        console.print("no row is of a known task; jobs/prepare.py turns raw corpora into manifests", markup=False)


def _print_result(
    figures: dict[str, Any], summary: AuditSummary, fix: Path | None, fix_summary: FixSummary | None, output_dir: Path
) -> None:
    """Print what ``--fix`` wrote.

    Raises:
        RunError: There are faults and ``--fix`` is not set, or it has no row left to write.
    """
    count = f"{sum(figures['faults'].values())} fault(s) in {figures['rows_with_faults']} of {figures['rows']} row(s)"
    if fix and not fix_summary:
        raise RunError(f"--fix {fix}: {count}, none is left to write; they are listed in {output_dir / 'faults.jsonl'}")
    if fix_summary:
        message = f"{fix}: {fix_summary.num_rows} row(s) written, {figures['rows_with_faults']} with faults left out"
        message += f"; {fix_summary.num_moved} audio path(s) made absolute" if fix_summary.num_moved else ""
        message += (
            f"; {fix_summary.num_renamed} id(s) that another input has as well renamed"
            if fix_summary.num_renamed
            else ""
        )
        console.print(message, markup=False)
    elif summary.faults:
        raise RunError(f"{count}, listed in {output_dir / 'faults.jsonl'}; --fix writes the rest")
