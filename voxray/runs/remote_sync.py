"""Results behind a URL: the job works on a local copy of the folder and keeps the URL up to date.

An object store cannot append to files or rename folders, so runs and evaluations are written to a working copy, which
is uploaded after every checkpoint and at the end. A checkpoint at the URL is complete once its last file,
``progress.json``, is there, and older checkpoints are deleted only then. So a kill in the middle of an upload loses
nothing, and another machine resumes from the newest complete checkpoint.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from voxray.config.flag_groups import OutputFlags
from voxray.core.errors import RunError, one_line
from voxray.core.storage import CacheLimits, RemotePath, move_into_place, remote_path
from voxray.runs.layout import CHECKPOINTS_FOLDER, PROGRESS_FILE, list_checkpoints, newest_step
from voxray.runs.lease import FILE as LEASE
from voxray.runs.run_folder import GROW_FILE, STOP_FILE, output_url, resolve_output_dir, working_copy

LOCAL_ONLY = {"features", "ray", "model", "manifests", "error.json", LEASE, STOP_FILE, GROW_FILE}
"""Names that are not mirrored. Shards have their own folder at the URL, which also has a lease of its own. The rest
concerns this machine only."""
SIGNALS = (STOP_FILE, GROW_FILE)
POLL_SEC = 3.0
COPY_SEC = 10.0
"""How often logs are uploaded by the machine that writes them, and downloaded by the driver's."""
COPIES = ".remote"
"""Folder of the working copy for files that another machine writes during a run. It is not mirrored."""


