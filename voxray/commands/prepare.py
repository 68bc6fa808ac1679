"""The prepare job: turns a corpus into manifests, with a ledger of dropped rows and a summary."""

import glob
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from voxray.audio.quality import QualityLimits
from voxray.cluster.actor_pool import MIN_ACTORS
from voxray.cluster.session import ray_session
from voxray.commands.next_steps import after_prepare
from voxray.config.prepare import PrepareSettings, TableFlags
from voxray.core.console import console, progress_bar
from voxray.core.errors import RunError, SettingsError, is_utf8_text
from voxray.core.storage import write_json
from voxray.core.units import format_duration
from voxray.corpora.importers import IMPORTERS, ImportedRow, ImportFault, detect, huggingface
from voxray.corpora.importers.table import CorpusTable, TableOptions
from voxray.corpora.importers.table_columns import HEADINGS
from voxray.corpora.importers.table_file import SUFFIXES
from voxray.corpora.prepare.advice import advice, split_advice
from voxray.corpora.prepare.check_rows import ClipFolders, Limits, RowChecker, run_checks, spool
from voxray.corpora.prepare.write_manifests import OutputFiles, PrepareOutcome, write_manifests
from voxray.corpora.select import RowStream
from voxray.runs.lease import output_lease
from voxray.runs.run_folder import check_output_files, make_folder, resolve_output_dir

REFUSING = ("refuse", "scripted")
"""Values of --leaks with which leaks end the job."""


def run_prepare_job(
    settings: PrepareSettings,
    *,
    select: Callable[[RowStream], RowStream] = lambda rows: rows,
    work_dir: Path | None = None,
    use_ray: bool = True,
    trains_next: bool = False,
) -> PrepareOutcome:
    """Read, check, split and write a corpus.

    Args:
        select: Filters the imported rows before they are checked.
        work_dir: Folder for checked rows. An interrupted job leaves it to the next job with the same corpus, limits and
            ``select``. By default a temporary folder.
        use_ray: Whether to check in Ray Data processes; False checks in this process.
        trains_next: The caller trains on the rows. It needs training rows, and prints its own commands.
    Raises:
        RunError: The corpus cannot be read, it has no usable row, or (``--leaks refuse``) the split leaks.
        SettingsError: An output path cannot be used.
    """
    names = ("train_output", "val_output", "test_output", "quarantine", "audio_output")
    outputs = {
        name: resolve_output_dir(path, settings.storage_path, flag=f"--{name}")
        for name in names
        if (path := getattr(settings, name))
    }
    train = outputs["train_output"]
    ledger = outputs.get("quarantine", train.with_name("quarantine.jsonl"))
    files = {f"--{name}": path for name, path in outputs.items() if name != "audio_output"} | {"--quarantine": ledger}
    check_output_files(files, settings.input)
    with output_lease(train, "--train_output"), output_lease(ledger, "--quarantine"):
        outcome = _prepare(settings, outputs, ledger, select, work_dir, use_ray=use_ray, trains_next=trains_next)
    for line in after_prepare(train, outputs.get("val_output")) if not trains_next else ():
        console.print(line, markup=False)
    return outcome


