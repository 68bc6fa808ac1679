"""JSON Lines: rows in voxray's own schemas (``core/tasks.py``), and chats with or without audio.

A chat is one user message and one answer, optionally after system messages. Its audio is ``<audio>`` in the text with
an ``audios`` list, or a part ``{"type": "audio", ...}``. Audio without text, or with only a request for a transcript,
is an asr row. Audio with other text is an sqa row. Text alone is a tqa row. System messages come before the user's
text in the prompt.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow
from voxray.core.manifest import refuse_old_cache
from voxray.core.tasks import detect_task
from voxray.corpora.importers.lines import json_lines
from voxray.corpora.importers.row import ImportedRow, ImportFault, Record, find_audio, import_records

AUDIO_MARK = "<audio>"
_TRANSCRIBE = re.compile(
    r"(?:please )?transcribe(?: (?:this|the))?(?: (?:audio|speech|clip|recording))?(?: (?:in)?to text)?"
    r"|(?:이 |다음 )?(?:음성|오디오)[을를]? ?(?:받아 ?(?:쓰세요|적으세요|(?:써|적어) ?주세요)|전사해 ?주세요)"
)
_CLIP_KEYS = ("audio", "audio_url", "path", "url", "audio_path")


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read a file whose lines are chats or rows in voxray's schemas, in any mixture."""
    return import_records(json_lines(path), _convert)


def _convert(record: Record) -> dict[str, Any]:
    if "messages" in record.values:
        return _chat(record)
    refuse_old_cache(record.values)
    try:
        task = detect_task(record.values)
    except ValueError as error:
        raise BadRow("unknown_task", str(error)) from None
    for key in task.keys:
        record.text(key)
    values = {key: value for key, value in record.values.items() if key not in ("id", "audio_bytes_from")}
    return values | ({"audio_path": find_audio(values["audio_path"], record.folder)} if task.has_audio else {})


def _chat(record: Record) -> dict[str, Any]:
    messages = record.values["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow("bad_type", "messages is no list of objects")
    roles = [message.get("role") for message in messages]
    if len(roles) > 2 and roles.count("user") > 1:
        raise BadRow("multi_turn", f"{roles.count('user')} user messages; only the last answer could be trained on")
    if [role for role in roles if role != "system"] != ["user", "assistant"] or roles[-1] != "assistant":
        raise BadRow("unsupported_chat", f"roles {roles}, not (system,) user, assistant"[:300])
    listed, texts, clips = _listed_audios(record.values.get("audios")), [], []
    for message in messages:
        text, parts = _content(message.get("content"))
        if (parts or AUDIO_MARK in text) and message["role"] != "user":
            raise BadRow("unsupported_chat", f"audio in the {message['role']} message")
        clips += parts
        texts.append(text)
    *prompts, answer = texts
    question = "\n".join(filter(None, prompts))
    num_marks = question.count(AUDIO_MARK)
    if num_marks and num_marks != len(listed):
        raise BadRow("audio_count", f"{num_marks} {AUDIO_MARK} marks and {len(listed)} audios")
    clips += listed
    if len(clips) > 1:
        raise BadRow("several_audios", f"{len(clips)} clips in one row")
    question = question.replace(AUDIO_MARK, "").strip()
    extra = {key: record.values[key] for key in ("language", "speaker", "split", "session") if record.values.get(key)}
    if not clips:
        return {"instruction": question, "input": "", "output": answer} | extra
    audio_path = find_audio(clips[0], record.folder)
    if not question or _TRANSCRIBE.fullmatch(question.rstrip(" .!:").lower()):
        return {"audio_path": audio_path, "transcript": answer} | extra
    return {"audio_path": audio_path, "question": question, "answer": answer} | extra


def _listed_audios(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRow("bad_type", f"audios is {type(value).__name__}, not a list")
    return [clip.get("path") if isinstance(clip, dict) else clip for clip in value]


def _content(content: Any) -> tuple[str, list[Any]]:
    """A message's text, and the clips in its parts."""
    if isinstance(content, str):
        return content.strip(), []
    if not isinstance(content, list):
        raise BadRow("bad_type", f"content is {type(content).__name__}, neither text nor a list of parts")
    texts, clips = [], []
    for part in content:
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"].strip())
        elif part_type in ("audio", "audio_url"):
            clip = next((part[key] for key in _CLIP_KEYS if part.get(key)), None)
            clips.append(clip.get("url", clip.get("path")) if isinstance(clip, dict) else clip)
        else:
            raise BadRow("unsupported_chat", f"a part of type {part_type!r}, neither text nor an audio file")
    return "\n".join(filter(None, texts)), clips
