"""Tables as people have them: CSV and TSV in any encoding and with any separator, and Excel sheets."""

import codecs
import csv
import datetime
import io
import itertools
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxray.core.errors import RunError, library_errors
from voxray.core.manifest import MAX_LINE_BYTES
from voxray.corpora.importers.lines import Cells, Line, csv_cells, open_text
from voxray.corpora.importers.row import ImportFault

EXCEL = ".xlsx"
SUFFIXES = (".csv", ".tsv", ".txt", EXCEL)
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
TRIED_ENCODINGS = ("utf-8", "cp949")
LINES_TRIED = 50
MAX_SHEET_BYTES = 1 << 30  # of an Excel file, unpacked


@dataclass(frozen=True)
class TableFile:
    """A table and how it is written.

    Attributes:
        path: The file.
        encoding: Python's name of its encoding; "" for Excel.
        separator: Character between fields; "" for Excel.
        quoted: Whether quotes enclose fields.
        sheet: Name of the sheet that is read; "" for text.
    """

    path: Path
    encoding: str = ""
    separator: str = ""
    quoted: bool = True
    sheet: str = ""

    def rows(self) -> Iterator[Cells | ImportFault]:
        """All rows that have a field with text, the header included."""
        rows = self._sheet_rows() if self.sheet else self._text_rows()
        return (row for row in rows if isinstance(row, ImportFault) or any(field.strip() for field in row.fields))

    def __str__(self) -> str:
        return f"sheet {self.sheet}" if self.sheet else f"{self.encoding}, {SEPARATORS[self.separator]}"

    def _text_rows(self) -> Iterator[Cells | ImportFault]:
        lines = _lines(self.path, self.encoding)
        return csv_cells(str(self.path.absolute()), lines, self.separator, quoted=self.quoted)

    def _sheet_rows(self) -> Iterator[Cells]:
        with library_errors(f"{self.path}: cannot be read as an Excel file"):
            book = _workbook(self.path)
            try:
                for number, cells in enumerate(book[self.sheet].iter_rows(values_only=True), 1):
                    yield Cells([number], list(map(_cell_text, cells)))
            finally:
                book.close()


def find_table(path: Path) -> Path | None:
    """The table at a path: the file itself, or the only CSV, TSV or Excel file of a folder; None if there is none."""
    if not path.is_dir():
        return path if path.suffix.lower() in SUFFIXES else None
    files = [file for file in sorted(path.iterdir()) if file.suffix.lower() in SUFFIXES and file.suffix != ".txt"]
    files = [file for file in files if file.is_file() and not file.name.startswith((".", "~$"))]
    return files[0] if len(files) == 1 else None


def open_table(path: Path, encoding: str = "", sheet: str = "") -> TableFile:
    """Find out how a table is written.

    Args:
        encoding: Python's name of the encoding of a text file; "" detects it.
        sheet: Sheet of an Excel file; "" takes the first one that has rows.
    Raises:
        RunError: The file cannot be read, its encoding is none of those tried, it has one column only, or there is no
            such sheet.
    """
    if path.suffix.lower() == EXCEL:
        return TableFile(path, sheet=_choose_sheet(path, sheet))
    try:
        encoding = codecs.lookup(encoding).name if encoding else find_encoding(path)
    except LookupError:
        raise RunError(f"--encoding {encoding}: Python has no such encoding") from None
    lines = [line.text for line in itertools.islice(_lines(path, encoding), LINES_TRIED) if isinstance(line, Line)]
    separator = _find_separator(lines)
    if not separator:
        names = ", ".join(SEPARATORS.values())
        raise RunError(f"{path}: one column only: none of {names} separates its lines into the same number of fields")
    return TableFile(path, encoding, separator, separator != "\t" or _tabs_are_quoted(lines))