def _prepare(
    settings: PrepareSettings,
    outputs: dict[str, Path],
    ledger: Path,
    select: Callable[[RowStream], RowStream],
    work_dir: Path | None,
    *,
    use_ray: bool,
    trains_next: bool,
) -> PrepareOutcome:
    """``run_prepare_job`` with absolute output paths."""
    train, audio = outputs["train_output"], outputs.pop("audio_output", None)
    for path in (*outputs.values(), ledger):
        make_folder(path.parent)
    imported = chain.from_iterable(_rows(Path(item), settings) for item in settings.input)
    rows = (_with_language(row, settings.language) for row in select(imported))
    prefix = f".prepare-{train.name}-"
    for leftover in train.parent.glob(f"{glob.escape(prefix)}*"):  # of a killed job, since this one holds the lease
        shutil.rmtree(leftover, ignore_errors=True)
    work = work_dir or Path(tempfile.mkdtemp(prefix=prefix, dir=train.parent))
    finished = False
    try:
        with progress_bar("reading"):
            paths = spool(rows, work, settings.rows_per_chunk)
        if not paths:
            raise RunError(f"--input {', '.join(settings.input)}: no row in it")
        checker = RowChecker(
            _limits(settings),
            ClipFolders(train.parent / f"{train.stem}.clips", copies=audio, manifest_folder=train.parent),
        )
        session = ray_session(train.parent / "ray.log", max(MIN_ACTORS, settings.num_actors))
        with session if use_ray else nullcontext(), progress_bar("checking") as bar:
            run_checks(paths, checker, num_actors=settings.num_actors, use_ray=use_ray, on_progress=bar.update)
        files = OutputFiles(train, outputs.get("val_output"), ledger, outputs.get("test_output"))
        outcome = _write(settings, paths, files, needs_train=trains_next)
        finished = True
    finally:
        if finished or not work_dir:
            shutil.rmtree(work, ignore_errors=True)
    _write_summary(settings, outcome, train, ledger)
    _refuse_leaks(settings, outcome)
    if not outcome.is_usable(needs_train=trains_next):
        first = f"; the first fault: {outcome.first_fault}" if outcome.first_fault else ""
        raise RunError(f"--input {', '.join(settings.input)}: no usable row, the reasons are in {ledger}{first}")
    return outcome


def _rows(path: Path, settings: PrepareSettings) -> Iterator[ImportedRow | ImportFault]:
    """Import the rows of one input. What was guessed about a table is printed first.

    Raises:
        RunError: The input is missing, or its format is unknown or cannot be read.
        SettingsError: A flag is given that is not for this format.
    """
    if not is_utf8_text(str(path)):
        raise RunError(f"--input {str(path)!a}: its name is not UTF-8; rename it, with convmv for one")
    if not path.exists():
        raise RunError(f"--input {path}: no such file or folder")
    options = _table_options(settings)
    try:
        name = settings.format
        if name == "auto":
            name = "table" if options.any_set and path.suffix.lower() in SUFFIXES else detect(path)
        if name == "table":
            table = CorpusTable(path, options)
            console.print(table.description, markup=False)
            yield from table.rows()
            return
        columns = {f"{kind}_column": kind for kind in huggingface.COLUMNS} if name == "huggingface" else {}
        flags = [flag for flag in TableFlags.model_fields if getattr(settings, flag) and flag not in columns]
        if not flags:
            chosen = {kind: getattr(settings, flag) for flag, kind in columns.items()}
            yield from huggingface.rows(path, chosen) if columns else IMPORTERS[name](path)
            return
    except (OSError, ValueError) as error:
        raise RunError(f"--input {path}: {error}") from None
    names = " ".join(f"--{flag}" for flag in flags)
    raise SettingsError(f"{names}: only for tables ({', '.join(SUFFIXES)}), and {path} is of format {name}")


def _with_language(row: ImportedRow | ImportFault, language: str) -> ImportedRow | ImportFault:
    """The row, with ``--language`` if it names none."""
    if not language or isinstance(row, ImportFault) or row.values.get("language"):
        return row
    return replace(row, values={**row.values, "language": language})


def _table_options(settings: PrepareSettings) -> TableOptions:
    columns = {kind: getattr(settings, f"{kind}_column") for kind in HEADINGS}
    return TableOptions(columns, settings.encoding, settings.sheet, settings.audio_dir, settings.language)


def _limits(settings: PrepareSettings) -> Limits:
    shared = set(QualityLimits.__dataclass_fields__) & set(PrepareSettings.model_fields)
    quality = QualityLimits(**{name: getattr(settings, name) for name in shared})
    names = set(Limits.__dataclass_fields__) - {"quality"}
    return Limits(quality=quality, **{name: getattr(settings, name) for name in names})


