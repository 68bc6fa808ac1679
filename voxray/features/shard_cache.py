"""Copies of remote shards on the local disk, within a budget.

Files are named by the checksum of their content, so a copy is never stale, and all processes of a machine share one
cache. The least recently used copies are deleted for new ones. A copy that is deleted while a process has it mapped
stays readable there; its disk space is freed when that process closes it.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from voxray.core.errors import RunError, one_line
from voxray.core.storage import CacheLimits, RemotePath, checksum
from voxray.core.units import GIB

SUFFIXES = {".arrow", ".part"}  # files of the cache; others in its folder are left alone
ABANDONED_SEC = 3600.0  # a download without progress for this long belongs to a process that has ended


def fetch(remote: RemotePath, sha256: str, num_bytes: int) -> Path:
    """Get the local copy of a remote file; download it if there is none.

    Args:
        sha256: Checksum of the file, in hex.
        num_bytes: Size of the file.
    Raises:
        RunError: The file cannot be read, is damaged, or is larger than the whole cache.
    """
    limits = remote.cache
    folder = Path(limits.folder)
    target = folder / f"{sha256}.arrow"
    if _touch(target):
        return target
    if num_bytes > limits.max_bytes:
        sizes = f"{num_bytes / GIB:.3g} GiB do not fit into {limits.max_bytes / GIB:.3g} GiB"
        raise RunError(f"--features_cache_gib: {remote}: {sizes}")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{sha256}.{os.getpid()}.part"
    with _locked(folder):
        _evict(folder, limits, num_bytes)
        with open(partial, "wb") as file:
            file.truncate(num_bytes)  # reserves the space, so that other processes count it
    try:
        try:
            remote.download(partial)
        except OSError as error:
            raise RunError(f"{remote}: cannot be read: {one_line(error, 200)}") from None
        if checksum(partial) != sha256:
            raise RunError(f"{remote}: damaged: its content is not what shards.json says; run featurize --verify")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _touch(path: Path) -> bool:
    """Mark a file as used now; returns whether it exists."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _evict(folder: Path, limits: CacheLimits, num_bytes: int) -> None:
    """Delete the least recently used files until ``num_bytes`` fit."""
    files = sorted(
        (path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir() if path.suffix in SUFFIXES
    )
    total = sum(size for _, size, _ in files)
    for used_at, size, path in files:
        if total + num_bytes <= limits.max_bytes:
            return
        if path.suffix != ".part" or time.time() - used_at > ABANDONED_SEC:
            path.unlink(missing_ok=True)
            total -= size
    if total + num_bytes > limits.max_bytes:
        raise RunError(f"--features_cache_gib: {folder} is full of downloads that other processes have under way")
