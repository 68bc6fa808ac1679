"""Manifests: JSON Lines files with one training or evaluation row per line.

Reading never holds a whole file: the driver walks it once to cut it into chunks of lines (``chunks``), and whoever
processes a chunk reads just its bytes (``read_chunk``). Every row and every error knows its file and line.
"""

import errno
import hashlib
import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from voxray.core.errors import BadRow, RunError
from voxray.core.source import Segment, segment, segments
from voxray.core.tasks import TASKS, Task, detect_task

MAX_LINE_BYTES = 64 << 20
"""A longer line is no row of a manifest; without a limit, one file without line ends would fill the memory."""
UNLABELLED = "unlabelled"
"""Key of a row that is to be answered, with no text to hold the answer against."""
OLD_CACHE_SUFFIXES = (".pt", ".pth")


@dataclass(frozen=True)
class Sample:
    """One usable row.

    Attributes:
        id: The row's own ``id`` if that is text or a number, else ``<file name>:<line>``.
        task: Its entry in the task table.
        prompt: The user's text; empty for a transcription request.
        answer: The text to be produced.
        audio_path: Absolute path of the clip, or "" for text tasks.
        language: Two-letter code, or "" when the row has none.
        source: ``<manifest>:<line>``, for messages.
        start_sec: Where in the file the clip begins.
        duration_sec: How long it is; 0 takes all from ``start_sec`` on.
        channel: Channel to take, from 0; -1 averages all.
        segments: When the parts of the transcript are said, if the row says so.
    """

    id: str
    task: Task
    prompt: str
    answer: str
    audio_path: str
    language: str
    source: str
    start_sec: float = 0.0
    duration_sec: float = 0.0
    channel: int = -1
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Chunk:
    """A run of whole lines of one manifest.

    Attributes:
        manifest: Absolute path of the file.
        number: Position of the chunk in its manifest, from 0.
        start: First byte.
        end: Byte after the last.
        first_line: Line number of the first line, from 1.
        num_lines: Lines in the chunk, blank ones included.
    """

    manifest: str
    number: int
    start: int
    end: int
    first_line: int
    num_lines: int

    def read_bytes(self) -> bytes:
        with open(self.manifest, "rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start)


@dataclass
class ChunkRows:
    """What a chunk holds: usable samples and the rows that are not, each with its line."""

    samples: list[Sample] = field(default_factory=list)
    bad: list[tuple[int, BadRow]] = field(default_factory=list)


def chunks(manifest: str, lines_per_chunk: int) -> Iterator[Chunk]:
    """Cut a manifest into runs of lines, reading it once with flat memory.

    Raises:
        RunError: The file is missing, no regular file, cannot be read, is empty, or has a line of over 64 MiB.
    """
    number, start, position, first_line, line = 0, 0, 0, 1, 0
    try:
        manifest.encode("utf-8")
        with open_regular(manifest) as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                position += len(raw)
                line += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise RunError(f"{manifest}:{line}: a line of over {MAX_LINE_BYTES >> 20} MiB is no row")
                if line - first_line + 1 == lines_per_chunk:
                    yield Chunk(manifest, number, start, position, first_line, lines_per_chunk)
                    number, start, first_line = number + 1, position, line + 1
    except OSError as error:
        raise RunError(f"{manifest}: cannot read the manifest: {error.strerror}") from error
    except UnicodeEncodeError:
        raise RunError(f"{manifest!a}: cannot use the manifest: its path is not UTF-8; rename it") from None
    if position > start:
        yield Chunk(manifest, number, start, position, first_line, line - first_line + 1)
    if position == 0:
        raise RunError(f"{manifest}: the manifest is empty")


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading; a pipe, which might wait for ever, or a device, which might never end, is refused.

    Raises:
        OSError: It is no regular file, or cannot be opened.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, open() has its own say
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def read_chunk(chunk: Chunk, raw: bytes | None = None) -> ChunkRows:
    """Parse the rows of a chunk; bad ones come back with their reason, blank lines are passed over."""
    rows = ChunkRows()
    for offset, line in enumerate((chunk.read_bytes() if raw is None else raw).split(b"\n")):
        number = chunk.first_line + offset
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            rows.samples.append(parse_row(line, chunk.manifest, number))
        except BadRow as error:
            rows.bad.append((number, error))
    return rows


def parse_row(line: bytes, manifest: str, number: int) -> Sample:
    """Check one line of a manifest.

    Raises:
        BadRow: Not UTF-8, not a JSON object, of no known task, of an old feature cache, or with a value of the wrong
            kind.
    """
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\u" in line:  # half of a surrogate pair can be escaped in JSON, but is no text that could be stored
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("bad_utf8", f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except UnicodeEncodeError as error:
        raise BadRow("bad_utf8", f"not Unicode text ({error.object[error.start]!a}: {error.reason})") from None
    except (ValueError, RecursionError) as error:  # ValueError: broken JSON, and integers of over 4,300 digits
        raise BadRow("bad_json", f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRow("bad_row", f"a JSON {type(row).__name__}, not an object")
    refuse_old_cache(row)
    task = check_values(row)
    answer = row[task.answer_key].strip()
    if not answer and not task.allows_empty_answer and row.get(UNLABELLED) is not True:
        raise BadRow("empty_text", f"{task.answer_key} is empty")
    audio_path = _audio_path(row["audio_path"], manifest) if task.has_audio else ""
    row_id = str(row["id"]) if is_id(row.get("id")) else f"{Path(manifest).name}:{number}"
    language, source = language_code(row.get("language")), f"{manifest}:{number}"
    where = (*segment(row), segments(row))
    return Sample(row_id, task, task.prompt(row), answer, audio_path, language, source, *where)


def samples_at(sources: Iterable[str], lines_per_chunk: int = 256) -> Iterator[Sample]:
    """The usable rows at some places, manifest by manifest in order of their lines.

    Args:
        sources: ``<manifest>:<line>`` of each.
    """
    lines: dict[str, set[int]] = {}
    for source in sources:
        manifest, _, line = source.rpartition(":")
        lines.setdefault(manifest, set()).add(int(line))
    for manifest, wanted in sorted(lines.items()):
        for chunk in chunks(manifest, lines_per_chunk):
            if any(chunk.first_line <= line < chunk.first_line + chunk.num_lines for line in wanted):
                for sample in read_chunk(chunk).samples:
                    if int(sample.source.rpartition(":")[2]) in wanted:
                        yield sample


def is_id(value: Any) -> bool:
    """Whether a value can name a row; another one is as good as none."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def check_values(row: dict[str, Any]) -> Task:
    """Find a row's task and check the values that voxray uses, except the answer's text and the audio.

    Raises:
        BadRow: ``unknown_task``, ``bad_type``, ``empty_text``, ``bad_language`` or ``bad_segment``.
    """
    try:
        task = detect_task(row)
    except ValueError as error:
        raise BadRow("unknown_task", str(error)) from None
    for key in (*task.keys, *task.prompt_keys, "language"):
        if row.get(key) is not None and not isinstance(row[key], str):
            raise BadRow("bad_type", f"{key} is {type(row[key]).__name__}, not text")
        if key in task.keys and row[key] is None:
            raise BadRow("bad_type", f"{key} is null")
    for key in task.prompt_keys[:1]:
        if not (row.get(key) or task.default_prompt).strip():
            raise BadRow("empty_text", f"{key} is empty")
    language_code(row.get("language"))
    segment(row)
    return task


def refuse_old_cache(row: dict[str, Any]) -> None:
    """Refuse a row of the feature caches that ``build_cache.py`` once made: JSON Lines that point to .pt files.

    A row that has audio beside its .pt file is no such row; nor is one of text alone.

    Raises:
        BadRow: ``old_cache``; the message names the file and the command that makes features.
    """
    audio_path = row.get("audio_path")
    if audio_path in (None, ""):
        if any(not task.has_audio and all(key in row for key in task.keys) for task in TASKS.values()):
            return
        values = row.values()
    else:
        values = (audio_path,)
    for value in values:
        if isinstance(value, str) and value.lower().endswith(OLD_CACHE_SUFFIXES):
            raise BadRow(
                "old_cache",
                f"{value[-200:]} is of an old feature cache, which is not read; make features of the audio: "
                "python jobs/featurize.py --manifest <the JSONL with audio_path>",
            )


def _audio_path(value: str, manifest: str) -> str:
    """Resolve a clip's path against the manifest's folder, else the current one; NFC and NFD names both find it."""
    if not value.strip():
        raise BadRow("empty_text", "audio_path is empty")
    if "\0" in value:
        raise BadRow("audio_missing", "audio_path holds a zero byte")
    bases = (Path(manifest).parent, Path.cwd())
    for base in bases:
        found = find_file(base, value)
        if found:
            return found
    kind = "not an audio file" if any(os.path.exists(base / value) for base in bases) else "audio file not found"
    raise BadRow("audio_missing", f"{kind}: {value}")


def find_file(base: Path, value: str) -> str:
    """The path of a regular file under a folder, also where the disk spells a name NFD and the list NFC or the reverse.

    Returns:
        The path, "" if there is none: for a folder, a pipe, a device, a loop of links or a name too long as well.
    """
    if os.path.isfile(path := base / value):
        return str(path)
    if value.isascii():
        return ""
    found = base
    for part in Path(value).parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        fitting = next((found / form for form in forms if os.path.lexists(found / form)), None)
        if fitting is None:
            return ""
        found = fitting
    return str(found) if os.path.isfile(found) else ""


def language_code(value: str | None) -> str:
    """``ko``, ``ko-KR``, ``Korean`` -> ``ko``; None and "" -> "".

    Raises:
        BadRow: It is no two-letter code.
    """
    text = (value or "").strip().lower().replace("_", "-").split("-")[0]
    text = {"korean": "ko", "english": "en", "kor": "ko", "eng": "en", "auto": ""}.get(text, text)
    if text and not (len(text) == 2 and text.isascii() and text.isalpha()):
        raise BadRow("bad_language", f"language {value!r} is not a two-letter code")
    return text


def require_usable_row(manifests: tuple[str, ...], lines_per_chunk: int = 64) -> None:
    """Make sure on the driver, before any process starts, that the manifests hold at least one row to work with.

    Stops reading at the first usable row of each file, so it costs nothing on good data.

    Raises:
        RunError: A manifest cannot be read, or none of its rows is usable; names the first bad line.
    """
    for manifest in manifests:
        first: tuple[int, BadRow] | None = None
        for chunk in chunks(manifest, lines_per_chunk):
            rows = read_chunk(chunk)
            if rows.samples:
                break
            first = first or (rows.bad[0] if rows.bad else None)
        else:
            if first is None:
                raise RunError(f"{manifest}:1: no usable row, every line is blank")
            raise RunError(f"{manifest}:{first[0]}: no usable row in this manifest; the first fault: {first[1]}")


def sha256_hex(raw: bytes) -> str:
    """Content hash used for manifests and clips."""
    return hashlib.sha256(raw).hexdigest()
