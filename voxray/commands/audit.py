"""The audit job: from checked settings to report, figures, lists of findings and, if asked for, the clean part."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from voxray.audio.quality import QualityLimits
from voxray.audit.findings import UNITS, Audit, AuditSummary, Numbers, Splits, assign_splits, write_findings
from voxray.audit.fix import Fixed, check_fix_path, write_clean
from voxray.audit.measure_rows import AuditLimits, Measurements, measure_manifests, plan_chunks
from voxray.audit.report import write_report
from voxray.cluster.actor_pool import MIN_ACTORS
from voxray.cluster.session import ray_session
from voxray.config.audit import AuditSettings
from voxray.core.console import console, progress_bar
from voxray.core.errors import RunError
from voxray.core.storage import write_json
from voxray.models.interface import FrontEnd
from voxray.models.registry import get_family
from voxray.runs.run_folder import make_folder, resolve_output_dir

SHOWN_FAULTS = 12


def run_audit_job(settings: AuditSettings, *, use_ray: bool = True) -> dict[str, Any]:
    """Audit manifests.

    Args:
        use_ray: False measures in this process.
    Returns:
        The figures, as they stand in audit.json.
    Raises:
        RunError: There are faults and no ``--fix`` to leave them out, or it leaves nothing; or an input cannot be read.
        SettingsError: An output cannot be placed.
    """
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    fix = resolve_output_dir(settings.fix, settings.storage_path, flag="--fix") if settings.fix else None
    if fix:
        check_fix_path(fix, settings.input)
    plan_chunks(settings.input, output_dir, settings.rows_per_chunk)  # a missing file is told before a folder is made
    model_id, trim_audio = settings.model_id, settings.trim_audio_tokens
    front_end = get_family(model_id).front_end(model_id, trim_audio=trim_audio) if model_id else None
    if not front_end and "max_len" in settings.model_fields_set:
        console.print("--max_len is not checked: tokens can be counted only with --model_id", markup=False)
    make_folder(output_dir)
    if fix:
        make_folder(fix.parent, "--fix")
    work = Path(tempfile.mkdtemp(prefix=".audit-", dir=output_dir))
    try:
        measurements = _measure(settings, front_end, work, output_dir, use_ray=use_ray)
        length = "num_tokens" if front_end else "num_chars"
        sides = assign_splits(settings.input, settings.compare)
        audit = Audit(measurements, sides, length=length, spread=settings.outlier_spread)
        found = write_findings(audit, output_dir, settings.max_examples)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    some_clean = sum(audit.rows.values()) > found.num_bad
    fixed = write_clean(settings.input, found.bad_lines, fix) if fix and some_clean else None
    figures = audit_figures(settings, audit, found, fixed)
    write_json(output_dir / "audit.json", figures)
    write_report(output_dir, figures, audit.numbers, found.examples)
    _summarise(figures, found, output_dir)
    _end(figures, found, fix, fixed, output_dir)
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


def audit_figures(settings: AuditSettings, audit: Audit, found: AuditSummary, fixed: Fixed | None) -> dict[str, Any]:
    """All figures of an audit.

    Raises:
        RunError: There is no row at all.
    """
    if not audit.rows:
        raise RunError(f"--input {', '.join(settings.input)}: no row, every line is blank")
    by_file, by_task = _totals(audit, 0), _totals(audit, 1)
    tokens = ["num_tokens"] if settings.model_id else []
    names = ["duration_sec", *tokens, "num_chars", "num_bytes", "chars_per_sec"]
    files = [
        {"path": path, "side": _side(audit.sides, number), **by_file[number], "bad": len(found.bad_lines[number])}
        for number, path in enumerate(settings.input)
    ]
    tasks = {
        task or "unknown": total | {name: audit.numbers[task].summary(name) for name in names if task in audit.numbers}
        for task, total in sorted(by_task.items())
    }
    num_rows = sum(audit.rows.values())
    return {
        "rows": num_rows,
        "rows_with_faults": found.num_bad,
        "rows_with_warnings": found.num_warned,
        "clean_rows": num_rows - found.num_bad,
        "hours": round(sum(audit.seconds.values()) / 3600, 4),
        "length_unit": "tokens" if settings.model_id else "characters and bytes",
        "model_id": settings.model_id,
        "max_len": settings.max_len if settings.model_id else None,
        "files": files,
        "tasks": tasks,
        "all": {name: _all(audit).summary(name) for name in names},
        "faults": dict(found.faults.most_common()),
        "warnings": dict(found.warnings.most_common()),
        "fixed": vars(fixed) if fixed else None,
        "settings": settings.model_dump(mode="json"),
    }


def _totals(audit: Audit, part: int) -> dict[Any, dict[str, Any]]:
    """Rows, usable rows and hours by file (part 0) or task (part 1)."""
    keys = dict.fromkeys(cell[part] for cell in audit.rows) if part else range(len(audit.sides.of_file))
    totals: dict[Any, dict[str, Any]] = {}
    for key in keys:
        cells = [cell for cell in audit.rows if cell[part] == key]
        seconds = sum(audit.seconds[cell] for cell in cells)
        rows, usable = (sum(counts[cell] for cell in cells) for counts in (audit.rows, audit.usable))
        totals[key] = {"rows": rows, "usable": usable, "hours": round(seconds / 3600, 4)}
    return totals


def _all(audit: Audit) -> Numbers:
    numbers = Numbers()
    for task in audit.numbers.values():
        for name, values in numbers.values.items():
            values.extend(task.values[name])
    return numbers


def _side(sides: Splits, number: int) -> str:
    return sides.names[sides.of_file[number]] if len(set(sides.of_file)) > 1 else ""


def _summarise(figures: dict[str, Any], found: AuditSummary, output_dir: Path) -> None:
    table = Table(title="audit", title_justify="left")
    length = "num_tokens" if figures["model_id"] else "num_chars"
    for name in ("task", "rows", "hours", f"{UNITS[length]} p50", "p95", "max", "sec p50", "max"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, entry in figures["tasks"].items():
        lengths, seconds = entry.get(length, {}), entry.get("duration_sec", {})
        cells = [lengths.get(name) for name in ("p50", "p95", "max")] + [seconds.get(name) for name in ("p50", "max")]
        shown = ["" if value is None else f"{value:g}" for value in cells]
        table.add_row(task, str(entry["rows"]), f"{entry['hours']:.3f}", *shown)
    console.print(table)
    if not figures["model_id"]:
        console.print("lengths are in characters (bytes in the report): no --model_id, so no tokens were counted")
    sides: dict[str, list[str]] = {}
    for file in figures["files"]:
        sides.setdefault(file["side"], []).append(Path(file["path"]).name)
    if len(sides) > 1:
        shown = " | ".join(f"{side}: {', '.join(names)}" for side, names in sides.items())
        console.print(f"leaks were looked for between {shown}", markup=False)
    elif len(figures["files"]) > 1:
        console.print("all files are of one side, so no leaks were looked for; --compare files does", markup=False)
    for kind in ("faults", "warnings"):
        counts = ", ".join(f"{reason} {count}" for reason, count in figures[kind].items())
        console.print(f"{kind}: {counts or 'none'}", markup=False)
    _show_faults(figures, found, output_dir)
    console.print(f"report: {output_dir / 'report.html'}", markup=False)


def _show_faults(figures: dict[str, Any], found: AuditSummary, output_dir: Path) -> None:
    first = [found.examples[reason][0] for reason in figures["faults"]][:SHOWN_FAULTS]
    for finding in first:
        text = f"{finding['source_file']}:{finding['line']}: {finding['reason']}: {finding['message']}"
        console.print(f"  {escape(text.encode('utf-8', 'backslashreplace').decode())}")
    if sum(figures["faults"].values()) > len(first):
        console.print(f"  the first of each kind; all are in {output_dir / 'faults.jsonl'}", markup=False)
    if figures["tasks"].get("unknown", {}).get("rows") == figures["rows"]:
        console.print("no row is of a known task; jobs/prepare.py turns raw corpora into manifests", markup=False)


def _end(figures: dict[str, Any], found: AuditSummary, fix: Path | None, fixed: Fixed | None, output_dir: Path) -> None:
    """Say how it ends.

    Raises:
        RunError: With faults that no ``--fix`` left out, or no row left.
    """
    count = f"{sum(figures['faults'].values())} fault(s) in {figures['rows_with_faults']} of {figures['rows']} row(s)"
    if fix and not fixed:
        raise RunError(f"--fix {fix}: {count}, none is left to write; they are listed in {output_dir / 'faults.jsonl'}")
    if fixed:
        told = f"{fix}: {fixed.num_rows} row(s) written, {figures['rows_with_faults']} with faults left out"
        told += f"; {fixed.num_moved} audio path(s) made absolute" if fixed.num_moved else ""
        told += f"; {fixed.num_renamed} id(s) that another input has as well renamed" if fixed.num_renamed else ""
        console.print(told, markup=False)
    elif found.faults:
        raise RunError(f"{count}, listed in {output_dir / 'faults.jsonl'}; --fix writes the rest")
