"""What every importer yields, and how a record of a foreign corpus becomes it."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from voxray.core.errors import BadRow
from voxray.core.manifest import find_file

MAX_DEPTH = 100  # of objects and lists in each other; a row that Python can just read, it may not be able to write


@dataclass(frozen=True)
class ImportedRow:
    """One row in voxray's schema.

    Attributes:
        source_file: Absolute path of the file that the row comes from.
        line: Its line there, from 1; in Parquet its row, from 1.
        id: The corpus' own id, else ``<file name>:<line>``.
        values: A manifest row: the keys of its task (``voxray.tasks``) and, where the corpus says so, ``language``,
            ``start`` and ``duration`` (seconds; only with ``start`` is the row a part of its file), ``channel``,
            ``speaker``, ``session``, ``gender``, ``split``, ``transcript_raw``, ``transcript_phonetic``,
            ``transcript_notes``, ``sample_rate`` (claimed). A clip inside a Parquet file has an ``audio_path`` of ""
            and ``audio_bytes_from`` {"file", "row"} (from 0), which ``huggingface.embedded_audio`` reads.
    """

    source_file: str
    line: int
    id: str
    values: dict[str, Any]


@dataclass(frozen=True)
class ImportFault:
    """A line that gives no row, and why.

    Attributes:
        source_file: Absolute path of the file.
        line: Its line there, from 1.
        id: The row's id as far as it is known, else "".
        reason: Short code that summaries count by.
        message: What is wrong, with the value that is.
    """

    source_file: str
    line: int
    id: str
    reason: str
    message: str


class Record(NamedTuple):
    """One record as the corpus has it: a parsed JSON object or a row of a table."""

    file: str
    line: int
    values: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.file).parent

    def record_id(self, keys: tuple[str, ...] = ("id",)) -> str:
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, str | int) and value not in ("", False, True):
                return str(value)
        return f"{Path(self.file).name}:{self.line}"

    def text(self, key: str, default: str | None = None) -> str:
        """A text that the record must have, or may have if there is a default for null and absence.

        Raises:
            BadRow: It is missing (``missing_key``) or no text (``bad_type``).
        """
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise BadRow("missing_key", f"{key} is null" if key in self.values else f"no {key}")
            return default
        if not isinstance(value, str):
            raise BadRow("bad_type", f"{key} is {type(value).__name__}, not text")
        return value


def import_records(
    records: Iterable[Record | ImportFault],
    convert: Callable[[Record], dict[str, Any]],
    id_keys: tuple[str, ...] = ("id",),
) -> Iterator[ImportedRow | ImportFault]:
    """Turn each record into a row, or into the fault that ``convert`` raised as a ``BadRow``."""
    for record in records:
        if isinstance(record, ImportFault):
            yield record
            continue
        row_id = record.record_id(id_keys)
        try:
            yield ImportedRow(record.file, record.line, row_id, convert(record))
        except BadRow as error:
            yield ImportFault(record.file, record.line, row_id, error.reason, error.message)


def parse_object(text: str) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        BadRow: Broken JSON or over 100 levels of it (``bad_json``), no object (``bad_row``), or half a surrogate pair
            in it (``bad_encoding``).
    """
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("bad_encoding", f"not Unicode text ({error.object[error.start]!a}: {error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadRow("bad_row", f"a JSON {type(value).__name__}, not an object")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise BadRow("bad_json", f"objects and lists nested over {MAX_DEPTH} deep")
    return value


def find_audio(value: Any, *folders: Path) -> str:
    """The absolute path of an audio file that exists, tried in each folder, then the current one; NFC or NFD.

    Raises:
        BadRow: No text (``bad_type``), an address on a network (``remote_audio``) or no such file (``audio_missing``).
    """
    if not isinstance(value, str):
        raise BadRow("bad_type", f"the audio path is {type(value).__name__}, not text")
    if "://" in value and not os.path.isfile(value):
        raise BadRow("remote_audio", f"download it first: {value}")
    if value.strip():
        bases = [folder.absolute() for folder in (*folders, Path.cwd())]
        for base in bases:
            if path := find_file(base, value):
                return path
        if any(os.path.exists(base / value) for base in bases):
            raise BadRow("audio_missing", f"not an audio file: {value}")
    raise BadRow("audio_missing", f"audio file not found: {value or '(empty path)'}")


def keep_keys(record: Record, names: dict[str, str]) -> dict[str, Any]:
    """Take optional values over under voxray's names ({theirs: ours}); null and "" are left out.

    Raises:
        BadRow: One is neither text nor a number (``bad_type``).
    """
    found = {ours: record.values[theirs] for theirs, ours in names.items() if record.values.get(theirs) is not None}
    for name, value in found.items():
        if not isinstance(value, str | int | float):
            raise BadRow("bad_type", f"{name} is {type(value).__name__}, neither text nor a number")
    return {name: value for name, value in found.items() if value != ""}


def seconds(value: Any, name: str) -> float:
    """Check a time.

    Raises:
        BadRow: Not a number (``bad_type``), or negative, infinite or NaN (``bad_segment``).
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("bad_type", f"{name} is {type(value).__name__}, not a number")
    if not 0 <= value < 1e9:
        raise BadRow("bad_segment", f"{name} is {value}")
    return value
