"""Tables as people have them: CSV and TSV in any encoding and with any separator, and Excel sheets."""

import codecs
import csv
import datetime
import io
import itertools
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxray.core.errors import RunError, is_utf8_text, library_errors
from voxray.core.manifest import MAX_LINE_BYTES, open_regular
from voxray.corpora.importers.lines import Cells, Line, bounded_lines, csv_cells, open_text
from voxray.corpora.importers.row import ImportFault

EXCEL = ".xlsx"
EXCEL_ERRORS = ("#N/A", "#NAME?", "#VALUE!", "#REF!", "#DIV/0!", "#NUM!", "#NULL!")
SUFFIXES = (".csv", ".tsv", ".txt", EXCEL)
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
TRIED_ENCODINGS = ("utf-8", "cp949")
LINES_TRIED = 50
HEAD_BYTES = 1 << 16
_COMMON = "".join(bytes((lead, trail)).decode("euc_kr") for lead in range(0xB0, 0xC9) for trail in range(0xA1, 0xFF))
_COMMON_SYLLABLE = re.compile(f"[{_COMMON}]")  # the 2,350 syllables of KS X 1001
_OTHER_LETTER = re.compile(rf"(?![{_COMMON}A-Za-z])[^\W\d_]")
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
        lines = (line for line in _lines(self.path, self.encoding) if not _states_separator(line))
        return csv_cells(str(self.path.absolute()), lines, self.separator, quoted=self.quoted)

    def _sheet_rows(self) -> Iterator[Cells]:
        with library_errors(f"{self.path}: cannot be read as an Excel file"):
            book = _workbook(self.path)
            try:
                sheet = book[self.sheet]
                sheet.reset_dimensions()  # those that the file states may be too small
                for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
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
    if sheet:
        raise RunError(f"--sheet {sheet}: {path} is not an Excel file")
    try:
        encoding = _check_encoding(encoding) if encoding else find_encoding(path)
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"{path}: damaged, reading stops: {error}") from None
    lines = [line.text for line in itertools.islice(_lines(path, encoding), LINES_TRIED) if isinstance(line, Line)]
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise RunError(f"{path}: no line of text in it")
    separator = _stated_separator(lines) or _find_separator(lines)
    if not separator:
        names = ", ".join(SEPARATORS.values())
        raise RunError(f"{path}: one column only: none of {names} separates its lines into the same number of fields")
    return TableFile(path, encoding, separator, _is_quoted(lines, separator))


def _check_encoding(name: str) -> str:
    """The name of a text encoding, without compressions, escapes and the like.

    Raises:
        RunError: Python has no such encoding.
    """
    try:
        codec = codecs.lookup(name)
        "가".encode(name, "replace").decode(name)
    except (LookupError, ValueError):
        raise RunError(f"--encoding {name}: Python has no such text encoding") from None
    if codec.name.replace("_", "-") in ("utf-7", "unicode-escape", "raw-unicode-escape", "idna", "punycode"):
        raise RunError(f"--encoding {name}: not an encoding of tables")
    return codec.name


def _states_separator(line: Line | ImportFault) -> bool:
    return isinstance(line, Line) and line.number == 1 and bool(_stated_separator([line.text]))


def _stated_separator(lines: list[str]) -> str:
    """The separator in a first line ``sep=;``, as Excel writes and reads it; "" without such a line."""
    match = re.fullmatch(r'"?sep=(.)"?', lines[0].strip())
    return match[1] if match and match[1] in SEPARATORS else ""