@dataclass
class RemoteSync:
    """A working copy and its URL; without a URL every call does nothing.

    Attributes:
        folder: The working copy, at the same path on every machine.
        remote_dir: The folder at the URL; None without one.
    """

    folder: Path
    remote_dir: RemotePath | None
    _sent: dict[str, tuple[int, int]] = field(default_factory=dict, init=False)

    @classmethod
    def from_settings(cls, settings: OutputFlags) -> "RemoteSync":
        """Working copy and URL of a job's results, from its settings.

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
        """Default URL of the run's feature shards, "" without a URL."""
        if self.remote_dir is None:
            return ""
        base, question, options = self.remote_dir.root.partition("?")
        return f"{base.rstrip('/')}/features{question}{options}"

    def fetch(self) -> None:
        """Download what the working copy lacks; if it has an older checkpoint than the URL, download everything.

        A newer working copy is kept: a killed job may not have uploaded its last steps.

        Raises:
            RunError: The URL cannot be read.
        """
        if self.remote_dir is None:
            return
        try:
            names = {name for name in self.remote_dir.walk() if _is_mirrored(name)}
            complete = _complete_checkpoints(names)
            newest = max((int(name.rpartition("-")[2]) for name in complete), default=0)
            is_behind = newest > newest_step(self.folder) or not (self.folder / "settings.json").is_file()
            for name in sorted(names, key=lambda name: name.endswith(PROGRESS_FILE)):
                is_complete = _checkpoint_name(name) in {"", *complete}
                if is_complete and (is_behind or not (self.folder / name).exists()):
                    _download(self.remote_dir / name, self.folder / name)
        except OSError as error:
            raise RunError(f"{self.remote_dir}: cannot be read: {one_line(error, 300)}") from None

    def push(self) -> None:
        """Upload new and changed files of the working copy, then delete checkpoints at the URL that it no longer has.

        Raises:
            OSError: The URL cannot be written; the next call tries again.
        """
        if self.remote_dir is None:
            return
        names = self.remote_dir.walk()
        complete = _complete_checkpoints(names)
        for name, path in self._files():
            stat = path.stat()
            version = (stat.st_mtime_ns, stat.st_size)
            is_uploaded = _checkpoint_name(name) in complete and name not in self._sent  # by an earlier process
            if self._sent.get(name) != version and not is_uploaded:
                self._upload(name)
            self._sent[name] = version
        local = {"", *(folder.name for _, folder in list_checkpoints(self.folder))}
        self._delete(name for name in names if _checkpoint_name(name) not in local)

    def push_files(self, paths: Iterable[Path]) -> None:
        """Upload those of the given files of the working copy that exist."""
        for path in paths if self.remote_dir else ():
            if path.is_file():
                self._upload(str(path.relative_to(self.folder)))

    def _upload(self, name: str) -> None:
        assert self.remote_dir is not None
        if (self.folder / name).stat().st_size:
            move_into_place(self.folder / name, self.remote_dir / name)
        else:
            (self.remote_dir / name).write_bytes(b"")

    def forget(self, folder: str = "") -> None:
        """Delete files at the URL that the working copy does not have, in one of its folders or in all."""
        if self.remote_dir is not None:
            names = [name for name in self.remote_dir.walk() if _is_mirrored(name) and name.startswith(folder)]
            self._delete(name for name in names if not (self.folder / name).exists())

    def _delete(self, names: Iterable[str]) -> None:
        """Delete files at the URL. ``progress.json`` goes first, so that no incomplete checkpoint seems complete."""
        assert self.remote_dir is not None
        for name in sorted(names, key=lambda name: not name.endswith(PROGRESS_FILE)):
            (self.remote_dir / name).unlink()

    def try_push(self, log: Callable[[str], object]) -> None:
        """``push``, but log errors: training continues, and the next push uploads what is missing."""
        try:
            self.push()
        except OSError as error:
            log(f"not uploaded yet: {one_line(error, 200)}")

    def push_all(self) -> None:
        """``push`` at the end of a job.

        Raises:
            RunError: The URL cannot be written to; everything is still in the working copy.
        """
        try:
            self.push()
        except OSError as error:
            reason = one_line(error, 200)
            raise RunError(f"{self.remote_dir}: cannot be written: {reason}; all is in {self.folder}") from None

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Files to upload, ``progress.json`` last, so that no checkpoint seems complete before it is."""
        names = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]
        for name in sorted(filter(_is_mirrored, names), key=lambda name: (name.endswith(PROGRESS_FILE), name)):
            if (path := self.folder / name).is_file():
                yield name, path

    def send_signals(self) -> None:
        """Upload the STOP and GROW files of this machine's folder, for workers on other machines."""
        for name in SIGNALS if self.remote_dir else ():
            if name not in self._sent and (self.folder / name).exists():
                assert self.remote_dir is not None
                (self.remote_dir / name).write_bytes(b"")
                self._sent[name] = (0, 0)

    def clear_signals(self) -> None:
        """Delete the signals at the URL before workers start; they were meant for earlier workers."""
        for name in SIGNALS if self.remote_dir else ():
            assert self.remote_dir is not None
            if self._sent.pop(name, None) or (self.remote_dir / name).is_file():
                (self.remote_dir / name).unlink()

    @contextmanager
    def copy_files(self, names: Iterable[str]) -> Iterator[None]:
        """Within the block, keep copies of files at the URL in the folder ``COPIES``.

        Rank 0 of a run may be on another machine than the driver and write its logs there.
        """
        done, sizes = threading.Event(), dict.fromkeys(names, 0)
        shutil.rmtree(self.folder / COPIES, ignore_errors=True)

        def poll(remote_dir: RemotePath) -> None:
            is_first = True  # what an earlier start left does not count
            while True:
                for name, size in sizes.items():
                    with suppress(OSError):
                        sizes[name] = (remote_dir / name).num_bytes()
                        if sizes[name] != size and not is_first:
                            _download(remote_dir / name, self.folder / COPIES / name)
                is_first = False
                if done.wait(COPY_SEC):
                    return

        if self.remote_dir is not None:
            threading.Thread(target=poll, args=(self.remote_dir,), daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def watch_signals(self, logs: Sequence[str] = ()) -> threading.Event:
        """Copy signals from the URL to this machine's folder in the background, until the returned event is set.

        Signals that an earlier run left in the folder are deleted first.

        Args:
            logs: Files of the folder to upload meanwhile, whenever they have grown.
        """
        done, sizes = threading.Event(), dict.fromkeys(logs, 0)

        def upload_logs() -> None:
            for name, size in sizes.items():
                path = self.folder / name
                if path.is_file() and path.stat().st_size != size:
                    sizes[name] = path.stat().st_size
                    self.push_files([path])

        def poll() -> None:
            uploaded = time.monotonic()
            for name in SIGNALS:
                (self.folder / name).unlink(missing_ok=True)
            while True:
                for name in SIGNALS:
                    with suppress(OSError):
                        if self.remote_dir is not None and (self.remote_dir / name).is_file():
                            (self.folder / name).touch()
                if time.monotonic() - uploaded > COPY_SEC:
                    uploaded = time.monotonic()
                    with suppress(OSError):
                        upload_logs()
                if done.wait(POLL_SEC):
                    return

        if self.remote_dir is not None:
            threading.Thread(target=poll, daemon=True).start()
        return done


def fetch_folder(url: str, flag: str) -> Path:
    """Download the results of an earlier job from a URL, such as an adapter; returns the working copy.

    Raises:
        SettingsError, RunError: The URL is not usable or cannot be read.
    """
    folder = working_copy(url)
    RemoteSync(folder, remote_path(url, flag, CacheLimits(str(folder), 0))).fetch()
    return folder


def _is_mirrored(name: str) -> bool:
    """Whether a file, by its path in the folder, is mirrored."""
    parts = name.split("/")
    return parts[0] not in LOCAL_ONLY and not any(part.startswith(".") for part in parts)


def _checkpoint_name(name: str) -> str:
    """Folder name of the checkpoint that a file belongs to, "" if to none."""
    parts = name.split("/")
    return parts[1] if parts[0] == CHECKPOINTS_FOLDER and len(parts) > 2 else ""


def _complete_checkpoints(names: Iterable[str]) -> set[str]:
    """Folder names of the checkpoints that have a ``progress.json``."""
    return {
        _checkpoint_name(name) for name in names if name.startswith(CHECKPOINTS_FOLDER) and name.endswith(PROGRESS_FILE)
    }


def _download(remote: RemotePath, target: Path) -> None:
    """Download a file under a temporary name, then rename it, so that no process sees an incomplete file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        remote.download(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
