"""A folder of results behind a URL: the job works on a copy on this machine's disk and keeps the URL up to date.

An object store has no files to append to and no folders to rename, so runs and evaluations are written to a working
copy and uploaded from there: after every checkpoint, and at the end. A checkpoint counts at the URL once its last file,
``progress.json``, is there; older ones go only then. So a kill in the middle of an upload loses nothing, and another
machine goes on from the newest checkpoint that is whole.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from voxray.config.flag_groups import OutputFlags
from voxray.core.errors import RunError, one_line
from voxray.core.storage import CacheLimits, RemotePath, move_into_place, remote_path
from voxray.runs.layout import CHECKPOINTS_FOLDER, PROGRESS_FILE, list_checkpoints
from voxray.runs.run_folder import GROW_FILE, STOP_FILE, output_url, resolve_output_dir, working_copy

STAYS_HERE = {"features", "ray", "model", "manifests", "error.json", STOP_FILE, GROW_FILE}
"""What is not mirrored: shards have a place of their own at the URL, the rest matters to this machine only."""
SIGNALS = (STOP_FILE, GROW_FILE)
LOOK_SEC = 3.0


@dataclass
class RemoteSync:
    """A working copy and its URL; without a URL every call does nothing.

    Attributes:
        folder: The working copy, on the same path on every machine.
        place: The URL.
    """

    folder: Path
    place: RemotePath | None
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict, init=False)

    @classmethod
    def from_settings(cls, settings: OutputFlags) -> "RemoteSync":
        """The place of a job's results, as its settings have it.

        Raises:
            SettingsError: No file system is known for the URL, or it carries a password.
        """
        folder = resolve_output_dir(settings.output_dir, settings.storage_path, is_mirrored=True)
        url = output_url(settings.output_dir, settings.storage_path)
        if not url:
            return cls(folder, None)
        flag = "--output_dir" if "://" in settings.output_dir else "--storage_path"
        return cls(folder, remote_path(url, flag, CacheLimits(str(folder / "features"), 0)))

    @property
    def features_url(self) -> str:
        """Where the feature shards of these results belong, if nothing else is said; "" without a URL."""
        if self.place is None:
            return ""
        base, question, options = self.place.root.partition("?")
        return f"{base.rstrip('/')}/features{question}{options}"

    def fetch(self) -> None:
        """Bring the working copy up to date, unless it is ahead: a killed job may not have uploaded its last steps.

        Raises:
            RunError: The URL cannot be read.
        """
        if self.place is None:
            return
        try:
            there = {name for name in self.place.walk() if _is_mirrored(name)}
            whole = _whole_checkpoints(there)
            newest = max((int(name.rpartition("-")[2]) for name in whole), default=0)
            is_behind = newest > self.newest_step() or not (self.folder / "settings.json").is_file()
            for name in sorted(there, key=lambda name: name.endswith(PROGRESS_FILE)):
                counts = _checkpoint_of(name) in {"", *whole}
                if counts and (is_behind or not (self.folder / name).exists()):
                    _download(self.place / name, self.folder / name)
        except OSError as error:
            raise RunError(f"{self.place}: cannot be read: {one_line(error, 300)}") from None

    def newest_step(self) -> int:
        """Step of the newest checkpoint of the working copy, 0 without one."""
        return max((step for step, _ in list_checkpoints(self.folder)), default=0)

    def push(self) -> None:
        """Upload what is new in the working copy, then forget checkpoints that it no longer has.

        Raises:
            OSError: The URL cannot be written; the next call tries again.
        """
        if self.place is None:
            return
        there = self.place.walk()
        whole = _whole_checkpoints(there)
        for name, path in self._files():
            stat = path.stat()
            now = (stat.st_mtime_ns, stat.st_size)
            if self._sent.get(name) != now and not (_checkpoint_of(name) in whole and name not in self._sent):
                self._upload(name)
            self._sent[name] = now
        kept = {"", *(folder.name for _, folder in list_checkpoints(self.folder))}
        self._delete(name for name in there if _checkpoint_of(name) not in kept)

    def push_files(self, paths: Iterable[Path]) -> None:
        """Upload some files of the working copy, those of them that there are."""
        for path in paths if self.place else ():
            if path.is_file():
                self._upload(str(path.relative_to(self.folder)))

    def _upload(self, name: str) -> None:
        assert self.place is not None
        if (self.folder / name).stat().st_size:
            move_into_place(self.folder / name, self.place / name)
        else:
            (self.place / name).write_bytes(b"")

    def forget(self, folder: str = "") -> None:
        """Delete at the URL what the working copy does not have, of one of its folders or of all."""
        if self.place is not None:
            there = [name for name in self.place.walk() if _is_mirrored(name) and name.startswith(folder)]
            self._delete(name for name in there if not (self.folder / name).exists())

    def _delete(self, names: Iterable[str]) -> None:
        """Delete files at the URL, a checkpoint's last one first, so that none counts that is not whole."""
        assert self.place is not None
        for name in sorted(names, key=lambda name: not name.endswith(PROGRESS_FILE)):
            (self.place / name).unlink()

    def push_or(self, say: Callable[[str], object]) -> None:
        """``push``, and a line instead of an error: training goes on, and what is missing goes with the next one."""
        try:
            self.push()
        except OSError as error:
            say(f"not uploaded yet: {one_line(error, 200)}")

    def push_all(self) -> None:
        """``push`` at the end of a job.

        Raises:
            RunError: The URL cannot be written; everything is still in the working copy.
        """
        try:
            self.push()
        except OSError as error:
            reason = one_line(error, 200)
            raise RunError(f"{self.place}: cannot be written: {reason}; all is in {self.folder}") from None

    def _files(self) -> Iterator[tuple[str, Path]]:
        """What there is to upload, in an order in which nothing counts before it is whole."""
        names = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]
        for name in sorted(filter(_is_mirrored, names), key=lambda name: (name.endswith(PROGRESS_FILE), name)):
            if (path := self.folder / name).is_file():
                yield name, path

    def send_signals(self) -> None:
        """Let workers on other machines know what this one's folder asks of them."""
        for name in SIGNALS if self.place else ():
            if name not in self._sent and (self.folder / name).exists():
                assert self.place is not None
                (self.place / name).write_bytes(b"")
                self._sent[name] = (0, 0)

    def take_back_signals(self) -> None:
        """Before workers start: what was asked of earlier ones is done."""
        for name in SIGNALS if self.place else ():
            assert self.place is not None
            if self._sent.pop(name, None) or (self.place / name).is_file():
                (self.place / name).unlink()

    def hear_signals(self) -> threading.Event:
        """Touch this machine's files as the URL's say, in the background, until the returned event is set.

        What an earlier run left here goes first.
        """
        done = threading.Event()

        def look() -> None:
            for name in SIGNALS:
                (self.folder / name).unlink(missing_ok=True)
            while True:
                for name in SIGNALS:
                    with suppress(OSError):
                        if self.place is not None and (self.place / name).is_file():
                            (self.folder / name).touch()
                if done.wait(LOOK_SEC):
                    return

        if self.place is not None:
            threading.Thread(target=look, daemon=True).start()
        return done


def fetched(url: str, flag: str) -> Path:
    """A working copy of what an earlier job left behind a URL, an adapter say.

    Raises:
        SettingsError, RunError: The URL cannot be used, or read.
    """
    folder = working_copy(url)
    RemoteSync(folder, remote_path(url, flag, CacheLimits(str(folder), 0))).fetch()
    return folder


def _is_mirrored(name: str) -> bool:
    parts = name.split("/")
    return parts[0] not in STAYS_HERE and not any(part.startswith(".") for part in parts)


def _checkpoint_of(name: str) -> str:
    """Folder of the checkpoint that a file belongs to, "" if to none."""
    parts = name.split("/")
    return parts[1] if parts[0] == CHECKPOINTS_FOLDER and len(parts) > 2 else ""


def _whole_checkpoints(names: Iterable[str]) -> set[str]:
    return {
        _checkpoint_of(name) for name in names if name.startswith(CHECKPOINTS_FOLDER) and name.endswith(PROGRESS_FILE)
    }


def _download(remote: RemotePath, target: Path) -> None:
    """Copy a file so that nobody sees a part of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        remote.download(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
