"""Unpack archives of clips below one folder, safely.

Archives are not trusted: a member outside the folder, a link or a device stops the unpacking, and so does an archive
that expands far too much. An archive is read once, from front to back. A clip that an interrupted job has unpacked is
not written again.
"""

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from voxray.core.errors import RunError, one_line

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_GROWTH = 20
"""Most unpacked bytes per byte of the archive. Speech is already compressed; tables compress to a quarter."""
SLACK_BYTES = 64 << 20
"""Unpacked bytes allowed in addition, for small archives."""
MAX_HEADER_BYTES = 1 << 20
"""Longest name and other properties of a member."""
HEADER_TYPES = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
MIN_FREE_BYTES = 256 << 20
COPY_BYTES = 1 << 20


def is_archive(name: str) -> bool:
    """Whether ``unpack`` reads a file with this name."""
    return name.lower().endswith(SUFFIXES)


def unpack(
    archive: Path,
    folder: Path,
    target_path: Callable[[str], str],
    on_progress: Callable[[float, float], None] = lambda done, total: None,
    members_by_target: dict[str, str] | None = None,
) -> int:
    """Unpack selected members of an archive.

    Args:
        archive: A tar file, compressed or not.
        folder: Target folder.
        target_path: From a member's name to its path below the folder, or "" if the member is not to be unpacked.
        on_progress: Called with (bytes of the archive read, size of the archive) every 100 files and at the end.
        members_by_target: The member that each file in the folder is from. Archives of one corpus share it.
    Returns:
        Number of files of the archive that are now in the folder.
    Raises:
        RunError: The archive is damaged, would write outside the folder, has two members for one file or expands too
            much, or the disk is full.
    """
    size, count, written = archive.stat().st_size, 0, list[Path]()
    members_by_target = {} if members_by_target is None else members_by_target
    try:
        with open(archive, "rb") as raw, _decompressed(raw) as decompressed:
            stream: Any = _LimitedStream(decompressed, archive)
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as members:
                for member in members:
                    stream.check(member.size)
                    target = "" if member.isdir() else target_path(member.name)
                    if not target:
                        continue
                    _check_member(archive, folder, member)
                    name = f"{archive.name}:{member.name}"
                    if (other := members_by_target.setdefault(target, name)) != name:
                        raise RunError(f"{archive}: refused, {other} and {name} are two files for {target}")
                    count += 1
                    written += _extract(members, member, folder / target, free=folder)
                    if count % 100 == 0:
                        on_progress(raw.tell(), size)
            while stream.read(COPY_BYTES):  # read to the end, where the checksum is
                pass
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, RecursionError) as error:
        reason = one_line(error) or type(error).__name__
        if isinstance(error, OSError) and error.errno:
            raise RunError(f"{archive}: cannot unpack it into {folder}: {error.strerror}") from None
        for path in written:
            path.unlink()
        raise RunError(f"{archive}: damaged, so nothing of it is taken: {reason}") from None
    on_progress(size, size)
    return count


class _LimitedStream:
    """A decompressed archive that ends with an error if far more comes out of it than its size allows."""

    def __init__(self, stream: BinaryIO, archive: Path) -> None:
        self._stream, self._archive, self._num_bytes = stream, archive, 0
        self._size = archive.stat().st_size

    def read(self, num_bytes: int) -> bytes:
        """As a file's ``read``. Raises RunError beyond the limit."""
        content = self._stream.read(num_bytes)
        self._num_bytes += len(content)
        self.check(0)
        return content

    def check(self, num_bytes: int) -> None:
        """Refuse an archive from which so many more bytes are about to be read. Raises RunError."""
        limit = MAX_GROWTH * self._size + SLACK_BYTES
        if self._num_bytes + num_bytes > limit:
            sizes = f"over {limit >> 20} MiB come out of {self._size >> 20} MiB"
            raise RunError(f"{self._archive}: refused, {sizes}")


class _Member(tarfile.TarInfo):
    """A member of an archive. Long names are in members of their own, which tarfile reads into memory as a whole."""

    def _proc_member(self, archive: tarfile.TarFile) -> Any:  # the method that tarfile documents for subclasses
        if self.type in HEADER_TYPES and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a name of {self.size >> 20} MiB")
        return super()._proc_member(archive)  # pyright: ignore[reportAttributeAccessIssue]


def _decompressed(raw: BinaryIO) -> Any:
    """The decompressed stream. Unlike tarfile's own decompression, it verifies checksums."""
    start = raw.read(6)
    raw.seek(0)
    for magic, module in ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\0", lzma)):
        if start.startswith(magic):
            return module.open(raw)
    return nullcontext(raw)


def _check_member(archive: Path, folder: Path, member: tarfile.TarInfo) -> None:
    """Refuse a member that violates Python's rules for data archives, or ours.

    Files are written to paths of our own choice, so a bad name is harmless here, but it shows a malicious archive.
    """
    try:
        tarfile.data_filter(member, str(folder))
    except tarfile.FilterError as error:
        raise RunError(f"{archive}: refused, {one_line(error)}") from None
    if not member.isfile():
        raise RunError(f"{archive}: refused, {member.name!r} is a link or a device, not a file")
    if os.path.isabs(member.name) or ".." in Path(member.name).parts:
        raise RunError(f"{archive}: refused, {member.name!r} is outside its folder")


def _extract(members: tarfile.TarFile, member: tarfile.TarInfo, target: Path, *, free: Path) -> list[Path]:
    """Write one file. Returns [its path], or [] if it exists already."""
    if target.is_file() and target.stat().st_size == member.size:
        return []
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.size > COPY_BYTES and shutil.disk_usage(free).free < member.size + MIN_FREE_BYTES:
        raise RunError(f"{free}: the disk is full: {member.name!r} needs {member.size >> 20} MiB")
    partial = target.with_name(f".{target.name}.part")
    source = members.extractfile(member)
    assert source is not None, "it is a file"
    # No fsync for each of a million clips: after a power cut, the sizes show which are incomplete.
    with source, open(partial, "wb") as file:
        shutil.copyfileobj(source, file, COPY_BYTES)
    if partial.stat().st_size != member.size:
        raise EOFError(f"{member.name!r} ends too early")
    os.replace(partial, target)
    return [target]
