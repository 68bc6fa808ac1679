"""SALMONN's annotation files, given where manifests are."""

from collections.abc import Sequence
from pathlib import Path

from voxray.errors import RunError
from voxray.importers import ImportFault, detect, salmonn
from voxray.storage import to_jsonl, write_atomically
from voxray.terminal import console


def as_manifests(paths: Sequence[str], folder: Path, prefix: str = "") -> tuple[str, ...]:
    """Write a manifest for each ``{"annotation": [...]}`` file; other paths stay as they are.

    Rows that cannot be read stand in ``<manifest>.quarantine.jsonl`` beside it.

    Args:
        folder: Where manifests are written.
        prefix: Folder below which the audio stands, however the file names it.
    Raises:
        RunError: A file cannot be read, or has no usable row.
    """
    return tuple(
        _manifest(Path(path), folder, prefix) if path.endswith(".json") and detect(path) == "salmonn" else path
        for path in paths
    )


def _manifest(path: Path, folder: Path, prefix: str) -> str:
    rows, faults = [], []
    try:
        for entry in salmonn.rows(path, prefix):
            if isinstance(entry, ImportFault):
                line = {"source": f"{path}:{entry.line}", "id": entry.id}
                faults.append({**line, "reason": entry.reason, "message": entry.message})
            else:
                rows.append({"id": entry.id, **entry.values})
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}") from None
    target = folder / f"{path.stem}.jsonl"
    ledger = target.with_suffix(".quarantine.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(ledger, to_jsonl(faults))
    if not rows:
        raise RunError(f"{path}: no usable row; the reasons are in {ledger}")
    if faults:
        console.print(f"{len(faults)} row(s) of {path} left out, listed in {ledger}", markup=False)
    write_atomically(target, to_jsonl(rows))
    return str(target)
