"""Tables of clips and transcripts: CSV, TSV and Excel files with any headings, such as a spreadsheet of a hospital.

The encoding, the separator, the columns and the folder of the clips are guessed. ``CorpusTable.description`` says how,
and flags of prepare replace each guess.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow, RunError
from voxray.corpora.importers.clip_index import AUDIO_SUFFIXES, ClipIndex
from voxray.corpora.importers.lines import Cells
from voxray.corpora.importers.row import ImportedRow, ImportFault, Record, import_records
from voxray.corpora.importers.table_columns import TIMES, TableColumns, guess_columns, is_heading
from voxray.corpora.importers.table_file import find_table, open_table

ROWS_TRIED = 50
LJSPEECH_NAME, LJSPEECH_WIDTH = "metadata.csv", 3


@dataclass(frozen=True)
class TableOptions:
    """What the user says about a table. "" is found out.

    Attributes:
        columns: {kind of ``table_columns.HEADINGS``: heading, or a number from 1 in a table without headings}.
        encoding: Python's name of the encoding.
        sheet: Sheet of an Excel file.
        audio_dir: Folder of the clips.
        language: Code of the language of rows that name none.
    """

    columns: dict[str, str] = field(default_factory=dict)
    encoding: str = ""
    sheet: str = ""
    audio_dir: str = ""
    language: str = ""

    @property
    def any_set(self) -> bool:
        return bool(any(self.columns.values()) or self.encoding or self.sheet or self.audio_dir)


class CorpusTable:
    """A table whose columns are known.

    Args:
        path: The table, or a folder with one table in it.
    Raises:
        RunError: The table cannot be read, or its columns cannot be guessed. The message lists the columns.
    """

    def __init__(self, path: Path, options: TableOptions | None = None) -> None:
        options, path = options or TableOptions(), find_table(path) or path
        if options.audio_dir and not Path(options.audio_dir).is_dir():
            raise RunError(f"--audio_dir {options.audio_dir}: no such folder")
        self._file = open_table(path, options.encoding, options.sheet)
        self._index = ClipIndex(Path(options.audio_dir) if options.audio_dir else path.absolute().parent)
        first = [row for row in itertools.islice(self._file.rows(), ROWS_TRIED) if isinstance(row, Cells)]
        if not first:
            raise RunError(f"{path}: no row can be read")
        self._has_headings = _has_headings(first[0].fields, self._index, options)
        width = max(len(row.fields) for row in first)
        names = _unique(first[0].fields) if self._has_headings else [str(number + 1) for number in range(width)]
        body = first[1:] if self._has_headings else first
        sample = [row.fields for row in body if len(row.fields) == len(names)]
        chosen = dict(options.columns)
        if not self._has_headings and path.name == LJSPEECH_NAME and width == LJSPEECH_WIDTH:
            chosen["text"] = chosen.get("text") or "3"  # the text with its numbers written out
        try:
            self.columns: TableColumns = guess_columns(names, sample, self._is_clip, chosen)
        except RunError as error:
            raise RunError(f"{path} ({self._file}): {error}") from None
        if options.language:
            self.columns = replace(self.columns, language="")  # no guess is needed

    @property
    def description(self) -> str:
        """One line: the file, how it is written, its columns, and where its first clips are."""
        folders = [os.path.relpath(folder, self._index.folder) for folder, _ in self._index.folders.most_common(2)]
        clips = f"; clips in {folders[0]}{' and other folders' if len(folders) > 1 else ''}" if folders else ""
        clips = "; clips beside it" if folders == ["."] else clips
        return f"{self._file.path} ({self._file}): {self.columns}{clips}"

    def rows(self) -> Iterator[ImportedRow | ImportFault]:
        """A row or fault for each line of the table but the headings."""
        return import_records(self._records(), self._convert)

    def _records(self) -> Iterator[Record | ImportFault]:
        name, names = str(self._file.path.absolute()), self.columns.names
        skip_headings = self._has_headings
        for item in self._file.rows():
            if isinstance(item, ImportFault):
                yield item
                continue
            if skip_headings:
                skip_headings = False
                continue
            fields = item.fields
            has_more = any(cell.strip() for cell in fields[len(names) :])
            if has_more or (len(fields) < len(names) and not self._file.sheet):
                message = f"{len(fields)} fields under {len(names)} headings"
                yield from (ImportFault(name, number, "", "bad_row", message) for number in item.lines)
                continue
            padded = [*fields, *[""] * (len(names) - len(fields))]
            cells = {kind: padded[position].strip() for kind, position in self.columns.positions.items()}
            yield Record(name, item.lines[0], cells)

    def _convert(self, record: Record) -> dict[str, Any]:
        cells = record.values
        values: dict[str, Any] = {"audio_path": self._index.find(cells["audio"]), "transcript": cells["text"]}
        times = {
            kind: parse_seconds(cells[kind], kind) * self.columns.scales[kind] for kind in TIMES if cells.get(kind)
        }
        if "start" in times:
            values["start"] = times["start"]
        if "end" in times:
            if times["end"] <= times.get("start", 0.0):
                raise BadRow("bad_segment", f"from {times.get('start', 0.0):g} s to {times['end']:g} s")
            values |= {"start": times.get("start", 0.0), "duration": round(times["end"] - times.get("start", 0.0), 6)}
        elif "duration" in times:
            values["duration"] = times["duration"]
        if cells.get("channel"):
            values["channel"] = _number(cells["channel"], "channel")
        optional = {kind: cells[kind] for kind in ("speaker", "split", "language") if cells.get(kind)}
        return values | ({"language": self.columns.language} if self.columns.language else {}) | optional

    def _is_clip(self, cell: str) -> bool:
        try:
            self._index.find(cell)
        except BadRow:
            return False
        return True


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read a table whose columns are guessed."""
    return CorpusTable(path).rows()


def parse_seconds(text: str, name: str) -> float:
    """Parse a time: seconds (``83.5`` or ``83,5``), ``m:ss`` or ``h:mm:ss``.

    Raises:
        BadRow: It is none of these (``bad_type``).
    """
    seconds = 0.0
    for part in text.replace(",", ".").split(":"):
        seconds = seconds * 60 + _number(part, name)
    return seconds


def _number(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise BadRow("bad_type", f"{name} is {text[:100]!r}, not a number") from None
    if not 0 <= number < 1e9:
        raise BadRow("bad_type", f"{name} is {text[:100]}")
    return number


def _has_headings(cells: list[str], index: ClipIndex, options: TableOptions) -> bool:
    """Whether the first row has headings. It has none if one of its cells names a clip, existing or not."""
    for cell in filter(None, cells):
        if Path(cell.strip()).suffix.lower() in AUDIO_SUFFIXES:
            return False
    if any(map(is_heading, cells)) or any(cell in options.columns.values() for cell in cells if cell):
        return True
    for cell in filter(None, cells):
        try:
            index.find(cell)
        except BadRow:
            continue
        return False
    return True


def _unique(names: list[str]) -> list[str]:
    """Headings, of which an empty one becomes its number, and the second of two equal ones gets it too."""
    unique: list[str] = []
    for number, name in enumerate(names, 1):
        name = " ".join(name.split())
        unique.append(name if name and name not in unique else f"{name}#{number}" if name else str(number))
    return unique
