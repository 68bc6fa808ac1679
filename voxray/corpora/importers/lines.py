"""Read lines and records of text files, plain or gzipped, one at a time. Every fault has its line."""

import codecs
import contextlib
import csv
import gzip
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from voxray.core.errors import BadRow, RunError
from voxray.core.lfs import POINTER, find_pointer
from voxray.core.manifest import MAX_LINE_BYTES, open_regular
from voxray.corpora.importers.row import ImportFault, Record, parse_object

HANGUL = re.compile("[가-힣]")


class Line(NamedTuple):
    number: int
    text: str


def text_lines(path: Path, korean_code_page: bool = False) -> Iterator[Line | ImportFault]:
    """Yield the non-blank lines of a file without line ends. A byte-order mark is skipped.

    Lines that are not UTF-8 or too long are faults. The end of a truncated gzip file is a fault, too.

    Args:
        path: The file. gzip is detected by its first two bytes.
        korean_code_page: Decode lines that are not UTF-8 as cp949.
    Raises:
        RunError: The file cannot be opened.
    """
    name = str(path.absolute())
    with open_text(path) as file:
        for item in bounded_lines(name, file):
            if isinstance(item, ImportFault):
                yield item
                continue
            number, raw = item
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                try:
                    yield Line(number, decode_text(raw, korean_code_page).rstrip("\r\n"))
                except BadRow as error:
                    yield ImportFault(name, number, first_word(raw), error.reason, error.message)


def bounded_lines(name: str, file: Any) -> Iterator[tuple[int, Any] | ImportFault]:
    """The lines of an open file with their numbers from 1. One that is too long is a fault, and so is a damaged end.

    Args:
        name: The file in faults.
        file: A file of bytes or of text; the lines are of the same type.
    """
    for number in itertools.count(1):
        try:
            line = file.readline(MAX_LINE_BYTES + 1)
            too_long = len(line) > MAX_LINE_BYTES
            while too_long and line and line[-1:] not in ("\n", b"\n"):
                line = file.readline(1 << 20)
        except (OSError, EOFError, zlib.error) as error:
            yield ImportFault(name, number, "", "damaged_file", f"reading stops here: {error}")
            return
        if too_long:
            yield ImportFault(name, number, "", "line_too_long", f"over {MAX_LINE_BYTES >> 20} MiB")
        elif line:
            yield number, line
        else:
            return