def _write(settings: PrepareSettings, paths: list[Path], outputs: OutputFiles, *, needs_train: bool) -> PrepareOutcome:
    """Split the checked rows and write the manifests; without usable rows or with refused leaks, only the ledger."""
    keep = False
    try:
        outcome = write_manifests(
            paths,
            outputs,
            val_share=settings.val_share if settings.val_output else None,
            with_test=bool(settings.test_output),
            seed=settings.seed,
            duplicates=settings.duplicates,
            leak_policy=settings.leaks,
        )
        keep = not (settings.leaks in REFUSING and outcome.leaks) and outcome.is_usable(needs_train=needs_train)
    finally:
        outputs.finish(keep=keep)
    return outcome


def _write_summary(settings: PrepareSettings, outcome: PrepareOutcome, train: Path, ledger: Path) -> None:
    """Write prepare_summary.json and print it as a table."""
    dropped = outcome.tally.as_dict()
    total = {"rows": sum(outcome.tally.rows.values()), "hours": round(sum(outcome.tally.seconds.values()) / 3600, 4)}
    names = ("train", "val", *(["test"] if settings.test_output else []))
    splits = {name: dropped.pop(name, {"rows": 0, "hours": 0.0}) for name in names}
    summary: dict[str, Any] = {"input": total, **splits, "quarantined": dropped, "leaks": vars(outcome.leaks)}
    summary["transcript_notes"] = dict(outcome.notes.most_common())
    summary["mixed_channels"] = outcome.num_mixed
    write_json(train.with_name("prepare_summary.json"), {**summary, "settings": settings.model_dump(mode="json")})
    table = Table(title="prepare", title_justify="left")
    table.add_column("")
    for name in ("rows", "audio"):
        table.add_column(name, justify="right")
    seconds = outcome.tally.seconds
    table.add_row("input", str(total["rows"]), format_duration(sum(seconds.values())))
    for outcome_name in (*splits, *dropped):
        shown = outcome_name if outcome_name in splits else f"left out: {outcome_name}"
        row_count = outcome.tally.rows[outcome_name]
        table.add_row(shown, str(row_count), format_duration(seconds.get(outcome_name, 0.0)))
    console.print(table)
    sentences = advice(dropped, total["rows"], outcome.short_secs, settings.min_sec)
    for sentence in (*sentences, *split_advice(outcome.other_splits)):
        console.print(sentence, markup=False)
    if settings.val_output and splits["train"]["rows"] and not splits["val"]["rows"]:
        console.print("no row is left for validation: all rows are of one speaker or session, which stays on one side")
    if splits["train"]["rows"] and sum(split["rows"] for split in splits.values()) > splits["train"]["rows"]:
        console.print(f"leaks between the splits: {outcome.leaks if outcome.leaks else 'none'}")
    if outcome.notes:
        counts = ", ".join(f"{note} {num_rows}" for note, num_rows in outcome.notes.most_common())
        console.print(f"rows with transcript_notes: {counts}", markup=False)
    if outcome.num_mixed:
        console.print(
            f"{outcome.num_mixed} row(s) average the channels of a recording of which other rows take one channel; if "
            "its channels are different speakers, give these rows a channel"
        )
    if dropped:
        console.print(f"every row left out is in {ledger}", markup=False)


def _refuse_leaks(settings: PrepareSettings, outcome: PrepareOutcome) -> None:
    leaks = outcome.leaks
    if settings.leaks in REFUSING and leaks:
        flags = "--leaks drop leaves those training rows out, --leaks allow keeps them"
        if leaks.text and not leaks.audio and not leaks.speaker:
            flags += ", and --leaks scripted is for a corpus in which several speakers read the same sentences"
        held_out = "validation and test" if outcome.tally.rows["test"] else "validation"
        raise RunError(f"the {held_out} rows leak into training ({leaks}); {flags}")