def find_encoding(path: Path) -> str:
    """Encoding of a text file: from its byte-order mark, else UTF-8 or cp949, in which fewer lines are invalid.

    Korean texts of Windows programs are cp949. Hardly any of their lines is valid UTF-8. Other encodings, such as
    cp1252, GBK and Shift-JIS, are often valid cp949 too, but give few of the syllables that Korean texts consist of.

    Raises:
        RunError: Half of the lines or more are invalid in both, or cp949 does not give Korean text.
    """
    num_lines, num_bad = 0, dict.fromkeys(TRIED_ENCODINGS, 0)
    num_korean, num_others = 0, 0
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
                    text = line.decode(name)
                except UnicodeDecodeError:
                    num_bad[name] += 1
                    continue
                if name == "cp949" and not line.isascii():
                    num_korean += len(_COMMON_SYLLABLE.findall(text))
                    num_others += len(_OTHER_LETTER.findall(text))
    best = min(num_bad, key=lambda name: num_bad[name])  # of equal ones UTF-8
    if num_bad[best] * 2 > num_lines or (best == "cp949" and num_others * 4 > num_korean):
        raise RunError(f"{path}: neither {' nor '.join(TRIED_ENCODINGS)}; name its encoding with --encoding")
    return best


def _lines(path: Path, encoding: str) -> Iterator[Line | ImportFault]:
    """The lines of a text file without their ends. A line that is invalid in the encoding is a fault.

    Raises:
        RunError: There is no such encoding, or a file of two or four bytes per character is invalid.
    """
    name, is_wide = str(path.absolute()), encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))
    with open_text(path) as raw:
        head = raw.read(HEAD_BYTES)
        raw.seek(0)
        has_returns = b"\r" in head and b"\n" not in head  # line ends of old Macs
        file: Any = io.TextIOWrapper(raw, encoding) if is_wide or has_returns else raw
        try:
            for item in bounded_lines(name, file):
                yield item if isinstance(item, ImportFault) else _decoded(name, *item, encoding)
        except UnicodeDecodeError as error:
            raise RunError(f"{path}: not {encoding} ({error}); name its encoding with --encoding") from None


def _decoded(name: str, number: int, line: str | bytes, encoding: str) -> Line | ImportFault:
    try:
        text = line if isinstance(line, str) else line.decode(encoding)
    except UnicodeDecodeError as error:
        return ImportFault(name, number, "", "bad_encoding", f"not {encoding} (at byte {error.start})")
    if not is_utf8_text(text):
        return ImportFault(name, number, "", "bad_encoding", f"half a character in {encoding}")
    return Line(number, text.lstrip("\ufeff").rstrip("\r\n").replace("\0", ""))


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


def _is_quoted(lines: list[str], separator: str) -> bool:
    """Whether quotes enclose fields, as spreadsheets write them. Tables with tabs and bars often have plain quotes."""
    if separator in ",;":
        return True
    quoted = [field for line in lines for field in line.split(separator) if field.startswith('"')]
    return bool(quoted) and all(len(field) > 1 and field.endswith('"') for field in quoted)


def _choose_sheet(path: Path, sheet: str) -> str:
    with library_errors(f"{path}: cannot be read as an Excel file"):
        book = _workbook(path)
        names = [page.title for page in book.worksheets]  # without charts
        if sheet and sheet not in names:
            raise RunError(f"--sheet {sheet}: {path} has the sheets {', '.join(names)}")
        chosen = sheet or next((name for name in names if _has_rows(book[name])), "")
        book.close()
    if not chosen:
        raise RunError(f"{path}: no sheet has rows")
    return chosen


def _has_rows(sheet: Any) -> bool:
    sheet.reset_dimensions()
    return any(any(cell is not None for cell in row) for row in itertools.islice(sheet.iter_rows(values_only=True), 9))


def _workbook(path: Path) -> Any:
    import openpyxl

    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > MAX_SHEET_BYTES:
        raise RunError(f"{path}: {unpacked >> 20} MiB unpacked, over {MAX_SHEET_BYTES >> 20}; save it as CSV")
    return openpyxl.load_workbook(path, read_only=True, data_only=True)


def _cell_text(value: Any) -> str:
    """Text of an Excel cell: times of day and time spans as h:mm:ss, whole numbers without a fraction."""
    if value is None or value in EXCEL_ERRORS:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ")
    return str(value)
