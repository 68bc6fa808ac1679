"""The lock file of a folder that prefetch fills: what was asked, what came of it, and how to tell that it still holds.

::

    {"format": 1, "voxray": "0.1.0", "steps": {
       "model":    {"asked": {...}, "commit": "...", "sources": [...], "files": [{"path", "bytes", "sha256"}, ...],
                    "done": "2026-11-28T14:37:08+00:00"},
       "corpus":   ..., "data": ..., "features": ...}}

Paths below the folder are relative to it, so that the folder can be carried elsewhere; ``sources`` are the files that
came from elsewhere. A step stands in the file from its begin on, with the commit it settled for, so that one that is
cut off goes on with the same revision; ``done`` says that it ended.
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

NAME = "prefetch.lock.json"
FORMAT = 1
Described = dict[str, Any]


class Lock:
    """The lock file of one folder, written whenever something changes.

    Args:
        folder: The folder.
    Raises:
        RunError: The file is damaged, or of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self._steps: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self._steps, found = dict(stored["steps"]), stored["format"]
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{self.path}: damaged; delete it to check and fetch everything again") from None
            if found != FORMAT:
                raise RunError(f"{self.path}: of format {found}, which this version of voxray does not read")

    def step(self, name: str) -> dict[str, Any]:
        """What is known of a step, {} if it never began."""
        return self._steps.get(name, {})

    def is_done(self, name: str) -> bool:
        return "done" in self.step(name)

    def changed(self, name: str, asked: Mapping[str, Any]) -> str:
        """In what a finished step was asked for other things, for a message; "" if in nothing."""
        before = self.step(name).get("asked", {}) if self.is_done(name) else {}
        now = json.loads(json.dumps(asked))
        changes = [key for key in now if key in before and before[key] != now[key]]
        return ", ".join(f"--{key} (was {_shown(before[key])}, now {_shown(now[key])})" for key in changes)

    def is_other(self, name: str, asked: Mapping[str, Any]) -> bool:
        """Whether a step began with other settings and never ended; what it left is then of no use."""
        return bool(self.step(name)) and self.step(name)["asked"] != json.loads(json.dumps(asked))

    def begin(self, name: str, asked: Mapping[str, Any], **facts: Any) -> None:
        """Note that a step is under way."""
        self._steps[name] = {"asked": dict(asked), **facts}
        self._write()

    def finish(self, name: str, **facts: Any) -> None:
        """Note what came of a step."""
        self._steps[name] |= {**facts, "done": datetime.now(UTC).isoformat(timespec="seconds")}
        self._write()

    def forget(self, *names: str) -> None:
        """Take steps out, as if they had never been."""
        for name in names:
            self._steps.pop(name, None)
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"format": FORMAT, "voxray": __version__, "steps": self._steps})


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value) or "none"


def describe(path: Path, base: Path, known: Sequence[Described] = ()) -> Described:
    """A file's path below ``base``, size, time and checksum.

    Args:
        known: Earlier descriptions; a file of the same size and time as there is not read again.
    """
    status, name = path.stat(), path.relative_to(base).as_posix()
    here = {"path": name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    for entry in known:
        if {key: entry.get(key) for key in here} == here:
            return dict(entry)
    return {**here, "sha256": checksum(path)}


def describe_many(paths: Iterable[Path], base: Path) -> Described:
    """Too many files to list: their number, size, and a hash over their paths and sizes."""
    entries = sorted((path.relative_to(base).as_posix(), path.stat().st_size) for path in paths)
    listing = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    return {"files": len(entries), "bytes": sum(size for _, size in entries), "listing_sha256": listing}


def damaged(files: Iterable[Described], base: Path, *, verify: bool) -> list[str]:
    """Paths of described files that are missing or are not what they were.

    Args:
        verify: Read them all; else a file of the right size is taken for good.
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


def changed_source(sources: Iterable[Described], base: Path, *, verify: bool) -> str:
    """Which of the described files outside the folder is another one by now, for a message; "" if none.

    A base that is gone, as it is on the machine that the folder was carried to, is no change.

    Args:
        verify: Read them all; else one of the same size and time is taken for the same.
    """
    if not base.is_dir():
        return ""
    for entry in sources:
        path = base / entry["path"]
        if not path.is_file():
            return f"{path} is gone"
        if describe(path, base, () if verify else [entry])["sha256"] != entry["sha256"]:
            return f"{path} is not what it was"
    return ""


def refuse_changes(folder: Path, changes: str) -> None:
    """
    Raises:
        SettingsError: There are changes.
    """
    if changes:
        advice = "use --overwrite or another --output_dir"
        raise SettingsError(f"{folder} was filled with other settings or sources: {changes}; {advice}")
