"""A lease on an output folder: one job at a time writes there.

On one machine the operating system's lock decides, which ends with its owner, however it dies. Between machines, on a
shared file system or behind a URL, the owner's heartbeat decides: whoever finds a lease of another machine watches it,
and takes it over if its counter stands still. Clocks of different machines are not compared.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from voxray.core.console import console
from voxray.core.errors import RunError, one_line
from voxray.core.storage import AnyPath, write_json
from voxray.runs.run_folder import make_folder

FILE = "lease.json"
BEAT_SEC = 5.0
DEAD_SEC = 20.0
"""An owner whose counter stands still for this long is taken for dead."""
SETTLE_SEC = 0.2
"""Time after which a job that writes its lease at the same moment must have done so."""


@contextmanager
def folder_lease(
    folder: Path, remote_dir: AnyPath | None = None, *, name: str = FILE, flag: str = "--output_dir"
) -> Iterator[None]:
    """Hold the lease on an output folder, and on the URL to which it is mirrored.

    Args:
        folder: The folder; it is created.
        remote_dir: The folder at the URL, if there is one.
        name: Name of the file that holds the lease.
        flag: Flag of the folder, for messages.
    Raises:
        RunError: Another job holds it; the message says which, where and since when. Or the folder is not writable.
    """
    make_folder(folder, flag)
    path, shown = folder / name, f"{flag} {folder}"
    with ExitStack() as stack:
        is_locked = stack.enter_context(_process_lock(path, shown))
        stack.enter_context(_heartbeat(path, shown, is_locked=is_locked))
        if remote_dir is not None:
            stack.enter_context(_heartbeat(remote_dir / name, f"{flag} {remote_dir}", is_locked=is_locked))
        yield


def output_lease(path: Path, flag: str = "--output_dir") -> AbstractContextManager[None]:
    """Hold the lease on a file, or on a folder that is replaced as a whole; see ``folder_lease``."""
    return folder_lease(path.parent, name=f".{path.name}.{FILE}", flag=flag)


@contextmanager
def _process_lock(path: Path, shown: str) -> Iterator[bool]:
    """Lock a file against other processes of this machine; yields whether the file system supports that."""
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _in_use(shown, _read(path)) from None
            except OSError:
                yield False
                return
            if not _is_same_file(file.fileno(), lock):
                continue  # its last owner has deleted it meanwhile
            try:
                yield True
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _heartbeat(path: AnyPath, shown: str, *, is_locked: bool) -> Iterator[None]:
    """Take the lease at a path, and renew it until the block ends.

    Args:
        shown: Flag and folder, for messages.
        is_locked: Whether no other process of this machine can hold it.
    """
    machine = {"host": socket.gethostname(), "boot": _boot_id()}
    own = {**machine, "pid": os.getpid(), "command": Path(sys.argv[0]).name, "token": uuid.uuid4().hex}
    own["since"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    other = _read(path)
    if other and not (is_locked and machine.items() <= other.items()):
        _require_dead(path, shown, other)
    try:
        write_json(path, {**own, "beat": 0})
    except OSError as error:
        raise RunError(f"{shown}: cannot be written: {one_line(error, 300)}") from None
    if other or not isinstance(path, Path):
        time.sleep(SETTLE_SEC)
    if (winner := _read(path)).get("token") != own["token"]:
        raise _in_use(shown, winner)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, shown, own, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            if _read(path).get("token") == own["token"]:
                path.unlink()


def _require_dead(path: AnyPath, shown: str, other: dict[str, Any]) -> None:
    """Watch the lease of another machine.

    Raises:
        RunError: Its owner is alive.
    """
    console.print(f"{shown}: {_owner(other)} was writing here; checking for {DEAD_SEC:.0f} s that it has ended")
    deadline = time.monotonic() + DEAD_SEC
    while time.monotonic() < deadline:
        time.sleep(min(1.0, DEAD_SEC / 10))
        if (current := _read(path)) != other:
            if not current:
                return
            raise _in_use(shown, current)


def _beat(path: AnyPath, shown: str, own: dict[str, Any], ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT_SEC):
        beat += 1
        current = _read(path)
        if current and current.get("token") != own["token"]:
            message = f"error: {shown}: {_owner(current)} took the folder over while this job stood still; it ends here"
            print(message, file=sys.stderr, flush=True)
            os._exit(1)  # nothing more may be written
        with suppress(OSError):
            write_json(path, {**own, "beat": beat})


def _read(path: AnyPath) -> dict[str, Any]:
    """Content of a lease; {} if there is none or it is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _owner(lease: dict[str, Any]) -> str:
    known = all(name in lease for name in ("command", "pid", "host", "since"))
    if not known:
        return "another job"
    return one_line(f"{lease['command']}, process {lease['pid']} on {lease['host']} since {lease['since']},", 200)


def _in_use(shown: str, lease: dict[str, Any]) -> RunError:
    owner = _owner(lease).removesuffix(",")
    return RunError(f"{shown}: in use by {owner}; wait until it ends, or choose another folder")


def _boot_id() -> str:
    """Identifies the machine's current start, so that equal host names of different machines differ."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""