def find_encoding(path: Path) -> str:
    """Encoding of a text file: from its byte-order mark, else UTF-8 or cp949, in which fewer lines are invalid.

    Korean texts of Windows programs are cp949. Hardly any of their lines is valid UTF-8.

    Raises:
        RunError: Half of the lines or more are invalid in both.
    """
    num_lines, num_bad = 0, dict.fromkeys(TRIED_ENCODINGS, 0)
    with open_text(path) as file:
        head = file.read(2000)
        for mark, name in BOMS.items():
            if head.startswith(mark):
                return name
        for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):
            if head[first::2].count(0) > len(head) // 8:
                return name
    with open_text(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            num_lines += 1
            for name in TRIED_ENCODINGS:
                try:
                    line.decode(name)
                except UnicodeDecodeError:
                    num_bad[name] += 1
    best = min(num_bad, key=lambda name: num_bad[name])  # of equal ones UTF-8
    if num_bad[best] * 2 > num_lines:
        raise RunError(f"{path}: neither {' nor '.join(TRIED_ENCODINGS)}; name its encoding with --encoding")
    return best


def _lines(path: Path, encoding: str) -> Iterator[Line | ImportFault]:
    """The lines of a text file without their ends. A line that is invalid in the encoding is a fault.

    Raises:
        RunError: There is no such encoding, or a file of two or four bytes per character is invalid.
    """
    name, is_wide = str(path.absolute()), encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))
    with open_text(path) as raw:
        file: Any = io.TextIOWrapper(raw, encoding) if is_wide else raw
        for number in itertools.count(1):
            try:
                line = file.readline(MAX_LINE_BYTES + 1)
                too_long = len(line) > MAX_LINE_BYTES
                while too_long and line and line[-1:] not in ("\n", b"\n"):
                    line = file.readline(1 << 20)
            except UnicodeDecodeError as error:
                raise RunError(f"{path}: not {encoding} ({error}); name its encoding with --encoding") from None
            except (OSError, EOFError, zlib.error) as error:
                yield ImportFault(name, number, "", "damaged_file", f"reading stops here: {error}")
                return
            if too_long:
                yield ImportFault(name, number, "", "line_too_long", f"over {MAX_LINE_BYTES >> 20} MiB")
                continue
            if not line:
                return
            try:
                text = line if isinstance(line, str) else line.decode(encoding)
            except UnicodeDecodeError as error:
                yield ImportFault(name, number, "", "bad_encoding", f"not {encoding} (at byte {error.start})")
                continue
            yield Line(number, text.lstrip("\ufeff").rstrip("\r\n").replace("\0", ""))


def _find_separator(lines: list[str]) -> str:
    """The separator that gives most lines the same number of fields, and more than one; "" if there is none."""
    best, best_score = "", (False, 0.0, 1)
    for separator in SEPARATORS:
        try:
            rows = list(csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE if separator == "\t" else 0))
        except csv.Error:
            continue
        widths = Counter(len(row) for row in rows if len(row) > 1)
        width, count = max(widths.items(), key=lambda item: (item[1], item[0]), default=(1, 0))
        starts_so = width > 1 and len(rows[0]) == width  # the first line has the headings
        score = (starts_so, round(count / max(1, len(rows)), 1), width)
        if score > best_score:
            best, best_score = separator, score
    return best


def _tabs_are_quoted(lines: list[str]) -> bool:
    """Whether quotes enclose fields of a table with tabs, as spreadsheets write them: every opened quote is closed."""
    quoted = [field for line in lines for field in line.split("\t") if field.startswith('"')]
    return bool(quoted) and all(len(field) > 1 and field.endswith('"') for field in quoted)


def _choose_sheet(path: Path, sheet: str) -> str:
    with library_errors(f"{path}: cannot be read as an Excel file"):
        book = _workbook(path)
        names = book.sheetnames
        if sheet and sheet not in names:
            raise RunError(f"--sheet {sheet}: {path} has the sheets {', '.join(names)}")
        filled = (name for name in names if any(any(row) for row in book[name].iter_rows(max_row=9, values_only=True)))
        chosen = sheet or next(filled, "")
        book.close()
    if not chosen:
        raise RunError(f"{path}: no sheet has rows")
    return chosen


def _workbook(path: Path) -> Any:
    import openpyxl

    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_SHEET_BYTES:
        raise RunError(f"{path}: {unpacked >> 20} MiB unpacked, over {MAX_SHEET_BYTES >> 20}; save it as CSV")
    return openpyxl.load_workbook(path, read_only=True, data_only=True)


def _cell_text(value: Any) -> str:
    """Text of an Excel cell: times of day and time spans as h:mm:ss, whole numbers without a fraction."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ")
    return str(value)
