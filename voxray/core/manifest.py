"""Manifests: JSON Lines files with one training or evaluation row per line.

No file is held in memory as a whole. The driver reads it once to cut it into chunks of lines (``chunks``). The worker
that processes a chunk reads only the bytes of that chunk (``read_chunk``). Every row and every error has its file and
line.
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

from voxray.core.chat import UNLABELLED, Turn, read_chat, task_keys
from voxray.core.context import context_of_row
from voxray.core.errors import BadRow, RunError
from voxray.core.languages import language_code
from voxray.core.lfs import POINTER, POINTER_START
from voxray.core.project_files import typed_command
from voxray.core.source import Segment, Source, segment, segments
from voxray.core.task_definitions import TARGET_LANGUAGE
from voxray.core.tasks import TASKS, Task, detect_task

MAX_LINE_BYTES = 64 << 20
"""Longest line accepted. Without a limit, a file without line ends would fill the memory."""
MAX_SHOWN_PATH = 300
"""Characters of a row's audio path that a message shows."""
OLD_CACHE_SUFFIXES = (".pt", ".pth")


@dataclass(frozen=True)
class Sample:
    """One usable row.

    Attributes:
        id: The row's own ``id`` if that is text or a number, else ``<file name>:<line>``.
        task: Entry of the row's task in the task table.
        prompt: The user's text; of a transcription its context, or empty; of a chat all turns before the last answer.
        answer: The text that the model is to produce.
        audio_path: Absolute path of the clip, or "" for text tasks.
        language: Code of the language (``core/languages.py``), or "" if the row has none.
        source: ``<manifest>:<line>``.
        start_sec: Start of the clip in the file.
        duration_sec: Length of the clip; 0 takes everything from ``start_sec``.
        channel: Channel to read, from 0; -1 averages all channels.
        segments: Timed parts of the transcript, if the row has them; empty for a translation.
        turns: Of a chat, the turns before the last answer.
        target_language: Code of the language to translate into; "" for other tasks.
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
    turns: tuple[Turn, ...] = ()
    target_language: str = ""


@dataclass(frozen=True)
class Chunk:
    """A run of whole lines of one manifest.

    Attributes:
        manifest: Absolute path of the file.
        number: Position of the chunk in its manifest, from 0.
        start: Offset of the first byte.
        end: Offset after the last byte.
        first_line: Line number of the first line, from 1.
        num_lines: Number of lines, including blank ones.
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
    """Usable samples of a chunk, and (line number, fault) of each bad row."""

    samples: list[Sample] = field(default_factory=list)
    bad: list[tuple[int, BadRow]] = field(default_factory=list)


def chunks(manifest: str, lines_per_chunk: int) -> Iterator[Chunk]:
    """Cut a manifest into runs of lines. Reads it once, in constant memory.

    Raises:
        RunError: The file is missing, is not a regular file, cannot be read, is empty, is a Git LFS pointer, or has a
            line of over 64 MiB.
    """
    number, start, position, first_line, line = 0, 0, 0, 1, 0
    try:
        manifest.encode("utf-8")
        with open_regular(manifest) as file:
            while raw := file.readline(MAX_LINE_BYTES + 1):
                if position == 0 and raw.startswith(POINTER_START):
                    raise RunError(f"{manifest}: {POINTER}")
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
    """Open a regular file for reading. A pipe could block for ever and a device might never end: both are refused.

    Raises:
        OSError: It is not a regular file, or cannot be opened.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # open() raises its own error for a folder
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb")


def read_chunk(chunk: Chunk, raw: bytes | None = None) -> ChunkRows:
    """Parse the rows of a chunk. Bad rows are returned with their reason; blank lines are skipped.

    Args:
        raw: The chunk's bytes, if they have been read already.
    """
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
        BadRow: The line is not UTF-8, is not a JSON object, matches no task, belongs to an old feature cache, or has a
            value of the wrong type.
    """
    try:
        row = json.loads(line.decode("utf-8"))
        if b"\\u" in line:  # JSON can escape half of a surrogate pair, which UTF-8 cannot store
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
    chat = read_chat(row) if task.template == "conversation" else None
    answer = chat.answer if chat else row[task.answer_key].strip()
    if not answer and not task.allows_empty_answer and row.get(UNLABELLED) is not True:
        raise BadRow("empty_text", f"{task.answer_key} is empty")
    audio_path = _audio_path(chat.clip if chat else row["audio_path"], manifest) if task.has_audio else ""
    row_id = str(row["id"]) if is_id(row.get("id")) else f"{Path(manifest).name}:{number}"
    language, source = language_code(row.get("language")), str(Source(manifest, number))
    prompt, turns = (chat.prompt, chat.turns) if chat else (task.prompt(row), ())
    if task.template == "transcription":
        prompt = context_of_row(row)
    is_translation = task.template == "translation"  # segments are those of a transcript
    timed, target = ((), language_code(row[TARGET_LANGUAGE])) if is_translation else (segments(row), "")
    part = segment(row)
    return Sample(row_id, task, prompt, answer, audio_path, language, source, *part, timed, turns, target)


