"""Atomic writes of files, on the local disk and on any file system that Arrow or fsspec supports.

Local paths (mounted file systems included) are ``pathlib.Path``. A path behind a URL is a ``RemotePath``. It has the
few methods of ``Path`` that feature sets need, so the same code serves both.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from voxray.core.errors import RunError, SettingsError, one_line

OBJECT_STORES = {"s3", "gcs", "abfs"}
"""Arrow's names of the file systems on which a file becomes visible only when it is closed."""


@dataclass(frozen=True)
class CacheLimits:
    """Local cache of remote shards.

    Attributes:
        folder: Absolute path of the cache folder.
        max_bytes: Largest total size of the files in it.
    """

    folder: str
    max_bytes: int


@dataclass(frozen=True)
class RemotePath:
    """A path on a file system that is not mounted on this machine.

    Attributes:
        root: URL of the user's folder, with options in its query: ``s3://bucket/features?region=eu-west-1``.
        inner: Path below ``root``, "" for the folder itself.
        cache: Local cache for the Arrow files read from it.
    """

    root: str
    inner: str
    cache: CacheLimits

    def __truediv__(self, name: str) -> "RemotePath":
        return replace(self, inner=str(PurePosixPath(self.inner) / name))

    def __str__(self) -> str:
        base = self.root.partition("?")[0].rstrip("/")
        return f"{base}/{self.inner}" if self.inner else base

    @property
    def name(self) -> str:
        return PurePosixPath(self.inner).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.inner).stem

    def with_suffix(self, suffix: str) -> "RemotePath":
        return replace(self, inner=str(PurePosixPath(self.inner).with_suffix(suffix)))

    @property
    def _resolved(self) -> tuple[fs.FileSystem, str]:
        system, base = _file_system(self.root)
        return system, f"{base}/{self.inner}" if self.inner else base

    def _info(self) -> fs.FileInfo:
        system, path = self._resolved
        return system.get_file_info(path)

    def is_file(self) -> bool:
        return self._info().type == fs.FileType.File

    def num_bytes(self) -> int:
        """Size of the file.

        Raises:
            FileNotFoundError: There is no such file.
        """
        info = self._info()
        if info.type != fs.FileType.File:
            raise FileNotFoundError(str(self))
        return info.size

    def read_bytes(self) -> bytes:
        system, path = self._resolved
        with _as_os_errors(self), system.open_input_stream(path) as file:
            return file.read()

    def read_text(self) -> str:
        return self.read_bytes().decode("utf-8")

    def walk(self) -> dict[str, int]:
        """{relative path: bytes} of every file below this folder, at any depth. Empty if the folder does not exist."""
        system, path = self._resolved
        with _as_os_errors(self):
            entries = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        start = len(path) + 1
        return {entry.path[start:]: entry.size for entry in entries if entry.type == fs.FileType.File}

    def download(self, target: Path) -> None:
        """Copy the file to the local disk."""
        system, path = self._resolved
        with _as_os_errors(self):
            fs.copy_files(path, str(target), source_filesystem=system, destination_filesystem=fs.LocalFileSystem())

    def write_bytes(self, data: Any) -> None:
        """Write the file atomically."""
        system, path = self._resolved
        with _as_os_errors(self):
            if system.type_name in OBJECT_STORES:
                with system.open_output_stream(path) as file:
                    file.write(data)
                return
            _make_folder(system, path.rpartition("/")[0])
            partial = f"{path}.{os.getpid()}.part"
            with system.open_output_stream(partial) as file:
                file.write(data)
            system.move(partial, path)

    def unlink(self) -> None:
        system, path = self._resolved
        system.delete_file(path)

    def children(self) -> Iterator["RemotePath"]:
        """Files in this folder. None if it does not exist."""
        system, path = self._resolved
        for entry in system.get_file_info(fs.FileSelector(path, allow_not_found=True)):
            if entry.type == fs.FileType.File:
                yield self / entry.base_name


AnyPath = Path | RemotePath


@contextmanager
def _as_os_errors(path: RemotePath) -> Iterator[None]:
    """Turn the errors of fsspec's file systems, which differ, into ``OSError`` with the file's name."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {one_line(error, 200)}") from error


def _make_folder(system: fs.FileSystem, path: str) -> None:
    """Create a folder. It may exist already, or another process may be creating it."""
    if system.get_file_info(path).type == fs.FileType.Directory:
        return
    try:
        system.create_dir(path, recursive=True)
    except Exception:
        if system.get_file_info(path).type != fs.FileType.Directory:
            raise


@lru_cache(maxsize=16)
def _file_system(root: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL (Arrow's own, else fsspec's) and the path on it."""
    try:
        system, path = fs.FileSystem.from_uri(root)
    except pa.ArrowInvalid as error:
        import fsspec

        if "Unrecognized filesystem" not in str(error):
            raise SettingsError(f"{root}: {one_line(error)}") from None
        try:
            fsspec_system, path = fsspec.core.url_to_fs(root)
        except (ValueError, ImportError) as unknown:
            raise SettingsError(f"{root}: {one_line(unknown)}") from None
        system = fs.PyFileSystem(fs.FSSpecHandler(fsspec_system))
    return system, path.rstrip("/")


def remote_path(url: str, flag: str, cache: CacheLimits) -> RemotePath:
    """Folder behind the URL of a flag.

    Raises:
        SettingsError: No file system is known for the URL, or it contains credentials, which would end up in settings
            files.
    """
    if urlsplit(url).password or urlsplit(url).username:
        raise SettingsError(f"{flag}: take the credentials out of the URL; they belong into the environment")
    try:
        _file_system(url)
    except SettingsError as error:
        raise SettingsError(f"{flag} {error}") from None
    return RemotePath(url, "", cache)


def require_writable(folder: RemotePath, flag: str) -> None:
    """Check that a folder behind a URL is writable.

    Raises:
        RunError: It is not.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RunError(f"{flag} {folder}: cannot write there: {one_line(error, 300)}") from None


def write_atomically(path: AnyPath, data: Any) -> None:
    """Write a file atomically: a reader, or a later run, sees all of it or nothing.

    Args:
        data: Bytes, or an object with the buffer interface.
    """
    if isinstance(path, RemotePath):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        file.write(data)


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open a file of any size for writing. It gets its name once all of it is on disk; on an error it is deleted."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: AnyPath, value: Any) -> None:
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=1).encode())


def to_jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def num_bytes(path: AnyPath) -> int:
    """Size of a file.

    Raises:
        FileNotFoundError: There is no such file.
    """
    return path.stat().st_size if isinstance(path, Path) else path.num_bytes()


def children(folder: AnyPath) -> Iterator[AnyPath]:
    """Files in a folder. None if it does not exist."""
    if isinstance(folder, RemotePath):
        yield from folder.children()
    elif folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_file())


@contextmanager
def scratch_file(folder: AnyPath, name: str) -> Iterator[Path]:
    """Local path to write a large file to before ``move_into_place``. It is in ``folder`` itself if that is local."""
    if isinstance(folder, RemotePath):
        with tempfile.TemporaryDirectory(prefix="voxray-") as scratch:
            yield Path(scratch) / name
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.{os.getpid()}.part"
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def move_into_place(partial: Path, target: AnyPath) -> None:
    """Give a complete scratch file its final name."""
    if isinstance(target, RemotePath):
        with pa.memory_map(str(partial)) as source:
            target.write_bytes(source.read_buffer())
    else:
        os.replace(partial, target)


def free_disk_bytes(path: Path) -> int:
    """Free disk space at a path that need not exist yet."""
    existing = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return shutil.disk_usage(existing).free


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
