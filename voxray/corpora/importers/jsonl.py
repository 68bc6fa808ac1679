"""JSON Lines: rows in voxray's own schemas (``core/tasks.py``), and chats with or without audio (``core/chat.py``).

A chat with one question becomes a row of another task. Audio without text, or with only a request for a transcript, is
an asr row. Audio with other text is an sqa row. Text alone is a tqa row. The system message comes before the user's
text in the prompt. A chat of several questions stays a chat, in the short form.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxray.core.chat import CLIP, read_chat, short_form
from voxray.core.errors import BadRow
from voxray.core.manifest import UNLABELLED, refuse_old_cache
from voxray.core.tasks import detect_task, own_tasks
from voxray.corpora.importers.lines import json_lines
from voxray.corpora.importers.row import ImportedRow, ImportFault, Record, find_audio, import_records

_TRANSCRIBE = re.compile(
    r"(?:please )?transcribe(?: (?:this|the))?(?: (?:audio|speech|clip|recording))?(?: (?:in)?to text)?"
    r"|(?:이 |다음 )?(?:음성|오디오)[을를]? ?(?:받아 ?(?:쓰세요|적으세요|(?:써|적어) ?주세요)|전사해 ?주세요)"
)
_KEPT = ("language", "speaker", "split", "session", "start", "duration", "channel", "context", "domain", UNLABELLED)
"""Keys that a chat with one question keeps as a row of another task."""


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read a file whose lines are chats or rows in voxray's schemas, in any mixture."""
    return import_records(json_lines(path), _convert)


def _convert(record: Record) -> dict[str, Any]:
    refuse_old_cache(record.values)
    try:
        task = detect_task(record.values)
    except ValueError as error:
        raise BadRow("unknown_task", str(error)) from None
    values = {key: value for key, value in record.values.items() if key not in ("id", "audio_bytes_from")}
    if task.template == "conversation":
        return _chat(values, record.folder, stays_chat=task.name in own_tasks())
    for key in task.keys:
        record.text(key)
    return values | ({"audio_path": find_audio(values["audio_path"], record.folder)} if task.has_audio else {})


def _chat(values: dict[str, Any], folder: Path, *, stays_chat: bool) -> dict[str, Any]:
    chat = read_chat(values)
    audio = {"audio_path": find_audio(chat.clip, folder)} if chat.clip else {}
    if stays_chat or sum(turn.role == "user" for turn in chat.turns) > 1:
        return short_form(values) | audio
    extra = {key: values[key] for key in _KEPT if values.get(key) not in (None, "")}
    question = "\n".join(part for turn in chat.turns for part in turn.parts if part != CLIP)
    if not audio:
        return {"instruction": question, "input": "", "output": chat.answer} | extra
    if not question or _TRANSCRIBE.fullmatch(question.rstrip(" .!:").lower()):
        return audio | {"transcript": chat.answer} | extra
    return audio | {"question": question, "answer": chat.answer} | extra
