"""Archives of clips unpacked below one folder, whatever they hold.

Nothing is taken on an archive's word: a member outside the folder, a link or a device ends it, and so does one that
grows out of all proportion while it is unpacked. It is read once, from front to back, and a clip that is there from a
job that was cut off is not written again.
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
"""Bytes that may come out for each byte of the archive; speech is compressed already, tables shrink to a quarter."""
SLACK_BYTES = 64 << 20
"""What small archives may hold beyond that."""
MIN_FREE_BYTES = 256 << 20
COPY_BYTES = 1 << 20


def is_archive(name: str) -> bool:
    """Whether a file is one that ``unpack`` reads, by its name."""
    return name.lower().endswith(SUFFIXES)


def unpack(
    archive: Path,
    folder: Path,
    wanted: Callable[[str], str],
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> int:
    """Unpack the wanted members of an archive.

    Args:
        archive: A tar file, compressed or not.
        folder: Where they go.
        wanted: From a member's name to its path below the folder, or "" for one that is not wanted.
        on_progress: Called with (bytes of the archive read, bytes in all) now and then.
    Returns:
        How many files of it are in the folder now.
    Raises:
        RunError: It is damaged, would write outside the folder, is a bomb, or the disk is full.
    """
    size, grown, count = archive.stat().st_size, 0, 0
    limit, written = MAX_GROWTH * size + SLACK_BYTES, list[Path]()

    def grow(num_bytes: int) -> None:
        nonlocal grown
        grown += num_bytes
        if grown > limit:
            raise RunError(f"{archive}: refused, over {limit >> 20} MiB come out of {size >> 20} MiB")

    try:
        with open(archive, "rb") as raw, _inflated(raw) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as members:
                for member in members:
                    grow(member.size)
                    target = "" if member.isdir() else wanted(member.name)
                    if not target:
                        continue
                    _refuse_bad(archive, folder, member)
                    count += 1
                    written += _extract(members, member, folder / target, free=folder)
                    if count % 100 == 0:
                        on_progress(raw.tell(), size)
            while rest := stream.read(COPY_BYTES):  # the checksum of all of it comes last
                grow(len(rest))
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        reason = one_line(error) or type(error).__name__
        if isinstance(error, OSError) and error.errno:
            raise RunError(f"{archive}: cannot unpack it into {folder}: {error.strerror}") from None
        for path in written:
            path.unlink()
        raise RunError(f"{archive}: damaged, so nothing of it is taken: {reason}") from None
    on_progress(size, size)
    return count


def _inflated(raw: BinaryIO) -> Any:
    """The tar itself; unlike tarfile's own streams, these check what they read against its checksum."""
    start = raw.read(6)
    raw.seek(0)
    for magic, module in ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\0", lzma)):
        if start.startswith(magic):
            return module.open(raw)
    return nullcontext(raw)


def _refuse_bad(archive: Path, folder: Path, member: tarfile.TarInfo) -> None:
    """Hold a member against Python's own rules for data, and then against ours.

    ``wanted`` gives it a path of ours, so a bad name could do no harm; but whoever made it meant to.
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
    """Write one file; returns its path, or nothing if it is there already."""
    if target.is_file() and target.stat().st_size == member.size:
        return []
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.size > COPY_BYTES and shutil.disk_usage(free).free < member.size + MIN_FREE_BYTES:
        raise RunError(f"{free}: the disk is full: {member.name!r} needs {member.size >> 20} MiB")
    partial = target.with_name(f".{target.name}.part")
    source = members.extractfile(member)
    assert source is not None, "it is a file"
    # Without a sync for every one of a million clips: after a power cut, sizes tell which of them are not whole.
    with source, open(partial, "wb") as file:
        shutil.copyfileobj(source, file, COPY_BYTES)
    if partial.stat().st_size != member.size:
        raise EOFError(f"{member.name!r} ends too early")
    os.replace(partial, target)
    return [target]
