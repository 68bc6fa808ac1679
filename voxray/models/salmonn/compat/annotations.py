"""SALMONN's annotation files in place of manifests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxray.core.console import console
from voxray.core.errors import RunError
from voxray.core.storage import to_jsonl, write_atomically
from voxray.corpora.importers import ImportFault, detect, salmonn

MANIFESTS = "manifests"
"""Folder in a job's output that the manifests are written to."""


def as_manifests(paths: Sequence[str], folder: Path, prefix: str = "", *, needs_text: bool = True) -> tuple[str, ...]:
    """Write a manifest for each ``{"annotation": [...]}`` file.

    Rows that cannot be read are listed in a file beside the manifest (see ``ledger_path``).

    Args:
        paths: Annotation files and manifests.
        folder: Folder that manifests are written to.
        prefix: Folder that the audio paths in the files are relative to, even absolute ones.
        needs_text: Whether rows without text are faults (see ``corpora.importers.salmonn.rows``).
    Returns:
        The paths, with manifests in place of annotation files.
    Raises:
        RunError: A file cannot be read, or has no usable row.
    """
    manifests: dict[str, Path] = {}
    for number, path in enumerate(dict.fromkeys(filter(is_annotation, paths))):
        manifests[path] = folder / f"{Path(path).stem}.jsonl"
        if manifests[path] in list(manifests.values())[:-1]:  # train/a.json and valid/a.json have the same stem
            manifests[path] = folder / str(number) / manifests[path].name
        _write(Path(path), manifests[path], prefix, needs_text)
    return tuple(str(manifests.get(path, path)) for path in paths)


def is_annotation(path: str) -> bool:
    """Whether a path is one of SALMONN's annotation files."""
    return path.endswith(".json") and detect(path) == "salmonn"


def ledger_path(manifest: str | Path) -> Path:
    """File that lists the rows of an annotation file that its manifest omits, with the reasons."""
    return Path(manifest).with_suffix(".quarantine.jsonl")


def _write(path: Path, manifest: Path, prefix: str, needs_text: bool) -> None:
    rows, faults = [], []
    try:
        for entry in salmonn.rows(path, prefix, needs_text=needs_text):
            if isinstance(entry, ImportFault):
                line = {"manifest": str(path), "line": entry.line, "id": entry.id}
                faults.append({**line, "reason": entry.reason, "message": entry.message})
            else:
                rows.append({"id": entry.id, **entry.values})
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {error}") from None
    ledger = ledger_path(manifest)
    manifest.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(ledger, to_jsonl(faults))
    if not rows:
        raise RunError(f"{path}{_first(faults)}; no row is usable, all are listed in {ledger}")
    if faults:
        console.print(f"{len(faults)} row(s) of {path} left out, listed in {ledger}", markup=False)
    write_atomically(manifest, to_jsonl(rows))


def _first(faults: Sequence[dict[str, Any]]) -> str:
    """The first fault, for a message."""
    if not faults:
        return ": holds no row"
    fault = faults[0]
    hint = " (evaluate --mode submission_asr and so on take rows without)" if fault["message"] == "no text" else ""
    return f":{fault['line']}: {fault['id']}: {fault['message']}{hint}"