def samples_at(sources: Iterable[str], lines_per_chunk: int = 256) -> Iterator[Sample]:
    """Read the usable rows among the given lines, manifest by manifest, in line order.

    Args:
        sources: ``<manifest>:<line>`` of each row.
    """
    lines_of: dict[str, set[int]] = {}
    for manifest, line in map(Source.parse, sources):
        lines_of.setdefault(manifest, set()).add(line)
    for manifest, lines in sorted(lines_of.items()):
        for chunk in chunks(manifest, lines_per_chunk):
            if any(chunk.first_line <= line < chunk.first_line + chunk.num_lines for line in lines):
                yield from (sample for sample in read_chunk(chunk).samples if Source.parse(sample.source).line in lines)


def is_id(value: Any) -> bool:
    """Whether a value is usable as a row's id. A row with another value is treated as a row without id."""
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def check_values(row: dict[str, Any]) -> Task:
    """Detect a row's task and check the values that voxray uses, except the answer's text and the audio.

    Raises:
        BadRow: ``unknown_task``, ``bad_type``, ``empty_text``, ``bad_language``, ``bad_segment``, or as ``read_chat``.
    """
    try:
        task = detect_task(row)
    except ValueError as error:
        raise BadRow("unknown_task", str(error)) from None
    keys = task.keys
    if task.template == "conversation":
        if read_chat(row).clip and not task.has_audio:
            raise BadRow("unsupported_chat", f"the chat has a clip, and the task {task.name} has no key audio_path")
        keys = tuple(key for key in keys if key not in ("messages", "audio_path"))
    for key in (*keys, *task.prompt_keys, "language"):
        if row.get(key) is not None and not isinstance(row[key], str):
            raise BadRow("bad_type", f"{key} is {type(row[key]).__name__}, not text")
        if key in keys and row[key] is None:
            raise BadRow("bad_type", f"{key} is null")
    empty = [key for key in task.prompt_keys if key in task.keys and not row[key].strip()]
    if empty or (task.prompt_text and not task.prompt(row).strip()):
        raise BadRow("empty_text", f"{(*empty, *task.prompt_keys)[0]} is empty")
    language_code(row.get("language"))
    if TARGET_LANGUAGE in task.keys and not language_code(row[TARGET_LANGUAGE], TARGET_LANGUAGE):
        raise BadRow("bad_language", f"{TARGET_LANGUAGE} {row[TARGET_LANGUAGE]!r} names no language")
    segment(row)
    if task.template == "transcription":
        context_of_row(row)
    return task


def refuse_old_cache(row: dict[str, Any]) -> None:
    """Refuse a row of the feature caches that ``build_cache.py`` used to write: JSON Lines that point to .pt files.

    Rows that also name an audio file, and rows of text tasks, are accepted.

    Raises:
        BadRow: ``old_cache``; the message names the file and the command that makes features.
    """
    audio_path = row.get("audio_path")
    if audio_path in (None, ""):
        if any(not task.has_audio and all(key in task_keys(row) for key in task.keys) for task in TASKS.values()):
            return
        values = row.values()
    else:
        values = (audio_path,)
    for value in values:
        if isinstance(value, str) and value.lower().endswith(OLD_CACHE_SUFFIXES):
            raise BadRow(
                "old_cache",
                f"{value[-200:]} is of an old feature cache, which is not read; make features of the audio: "
                f"{typed_command('featurize')} --manifest <the JSONL with audio_path>",
            )


def _audio_path(value: str, manifest: str) -> str:
    """Resolve a clip's path against the manifest's folder, else the current one. NFC and NFD names both match."""
    if not value.strip():
        raise BadRow("empty_text", "audio_path is empty")
    if "\0" in value:
        raise BadRow("audio_missing", "audio_path holds a zero byte")
    return find_clip(value, (Path(manifest).parent, Path.cwd()))


def find_clip(value: str, folders: Iterable[Path]) -> str:
    """Path of a clip in the first of the folders that has it. NFC and NFD names both match, and so do backslashes.

    Raises:
        BadRow: ``audio_missing``: no folder has it, or it is not a regular file.
    """
    folders, shown = tuple(folders), value if len(value) <= MAX_SHOWN_PATH else f"{value[:MAX_SHOWN_PATH]}…"
    if value.startswith("data:"):
        raise BadRow("audio_missing", f"the audio is in the row itself; write it to a file: {value[:40]}…")
    for name in dict.fromkeys((value, value.replace("\\", "/"))):
        for folder in folders:
            if path := find_file(folder, name):
                return path
    kind = "not an audio file" if any(os.path.exists(folder / value) for folder in folders) else "audio file not found"
    raise BadRow("audio_missing", f"{kind}: {shown}")


def find_file(base: Path, value: str) -> str:
    """Path of a regular file below a folder. The name may be NFC on disk and NFD in ``value``, or the reverse.

    Returns:
        The path, or "" if there is no such file, or it is a folder, pipe, device, link loop or too long a name.
    """
    if os.path.isfile(path := base / value):
        return str(path)
    if value.isascii():
        return ""
    path = base
    for part in Path(value).parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        existing = next((path / form for form in forms if os.path.lexists(path / form)), None)
        if existing is None:
            return ""
        path = existing
    return str(path) if os.path.isfile(path) else ""


def require_usable_row(manifests: tuple[str, ...], lines_per_chunk: int = 64) -> None:
    """Check, before any process starts, that each manifest has at least one usable row.

    Reading stops at the first usable row of each file, so this is cheap on good data.

    Raises:
        RunError: A manifest cannot be read, or none of its rows is usable. The message names the first bad line.
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
    """SHA-256 in hex, the content hash of manifests and clips."""
    return hashlib.sha256(raw).hexdigest()
