"""The lock file of a prefetch folder: the requested settings, the results, and checksums to verify them later.

::

    {"format": 1, "voxray": "0.1.0", "steps": {
       "model":    {"asked": {...}, "commit": "...", "sources": [...], "files": [{"path", "bytes", "sha256"}, ...],
                    "done": "2026-11-28T14:37:08+00:00"},
       "corpus":   ..., "data": ..., "features": ...}}

Paths below the folder are relative to it, so that the folder can be moved. ``sources`` are input files outside the
folder. A step is in the file from its start on, with the commit that it resolved, so that an interrupted step resumes
with the same revision. ``done`` is the time at which it finished.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import checksum, write_json
from voxray.core.version import __version__
from voxray.models.hf_files import LOCK_FILE_NAME

FORMAT = 1
FileDescription = dict[str, Any]


class LockFile:
    """The lock file of one folder, written at every change.

    Raises:
        RunError: The file is damaged, or has another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK_FILE_NAME
        self._steps: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self._steps, format_ = dict(stored["steps"]), stored["format"]
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{self.path}: damaged; delete it to check and fetch everything again") from None
            if format_ != FORMAT:
                raise RunError(f"{self.path}: of format {format_}, which this version of voxray does not read")

    def step(self, name: str) -> dict[str, Any]:
        """Entry of a step, {} if it never started."""
        return self._steps.get(name, {})

    def is_done(self, name: str) -> bool:
        return "done" in self.step(name)

    def changed(self, name: str, requested: Mapping[str, Any]) -> str:
        """Differences between a finished step's settings and the requested ones, for a message; "" if none."""
        previous = self.step(name).get("asked", {}) if self.is_done(name) else {}
        current = json.loads(json.dumps(requested))
        changes = [key for key in current if key in previous and previous[key] != current[key]]
        return ", ".join(f"--{key} (was {_show(previous[key])}, now {_show(current[key])})" for key in changes)

    def is_other(self, name: str, requested: Mapping[str, Any]) -> bool:
        """Whether a step was started with other settings, so that unfinished results are of no use."""
        return bool(self.step(name)) and self.step(name)["asked"] != json.loads(json.dumps(requested))

    def begin(self, name: str, requested: Mapping[str, Any], **facts: Any) -> None:
        """Record that a step has started."""
        self._steps[name] = {"asked": dict(requested), **facts}
        self._write()

    def finish(self, name: str, **facts: Any) -> None:
        """Record the results of a step."""
        self._steps[name] |= {**facts, "done": datetime.now(UTC).isoformat(timespec="seconds")}
        self._write()

    def forget(self, *names: str) -> None:
        """Delete the entries of steps."""
        for name in names:
            self._steps.pop(name, None)
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"format": FORMAT, "voxray": __version__, "steps": self._steps})


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value) or "none"


def describe_file(path: Path, base: Path, known: Sequence[FileDescription] = ()) -> FileDescription:
    """Path below ``base``, size, modification time and checksum of a file.

    Args:
        known: Earlier descriptions. A file with the path, size and time of one of them is not read again.
    """
    status, name = path.stat(), path.relative_to(base).as_posix()
    state = {"path": name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    for entry in known:
        if {key: entry.get(key) for key in state} == state:
            return dict(entry)
    return {**state, "sha256": checksum(path)}


def summarize_files(paths: Iterable[Path], base: Path) -> FileDescription:
    """Number, total size and a hash of the paths and sizes of files that are too many to list."""
    entries = sorted((path.relative_to(base).as_posix(), path.stat().st_size) for path in paths)
    listing = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return {"files": len(entries), "bytes": sum(size for _, size in entries), "listing_sha256": listing}


def damaged(files: Iterable[FileDescription], base: Path, *, verify: bool) -> list[str]:
    """Paths of described files that are missing or have changed.

    Args:
        verify: Compare checksums; otherwise only sizes.
    """
    bad = []
    for entry in files:
        path = base / entry["path"]
        if (
            not path.is_file()
            or path.stat().st_size != entry["bytes"]
            or (verify and checksum(path) != entry["sha256"])
        ):
            bad.append(entry["path"])
    return bad


def changed_source(sources: Iterable[FileDescription], base: Path, *, verify: bool) -> str:
    """Message about the first described source file that has changed; "" if none has.

    A missing base folder is no change: the prefetch folder may have been moved to another machine.

    Args:
        verify: Compare checksums; otherwise a file of the same size and time counts as unchanged.
    """
    if not base.is_dir():
        return ""
    for entry in sources:
        path = base / entry["path"]
        if not path.is_file():
            return f"{path} is gone"
        if describe_file(path, base, () if verify else [entry])["sha256"] != entry["sha256"]:
            return f"{path} is not what it was"
    return ""


def refuse_changes(folder: Path, changes: str) -> None:
    """Refuse to fill a folder that was filled with other settings or sources.

    Raises:
        SettingsError: ``changes`` is not empty.
    """
    if changes:
        advice = "use --overwrite or another --output_dir"
        raise SettingsError(f"{folder} was filled with other settings or sources: {changes}; {advice}")
