"""Clips inside other files: rows of Parquet and Arrow files, and members of tar files."""

import functools
import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from voxray.core.errors import BadRow, one_line
from voxray.core.manifest import open_regular
from voxray.corpora.importers.clip_index import AUDIO_SUFFIXES

MAX_CACHED_BYTES = 256 << 20
MAX_CLIP_BYTES = 2 << 30


class TarIndex:
    """Where the clips are in an uncompressed tar file. It is read when the first clip is looked up.

    Args:
        path: The tar file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._members: dict[str, list[tuple[int, int, str]]] | None = None

    def find(self, name: str) -> dict[str, Any]:
        """Keys of a row whose clip is a member: ``audio_path`` "" and ``audio_bytes_from``.

        Args:
            name: The member, or its name without suffix.
        Raises:
            BadRow: There is no such member (``audio_missing``), or the archive cannot be read (``audio_unreadable``).
        """
        if self._members is None:
            self._members = self._read()
        if name not in self._members:
            raise BadRow("audio_missing", f"{self._path} has no audio file {name[:200]}")
        places = [place for place in self._members[name] if place[2] == name] or self._members[name]
        if len(places) > 1:
            raise BadRow("audio_ambiguous", f"{self._path} has {places[0][2]} and {places[1][2]} for {name[:200]}")
        offset, size, member = places[0]
        place = {"file": str(self._path), "offset": offset, "size": size, "audio_name": PurePosixPath(member).name}
        return {"audio_path": "", "audio_bytes_from": place}

    def _read(self) -> dict[str, list[tuple[int, int, str]]]:
        members: dict[str, list[tuple[int, int, str]]] = {}
        try:
            with open_regular(self._path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    path = PurePosixPath(member.name)
                    if member.isfile() and path.suffix.lower() in AUDIO_SUFFIXES:
                        place = (member.offset_data, member.size, member.name)
                        for name in {member.name, path.name, str(path.with_suffix("")), path.stem}:
                            members.setdefault(name, []).append(place)
        except FileNotFoundError:
            raise BadRow("audio_missing", f"archive of clips not found: {self._path}") from None
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise BadRow("audio_unreadable", f"{self._path}: {one_line(error, 300)}") from None
        return members


def embedded_audio(place: dict[str, Any]) -> bytes:
    """Read the bytes of a clip.

    Args:
        place: {"file", "row"} (from 0) and perhaps "column" of a Parquet or Arrow file, or {"file", "offset", "size"}.
            See ``ImportedRow``.
    Raises:
        BadRow: There are no bytes (``audio_missing``), or they cannot be read (``audio_unreadable``).
    """
    file = place["file"]
    if "offset" not in place:
        return _clip_of_row(file, place["row"], place.get("column", ""))
    if place["size"] > MAX_CLIP_BYTES:
        raise BadRow("audio_too_long", f"{file}: a clip of {place['size'] >> 20} MiB")
    try:
        with open_regular(Path(file)) as archive:
            archive.seek(place["offset"])
            raw = archive.read(place["size"])
    except OSError as error:
        raise BadRow("audio_unreadable", f"{file}: {error.strerror}") from None
    if len(raw) < place["size"]:
        raise BadRow("audio_unreadable", f"{file} ends before the clip at byte {place['offset']}")
    return raw


def audio_column(schema: Any, chosen: str = "") -> str | None:
    """Name of the struct column with ``bytes`` and ``path``, preferably ``audio``; None if there is none.

    Args:
        chosen: The only column that counts; "" for any.
    """
    import pyarrow as pa

    names = [
        field.name
        for field in schema
        if pa.types.is_struct(field.type) and {"bytes", "path"} <= {inner.name for inner in field.type}
    ]
    if chosen:
        return chosen if chosen in names else None
    return "audio" if "audio" in names else next(iter(names), None)


def _clip_of_row(file: str, row: int, column: str) -> bytes:
    """The clip in one row of a Parquet or Arrow file.

    A row group of up to 256 MiB is cached for the next call, so reading rows in order reads each group once.
    """
    import pyarrow as pa

    try:
        if file.endswith(".arrow"):
            clip = _arrow_clips(file, os.stat(file).st_mtime_ns, column)[row].as_py()
        else:
            clip = _parquet_clip(file, row, column)
    except (pa.ArrowException, OSError, UnicodeDecodeError, IndexError) as error:
        raise BadRow("audio_unreadable", f"{file}: {one_line(error, 300)}") from None
    if not clip or clip.get("bytes") is None:
        raise BadRow("audio_missing", f"{file} has no audio bytes in row {row}")
    return clip["bytes"]


def _parquet_clip(file: str, row: int, column: str) -> Any:
    import pyarrow.parquet as pq

    stat = os.stat(file)
    with pq.ParquetFile(file) as parquet:
        metadata, first, group = parquet.metadata, 0, 0
        if not 0 <= row < metadata.num_rows:
            raise BadRow("audio_missing", f"{file} has {metadata.num_rows} rows, so there is no row {row}")
        while row - first >= metadata.row_group(group).num_rows:
            first += metadata.row_group(group).num_rows
            group += 1
        if metadata.row_group(group).total_byte_size <= MAX_CACHED_BYTES:
            return _clips(file, group, stat.st_mtime_ns, stat.st_size, column)[row - first].as_py()
        return _stream_to(parquet, group, row - first, column)


@functools.lru_cache(maxsize=1)
def _clips(file: str, group: int, mtime_ns: int, size: int, chosen: str) -> Any:
    """The audio column of one row group. Time and size of the file are cache keys, so a changed file is read anew."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        column = audio_column(parquet.schema_arrow, chosen)
        return parquet.read_row_group(group, columns=[column]).column(0)


@functools.lru_cache(maxsize=1)
def _arrow_clips(file: str, mtime_ns: int, chosen: str) -> Any:
    """The audio column of an Arrow file, which stays on disk until a clip is read."""
    import pyarrow as pa

    with pa.ipc.open_stream(pa.memory_map(file)) as stream:
        table = stream.read_all()
    table.validate(full=True)  # else damaged offsets end the process
    return table.column(audio_column(table.schema, chosen))


def _stream_to(parquet: Any, group: int, index: int, chosen: str) -> Any:
    """The clip at an index of a row group that is too large to cache."""
    column = audio_column(parquet.schema_arrow, chosen)
    for batch in parquet.iter_batches(16, row_groups=[group], columns=[column]):
        if index < batch.num_rows:
            return batch.column(0)[index].as_py()
        index -= batch.num_rows
    return None
