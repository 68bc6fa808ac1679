"""The prepare job: from checked settings to manifests, ledger and summary."""

import shutil
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from voxray.audio.quality import QualityLimits
from voxray.config.prepare import PrepareSettings
from voxray.data.featurize import MIN_ACTORS
from voxray.data.prepare import (
    Limits,
    Outcome,
    Outputs,
    RowChecker,
    run_checks,
    spool,
    write_manifests,
)
from voxray.errors import RunError
from voxray.importers import IMPORTERS, ImportedRow, ImportFault, detect
from voxray.launch import ray_session
from voxray.run_folder import anchor, make_folder
from voxray.storage import write_json
from voxray.terminal import console, progress_bar


def run_prepare_job(settings: PrepareSettings) -> Outcome:
    """Read, check, split and write a corpus.

    Raises:
        RunError: The corpus cannot be read, nothing of it is usable, or (``--leaks refuse``) the split leaks.
        SettingsError: An output cannot be placed.
    """
    train = anchor(settings.train_output, settings.storage_path, flag="--train_output")
    val = anchor(settings.val_output, settings.storage_path, flag="--val_output") if settings.val_output else None
    ledger = train.with_name("quarantine.jsonl")
    if settings.quarantine:
        ledger = anchor(settings.quarantine, settings.storage_path, flag="--quarantine")
    for path in filter(None, (train, val, ledger)):
        make_folder(path.parent)
    rows = chain.from_iterable(_rows(Path(item), settings.format) for item in settings.input)
    work = Path(tempfile.mkdtemp(prefix=".prepare-", dir=train.parent))
    try:
        with progress_bar("reading"):
            paths = spool(rows, work, settings.rows_per_chunk)
        if not paths:
            raise RunError(f"--input {', '.join(settings.input)}: no row in it")
        checker = RowChecker(_limits(settings), train.parent / f"{train.stem}.clips")
        with (
            ray_session(train.parent / "ray.log", max(MIN_ACTORS, settings.num_actors)),
            progress_bar("checking") as bar,
        ):
            run_checks(paths, checker, num_actors=settings.num_actors, use_ray=True, on_progress=bar.update)
        outcome = _write(settings, paths, Outputs(train, val, ledger), with_validation=val is not None)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _summarise(settings, outcome, train, ledger)
    _refuse_leaks(settings, outcome)
    if not outcome.tally.rows["train"]:
        first = f"; the first fault: {outcome.first_fault}" if outcome.first_fault else ""
        raise RunError(f"--input {', '.join(settings.input)}: no usable row, the reasons are in {ledger}{first}")
    return outcome


def _rows(path: Path, name: str) -> Iterator[ImportedRow | ImportFault]:
    """Rows of one input.

    Raises:
        RunError: It is missing, or its format cannot be told or read.
    """
    if not path.exists():
        raise RunError(f"--input {path}: no such file or folder")
    try:
        yield from IMPORTERS[detect(path) if name == "auto" else name].rows(path)
    except (OSError, ValueError) as error:
        raise RunError(f"--input {path}: {error}") from None


def _limits(settings: PrepareSettings) -> Limits:
    shared = set(QualityLimits.__dataclass_fields__) & set(PrepareSettings.model_fields)
    quality = QualityLimits(**{name: getattr(settings, name) for name in shared})
    names = set(Limits.__dataclass_fields__) - {"quality"}
    return Limits(quality=quality, **{name: getattr(settings, name) for name in names})


def _write(settings: PrepareSettings, paths: list[Path], outputs: Outputs, *, with_validation: bool) -> Outcome:
    """Third pass; with a leak that is to be refused only the ledger appears."""
    keep = False
    try:
        outcome = write_manifests(
            paths,
            outputs,
            val_share=settings.val_share if with_validation else None,
            seed=settings.seed,
            duplicates=settings.duplicates,
            leak_policy=settings.leaks,
        )
        keep = not (settings.leaks == "refuse" and outcome.leaks) and bool(outcome.tally.rows["train"])
    finally:
        outputs.finish(keep=keep)
    return outcome


def _summarise(settings: PrepareSettings, outcome: Outcome, train: Path, ledger: Path) -> None:
    kept = outcome.tally.as_dict()
    total = {"rows": sum(outcome.tally.rows.values()), "hours": round(sum(outcome.tally.seconds.values()) / 3600, 4)}
    sides = {name: kept.pop(name, {"rows": 0, "hours": 0.0}) for name in ("train", "val")}
    summary: dict[str, Any] = {"input": total, **sides, "quarantined": kept, "leaks": vars(outcome.leaks)}
    write_json(train.with_name("prepare_summary.json"), {**summary, "settings": settings.model_dump(mode="json")})
    table = Table(title="prepare", title_justify="left")
    table.add_column("")
    for name in ("rows", "hours"):
        table.add_column(name, justify="right")
    for name, entry in {"input": total, **sides, **{f"left out: {key}": value for key, value in kept.items()}}.items():
        table.add_row(name, str(entry["rows"]), f"{entry['hours']:.3f}")
    console.print(table)
    if outcome.leaks:
        console.print(f"leaks between the sides: {outcome.leaks}")
    console.print(f"every row left out is in {ledger}", markup=False)


def _refuse_leaks(settings: PrepareSettings, outcome: Outcome) -> None:
    if settings.leaks == "refuse" and outcome.leaks:
        advice = "--leaks drop leaves those training rows out, --leaks allow keeps them"
        raise RunError(f"the validation rows leak into training ({outcome.leaks}); {advice}")
