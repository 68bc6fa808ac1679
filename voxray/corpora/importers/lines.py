"""Lines and records of text files, plain or gzipped, one at a time, each fault with its line."""

import codecs
import contextlib
import csv
import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import MAX_LINE_BYTES, open_regular
from voxray.corpora.importers.row import ImportFault, Record, parse_object

_HANGUL = re.compile("[가-힣]")


class Line(NamedTuple):
    number: int
    text: str


def text_lines(path: Path, korean_code_page: bool = False) -> Iterator[Line | ImportFault]:
    """Yield the lines of a file that are not blank, without their ends; a byte-order mark is passed over.

    Lines that are not UTF-8, or too long, are faults; so is the place where a gzip file breaks off.

    Args:
        path: The file; gzip is recognised by its first two bytes.
        korean_code_page: Take a line that is not UTF-8 for cp949.
    Raises:
        RunError: The file cannot be opened.
    """
    name, number = str(path.absolute()), 0
    with open_text(path) as file:
        while True:
            number += 1
            try:
                raw = file.readline(MAX_LINE_BYTES + 1)
                too_long = len(raw) > MAX_LINE_BYTES
                while too_long and raw and not raw.endswith(b"\n"):
                    raw = file.readline(1 << 20)
            except (OSError, EOFError, zlib.error) as error:
                yield ImportFault(name, number, "", "damaged_file", f"reading stops here: {error}")
                return
            if too_long:
                yield ImportFault(name, number, "", "line_too_long", f"over {MAX_LINE_BYTES >> 20} MiB")
                continue
            if not raw:
                return
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                try:
                    yield Line(number, decode_text(raw, korean_code_page).rstrip("\r\n"))
                except BadRow as error:
                    yield ImportFault(name, number, first_word(raw), error.reason, error.message)


def open_text(path: Path) -> BinaryIO:
    """Open a file for reading, through gzip if it is gzipped.

    Raises:
        RunError: It cannot be opened.
    """
    try:
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
    """Decode UTF-8, else cp949 if that is allowed; ``짙`` in cp949 is valid UTF-8 too, so Hangul decides.

    Raises:
        BadRow: Neither (``bad_encoding``).
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
    return korean if korean and _HANGUL.search(korean) and not re.search("[ᄀ-ᇿ가-힣]", text) else text


def first_word(raw: bytes) -> str:
    """What can be said of a line that cannot be decoded: its first word, if that is plain ASCII."""
    word = raw.split(maxsplit=1)[0][:200]
    return word.decode("ascii") if word.isascii() and not word.startswith((b"{", b"[")) else ""


def json_lines(path: Path) -> Iterator[Record | ImportFault]:
    """The objects of a JSON Lines file."""
    name = str(path.absolute())
    for line in text_lines(path):
        if isinstance(line, ImportFault):
            yield line
            continue
        try:
            yield Record(name, line.number, parse_object(line.text))
        except BadRow as error:
            yield ImportFault(name, line.number, "", error.reason, error.message)


def tab_lines(path: Path) -> Iterator[Record | ImportFault]:
    """The rows of a tab-separated table with a header; quotes are plain characters, as Common Voice writes them."""
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


def csv_records(path: Path) -> Iterator[Record | ImportFault]:
    """The rows of a comma-separated table with a header.

    A quote that is never closed swallows the lines behind it; each of them is a fault of its own.
    """
    name, faults, consumed = str(path.absolute()), list[ImportFault](), list[int]()

    def lines() -> Iterator[str]:
        for line in text_lines(path):
            if isinstance(line, ImportFault):
                faults.append(line)
            else:
                consumed.append(line.number)
                yield line.text + "\n"

    reader, header = csv.reader(lines(), strict=True), None
    while True:
        fields, problem = [], ("bad_csv", "")
        try:
            fields = next(reader)
        except StopIteration:
            yield from faults
            return
        except csv.Error as error:
            problem = ("bad_csv", str(error))
        if header is None and (faults or problem[1]):
            raise RunError(f"{path}:1: the header cannot be read: {problem[1] or faults[0].message}")
        if fields and header and len(fields) != len(header):
            problem = ("bad_row", f"{len(fields)} fields under {len(header)} headings")
        if problem[1]:
            yield from (ImportFault(name, number, "", *problem) for number in consumed)
        elif header is None:
            header = fields
        elif fields:
            yield Record(name, consumed[0], dict(zip(header, fields, strict=True)))
        yield from faults
        faults.clear()
        consumed.clear()


def array_objects(path: Path, key: str) -> Iterator[Record | ImportFault]:
    """The objects of ``{"key": [{...}, ...]}``, one by one, however large the file.

    Each element is cut out by its brackets and parsed by itself, so that a broken one is one fault.
    """
    name, element, start, line = str(path.absolute()), list[str](), 0, 0
    in_array, found, depth = False, False, 0
    for token in _json_tokens(path):
        if isinstance(token, ImportFault):
            yield token
            return
        line, text = token
        if not in_array:
            element = [*element, text][-3:] if text.strip() else element
            depth += (text in "{[") - (text in "}]")
            if depth == 2 and [part.strip() for part in element] == [f'"{key}"', ":", "["]:
                in_array, found, depth, element = True, True, 0, []
            elif found and depth == 2 and element[-2:] == [",", "{"]:
                yield ImportFault(name, line, "", "damaged_file", f"an object behind the end of the list {key!r}")
                return
            continue
        if depth == 0 and text in ",]":
            if "".join(element).strip():
                yield _element(name, start, "".join(element))
            element, in_array, depth = [], text == ",", 0 if text == "," else 1
            continue
        start = start if element else line
        depth = max(0, depth + (text in "{[") - (text in "}]"))
        if text.strip() or element:
            element.append(text)
    if in_array:
        message = f"the file ends inside the list {key!r}, which is cut off"
        yield ImportFault(name, start if element else line, "", "damaged_file", message)
    elif not found:
        yield ImportFault(name, 1, "", "bad_json", f'no {{"{key}": [...]}} in it')


def _element(name: str, line: int, text: str) -> Record | ImportFault:
    try:
        text.encode("utf-8")
        return Record(name, line, parse_object(text))
    except UnicodeEncodeError:
        return ImportFault(name, line, "", "bad_encoding", "not UTF-8")
    except BadRow as error:
        return ImportFault(name, line, "", error.reason, error.message)


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|\s+|[^"{}\[\],:\s]+|"', re.DOTALL)


def _json_tokens(path: Path) -> Iterator[tuple[int, str] | ImportFault]:
    """Each string, bracket, comma, colon and what lies between them, with the line it begins on."""
    number, rest = 1, ""
    for chunk in _chunks(path):
        if isinstance(chunk, ImportFault):
            yield chunk
            return
        tokens = _TOKEN.findall(rest + chunk)
        rest = ""
        # What the next chunk may continue waits for it: a string that is still open, and the last token.
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
    """A file's text in pieces of 64 KiB, an empty one last; bytes that are not UTF-8 become lone surrogates."""
    decoder: Any = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    with open_text(path) as file:
        while True:
            try:
                raw = file.read(1 << 16)
            except (OSError, EOFError, zlib.error) as error:
                yield ImportFault(str(path.absolute()), 1, "", "damaged_file", f"reading stops: {error}")
                return
            text = decoder.decode(raw, final=not raw)
            if text or not raw:  # "" in the middle (half a character) would say that the file ends
                yield text
            if not raw:
                return