def open_text(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if it is gzipped.

    Raises:
        RunError: It cannot be opened.
    """
    try:
        if find_pointer(path):
            raise RunError(f"{path}: {POINTER}")
        file = open_regular(path)  # the caller closes it
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
    except OSError as error:
        raise RunError(f"{path}: cannot read it: {error.strerror}") from error
    if not is_gzip:
        return file
    file.close()
    return cast(BinaryIO, gzip.open(path, "rb"))


def decode_text(raw: bytes, korean_code_page: bool = False) -> str:
    """Decode UTF-8, else cp949 if allowed.

    A single syllable of cp949, such as ``짙``, may be valid UTF-8 as well (``£``). It is read as cp949 if nothing else
    in the text is beyond ASCII and it is no part of a Latin word, as ``é`` is in ``café``. Two and more are never valid
    by accident.

    Raises:
        BadRow: The bytes are neither (``bad_encoding``).
    """
    korean = None
    if korean_code_page and not raw.isascii():
        with contextlib.suppress(UnicodeDecodeError):
            korean = raw.decode("cp949")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if korean is not None:
            return korean
        encodings = "UTF-8 nor cp949" if korean_code_page else "UTF-8"
        raise BadRow("bad_encoding", f"not {encodings} ({error.reason} at byte {error.start})") from None
    if korean and HANGUL.fullmatch("".join(char for char in korean if not char.isascii())):
        beyond_ascii = [index for index, char in enumerate(text) if not char.isascii()]
        around = text[max(0, beyond_ascii[0] - 1) : beyond_ascii[0]] + text[beyond_ascii[0] + 1 : beyond_ascii[0] + 2]
        if len(beyond_ascii) == 1 and not HANGUL.search(text) and not re.search("[A-Za-z]", around):
            return korean
    return text


def first_word(raw: bytes) -> str:
    """First word of a line that cannot be decoded, as its id: "" if it is not ASCII or begins JSON."""
    word = raw.split(maxsplit=1)[0][:200]
    return word.decode("ascii") if word.isascii() and not word.startswith((b"{", b"[")) else ""


def json_lines(path: Path) -> Iterator[Record | ImportFault]:
    """The objects of a JSON Lines file."""
    name = str(path.absolute())
    for line in text_lines(path):
        yield line if isinstance(line, ImportFault) else _json_record(name, line.number, line.text)


def tab_lines(path: Path) -> Iterator[Record | ImportFault]:
    """The rows of a tab-separated table with a header. Quotes are ordinary characters, as in Common Voice."""
    name, header = str(path.absolute()), None
    for line in text_lines(path):
        if isinstance(line, ImportFault):
            if header is None:
                raise RunError(f"{path}:{line.line}: the header cannot be read: {line.message}")
            yield line
            continue
        fields = line.text.split("\t")
        if header is None:
            header = fields
        elif len(fields) != len(header):
            yield ImportFault(name, line.number, "", "bad_row", f"{len(fields)} fields under {len(header)} headings")
        else:
            yield Record(name, line.number, dict(zip(header, fields, strict=True)))


CSV_MESSAGES = {
    "field larger than field limit": "a quote that is opened here is never closed, or a field is over 1 MB",
    "unexpected end of data": "a quote that is opened here is never closed",
}
csv.field_size_limit(1 << 20)


class Cells(NamedTuple):
    """A record of a separated table: the lines that it is on, and its fields."""

    lines: list[int]
    fields: list[str]


def csv_cells(
    name: str, lines: Iterable[Line | ImportFault], separator: str = ",", *, quoted: bool = True
) -> Iterator[Cells | ImportFault]:
    """The records of a table's lines.

    A quote that is never closed makes the following lines part of its field. Each of these lines becomes a fault.

    Args:
        name: The file in faults.
        quoted: Whether quotes enclose fields; otherwise they are ordinary characters.
    """
    faults, consumed = list[ImportFault](), list[int]()

    def texts() -> Iterator[str]:
        for line in lines:
            if isinstance(line, ImportFault):
                faults.append(line)
            else:
                consumed.append(line.number)
                yield line.text + "\n"

    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(texts(), delimiter=separator, quoting=quoting, strict=True)
    while True:
        fields, message = [], ""
        try:
            fields = next(reader)
        except StopIteration:
            yield from faults
            return
        except csv.Error as error:
            message = CSV_MESSAGES.get(str(error).partition(" (")[0], str(error))
        yield from faults
        if message:
            yield from (ImportFault(name, number, "", "bad_csv", message) for number in consumed)
        elif fields:
            yield Cells(list(consumed), fields)
        faults.clear()
        consumed.clear()


def csv_records(path: Path) -> Iterator[Record | ImportFault]:
    """The rows of a comma-separated table with a header."""
    name, header = str(path.absolute()), None
    for item in csv_cells(name, text_lines(path)):
        if isinstance(item, ImportFault):
            if header is None:
                raise RunError(f"{path}:1: the header cannot be read: {item.message}")
            yield item
        elif header is None:
            header = item.fields
        elif len(item.fields) != len(header):
            message = f"{len(item.fields)} fields under {len(header)} headings"
            yield from (ImportFault(name, number, "", "bad_row", message) for number in item.lines)
        else:
            yield Record(name, item.lines[0], dict(zip(header, item.fields, strict=True)))


def array_objects(path: Path, key: str = "") -> Iterator[Record | ImportFault]:
    """The objects of ``{"key": [{...}, ...]}``, or without a key of ``[{...}, ...]``, so files may be of any size.

    Each element is delimited by its brackets and parsed separately, so a broken element is one fault.
    """
    where, opening = (f"the list {key!r}", [f'"{key}"', ":", "["]) if key else ("the list", ["["])
    level = 2 if key else 1  # brackets that are open inside the list
    name, element, start, line = str(path.absolute()), list[str](), 0, 0
    in_array, has_array, depth = False, False, 0
    for token in _json_tokens(path):
        if isinstance(token, ImportFault):
            yield token
            return
        line, text = token
        if not in_array:
            element = [*element, text][-3:] if text.strip() else element
            depth += (text in "{[") - (text in "}]")
            if depth == level and [part.strip() for part in element] == opening:
                in_array, has_array, depth, element = True, True, 0, []
            elif has_array and depth == level and element[-2:] == [",", "{"]:
                yield ImportFault(name, line, "", "damaged_file", f"an object behind the end of {where}")
                return
            continue
        if depth == 0 and text in ",]":
            if "".join(element).strip():
                yield _json_record(name, start, "".join(element))
            element, in_array, depth = [], text == ",", 0 if text == "," else level - 1
            continue
        start = start if element else line
        depth = max(0, depth + (text in "{[") - (text in "}]"))
        if text.strip() or element:
            element.append(text)
    if in_array:
        message = f"the file ends inside {where}, which is cut off"
        yield ImportFault(name, start if element else line, "", "damaged_file", message)
    elif not has_array:
        yield ImportFault(name, 1, "", "bad_json", f'no {{"{key}": [...]}} in it' if key else "no list in it")


def _json_record(name: str, line: int, text: str) -> Record | ImportFault:
    """Parse one JSON object. Lone surrogates in the text stand for bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
        return Record(name, line, parse_object(text))
    except UnicodeEncodeError:
        return ImportFault(name, line, "", "bad_encoding", "not UTF-8")
    except BadRow as error:
        return ImportFault(name, line, "", error.reason, error.message)


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|\s+|[^"{}\[\],:\s]+|"', re.DOTALL)


def _json_tokens(path: Path) -> Iterator[tuple[int, str] | ImportFault]:
    """(line, token): each string, bracket, comma, colon and the text between them, with its first line."""
    number, rest = 1, ""
    for chunk in _chunks(path):
        if isinstance(chunk, ImportFault):
            yield chunk
            return
        tokens = _TOKEN.findall(rest + chunk)
        rest = ""
        # Keep tokens that the next chunk may continue: a string that is still open, or the last token.
        cut = next((index for index, token in enumerate(tokens) if token == '"'), len(tokens) - 1)
        if chunk:
            tokens, rest = tokens[:cut], "".join(tokens[cut:])
        if len(rest) > MAX_LINE_BYTES:
            yield ImportFault(str(path.absolute()), number, "", "bad_json", "a string is never closed")
            return
        for token in tokens:
            yield number, token
            number += token.count("\n")


def _chunks(path: Path) -> Iterator[str | ImportFault]:
    """A file's text in pieces of 64 KiB, the last one empty. Bytes that are not UTF-8 become lone surrogates."""
    decoder: Any = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    with open_text(path) as file:
        while True:
            try:
                raw = file.read(1 << 16)
            except (OSError, EOFError, zlib.error) as error:
                yield ImportFault(str(path.absolute()), 1, "", "damaged_file", f"reading stops: {error}")
                return
            text = decoder.decode(raw, final=not raw)
            if text or not raw:  # skip "" in the middle (half a character), since "" marks the end of the file
                yield text
            if not raw:
                return
