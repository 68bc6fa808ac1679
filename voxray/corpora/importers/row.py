"""Types that importers yield, and helpers that convert records of other corpora."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from voxray.core.errors import BadRow
from voxray.core.manifest import find_clip
from voxray.corpora.splits import find_split

MAX_DEPTH = 100  # of nested objects and lists; Python can read deeper ones than it can write


@dataclass(frozen=True)
class ImportedRow:
    """One row in voxray's schema.

    Attributes:
        source_file: Absolute path of the file that the row comes from.
        line: Line in the file, from 1; in Parquet the row, from 1.
        id: The corpus' own id, else ``<file>:<line>``.
        values: A manifest row: the keys of its task (``core/tasks.py``) and, if the corpus has them, ``language``,
            ``start`` and ``duration`` (seconds; only a row with ``start`` is a part of its file), ``channel``,
            ``speaker``, ``session``, ``gender``, ``split``, ``transcript_raw``, ``transcript_phonetic``,
            ``transcript_notes``, ``sample_rate`` (claimed). A clip inside another file has an ``audio_path`` of "" and
            ``audio_bytes_from``, which ``embedded.embedded_audio`` reads: {"file", "row"} (from 0) in Parquet and Arrow
            files, with "column" if the user names it, and {"file", "offset", "size"} in tar files.
    """

    source_file: str
    line: int
    id: str
    values: dict[str, Any]


@dataclass(frozen=True)
class ImportFault:
    """A line that gives no row, and the reason.

    Attributes:
        source_file: Absolute path of the file.
        line: Line in the file, from 1.
        id: The row's id if it is known, else "".
        reason: Short code. Summaries count rows by it.
        message: What is wrong, with the wrong value.
    """

    source_file: str
    line: int
    id: str
    reason: str
    message: str


class Record(NamedTuple):
    """One record of a corpus: a parsed JSON object or a row of a table."""

    file: str
    line: int
    values: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.file).parent

    def record_id(self, keys: tuple[str, ...] = ("id",), root: Path | None = None) -> str:
        """The first usable value of the keys, else ``<file>:<line>``: its path below ``root``, or its name."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, str | int) and value not in ("", False, True):
                return str(value)
        name = Path(self.file).relative_to(root.absolute()) if root else Path(self.file).name
        return f"{name}:{self.line}"

    def text(self, key: str, default: str | None = None) -> str:
        """The text at a key. With a default the key may be missing or null.

        Raises:
            BadRow: It is missing (``missing_key``) or not a text (``bad_type``).
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
    root: Path | None = None,
) -> Iterator[ImportedRow | ImportFault]:
    """Convert each record into a row. A ``BadRow`` raised by ``convert`` becomes a fault.

    Args:
        root: Folder of the corpus, if several of its files may have one name.
    """
    for record in records:
        if isinstance(record, ImportFault):
            yield record
            continue
        row_id = record.record_id(id_keys, root)
        try:
            yield ImportedRow(record.file, record.line, row_id, convert(record))
        except BadRow as error:
            yield ImportFault(record.file, record.line, row_id, error.reason, error.message)


def parse_object(text: str) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        BadRow: It is not JSON or over 100 levels deep (``bad_json``), not an object (``bad_row``), or contains half a
            surrogate pair (``bad_encoding``).
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


_FIRST_WORD = re.compile(r"[\W\d_]")


def split_by_path(file: Path, root: Path) -> dict[str, str]:
    """{"split"} by the names of a file and of its folders below ``root``: ``train-clean-100``, ``test-00000-of-00001``.

    {} if none of them begins with the name of a split.
    """
    names = reversed(file.absolute().relative_to(root.absolute()).parts)
    split = next((find_split(name) for name in names if find_split(_FIRST_WORD.split(name)[0])), "")
    return {"split": split} if split else {}


def find_audio(value: Any, *folders: Path) -> str:
    """Absolute path of an existing audio file, relative to one of the folders or to the current one. NFC and NFD match.

    Raises:
        BadRow: The value is not a text (``bad_type``), is a URL (``remote_audio``), or no such file exists
            (``audio_missing``).
    """
    if not isinstance(value, str):
        raise BadRow("bad_type", f"the audio path is {type(value).__name__}, not text")
    if "://" in value and not os.path.isfile(value):
        raise BadRow("remote_audio", f"download it first: {value}")
    if not value.strip():
        raise BadRow("audio_missing", f"audio file not found: {value or '(empty path)'}")
    return find_clip(value, [folder.absolute() for folder in (*folders, Path.cwd())])


def keep_keys(record: Record, names: dict[str, str]) -> dict[str, Any]:
    """Copy optional values under voxray's names ({name in the corpus: voxray's name}). null and "" are left out.

    Raises:
        BadRow: A value is neither text nor a number (``bad_type``).
    """
    values = {name: record.values[key] for key, name in names.items() if record.values.get(key) is not None}
    for name, value in values.items():
        if not isinstance(value, str | int | float):
            raise BadRow("bad_type", f"{name} is {type(value).__name__}, neither text nor a number")
    return {name: value for name, value in values.items() if value != ""}
