"""Chat rows: conversations in the formats of OpenAI, ShareGPT, LLaMA-Factory and ms-swift, and in a short form.

``read_chat`` reads all of them into the same turns. docs/data.md shows the formats.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from voxray.core.errors import BadRow

CLIP = "<audio>"
"""Stands for the clip: in the texts of a row, and as a part of a turn."""
UNLABELLED = "unlabelled"
"""Key of a row without a reference: the model answers it, but the answer is not scored."""
MESSAGE_KEYS = ("messages", "conversations")
CHAT_KEYS = (*MESSAGE_KEYS, "audios", "audio", "system")
"""Keys that hold a chat, beside ``audio_path``."""
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_CLIP_TYPES = ("audio", "audio_url", "input_audio")
_CLIP_KEYS = (*_CLIP_TYPES, "path", "url", "audio_path")
_OWN_CLIP_KEYS = ("audio_path", "audio")
_OTHER_MEDIA = ("images", "videos", "tools")
_AROUND_CLIP = re.compile(f"({CLIP})")


class Turn(NamedTuple):
    """One message of a chat.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        parts: Its text. A user's turn has ``CLIP`` where the clip is, before, after or between texts.
    """

    role: str
    parts: tuple[str, ...]

    @property
    def text(self) -> str:
        """The parts as one text."""
        return "".join(self.parts)


class Chat(NamedTuple):
    """A chat row.

    Attributes:
        turns: All turns before the last answer: perhaps one of the system, then the user's and the assistant's in turn.
            The last one is the user's.
        answer: Text of the last answer. "" if there is none, which only rows with ``UNLABELLED`` may have.
        clip: Path of the clip as the row names it, "" without audio.
    """

    turns: tuple[Turn, ...]
    answer: str
    clip: str

    @property
    def prompt(self) -> str:
        """The turns as plain text, one after the other."""
        return "\n".join(f"{turn.role}: {turn.text}" for turn in self.turns)


def task_keys(row: Mapping[str, Any]) -> Collection[str]:
    """The keys by which a row's task is detected.

    Every form of a chat has the key ``messages``, and ``audio_path`` if it names a clip.
    """
    if not any(name in row for name in MESSAGE_KEYS):
        return row.keys()
    return {*row.keys() - {"audio_path"}, "messages", *(["audio_path"] if _clips(row) else [])}


def read_chat(row: Mapping[str, Any]) -> Chat:
    """Read and check the chat of a row. The clip is not opened.

    A clip for which no message has a place comes first in the first turn of the user.

    Raises:
        BadRow: ``bad_type``, ``unsupported_chat`` (roles, options, or media other than one clip), ``audio_count``,
            ``several_audios``, ``remote_audio`` or ``empty_text``.
    """
    name = _messages_key(row)
    messages, system = row[name], row.get("system")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRow("bad_type", f"{name} is not a list of objects")
    if system not in (None, ""):
        messages = [{"role": "system", "content": system}, *messages]
    turns = [turn for turn in map(_turn, messages) if turn.role != "system" or turn.parts]
    has_answer = _check_roles(turns, needs_answer=row.get(UNLABELLED) is not True)
    clip = _check_clip(row, turns)
    if clip and not any(CLIP in turn.parts for turn in turns):
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", (CLIP, *turns[first].parts))
    answer = turns.pop().text if has_answer else ""
    for number, turn in enumerate(turns, 1):
        if not turn.parts:
            raise BadRow("empty_text", f"message {number} of the chat ({turn.role}) is empty")
    return Chat(tuple(turns), answer, clip)


def clip_path(row: Mapping[str, Any]) -> Any:
    """The path of a row's clip as the row names it, in whatever form; None without one. The row is not checked."""
    clips = _clips(row) if any(name in row for name in MESSAGE_KEYS) else []
    return row.get("audio_path") or next(iter(clips), None)


def to_messages(turns: Sequence[Turn], answer: str) -> list[dict[str, str]]:
    """Turns and a last answer as ``messages`` of a row; "" adds no answer."""
    turns = [*turns, Turn("assistant", (answer,))] if answer else turns
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def short_form(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same row with its chat as ``messages`` and, if it has a clip, ``audio_path``.

    Raises:
        BadRow: As ``read_chat``.
    """
    chat = read_chat(row)
    others = {key: value for key, value in row.items() if key not in (*CHAT_KEYS, *_OTHER_MEDIA, "audio_path")}
    audio = {"audio_path": chat.clip} if chat.clip else {}
    return {**others, **audio, "messages": to_messages(chat.turns, chat.answer)}


def _turn(message: Mapping[str, Any]) -> Turn:
    role, content = _first(message, "role", "from"), _content(message)
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow("unsupported_chat", f"a message of {role!r}, who is not system, user or assistant")
    if role in ("assistant", "gpt"):
        _refuse_options(message)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRow("bad_type", f"a message is {type(content).__name__}, neither text nor a list of parts")
    parts: list[str] = []
    for part in (piece for item in content for piece in _pieces(item)):
        if parts and CLIP not in (part, parts[-1]):
            parts[-1] += f"\n{part}"
        else:
            parts.append(part)
    return Turn(_ROLES[role], tuple(parts))


def _refuse_options(message: Mapping[str, Any]) -> None:
    """Refuse an answer that is not to be trained on, or that calls tools: every answer has labels, on its text."""
    for key, usual in (("weight", 1), ("loss", True), ("tool_calls", []), ("function_call", None)):
        if message.get(key) not in (None, usual):
            raise BadRow("unsupported_chat", f"an answer with {key} {message[key]!r}: all of its text is trained on")


def _content(message: Mapping[str, Any]) -> Any:
    return _first(message, "content", "value")


def _first(values: Mapping[str, Any], *keys: str) -> Any:
    """The first of some values that is not null."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _pieces(part: Any) -> Iterator[str]:
    """The texts of a part of a message without blanks around them, and ``CLIP`` where the clip is."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _CLIP_TYPES:
        yield CLIP
    elif kind == "text" and isinstance(part.get("text"), str):
        yield from filter(None, map(str.strip, _AROUND_CLIP.split(part["text"])))
    else:
        raise BadRow("unsupported_chat", f"a part of type {kind!r}, neither text nor an audio file")


def _check_roles(turns: Sequence[Turn], *, needs_answer: bool) -> bool:
    """Check who speaks when; returns whether the last turn is an answer."""
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or any(role != ("user", "assistant")[number % 2] for number, role in enumerate(spoken)):
        names = ", ".join(roles) or "none"
        raise BadRow("unsupported_chat", f"roles {names}: not user and assistant in turn after at most one system")
    has_answer = spoken[-1] == "assistant"
    if needs_answer and not (has_answer and turns[-1].parts):
        missing = "the last answer is empty" if has_answer else "the last message is not an answer"
        raise BadRow("empty_text", f'{missing}; a row without one needs "{UNLABELLED}": true')
    return has_answer


def _check_clip(row: Mapping[str, Any], turns: Sequence[Turn]) -> str:
    """The path of a row's clip, "" without audio; checks that at most one is named, in one turn of the user."""
    for name in _OTHER_MEDIA:
        if row.get(name):
            raise BadRow("unsupported_chat", f"{name}: a chat may have text and one clip")
    if not isinstance(row.get("audios", []), list | str | None):
        raise BadRow("bad_type", f"audios is {type(row['audios']).__name__}, not a list")
    clips = _clips(row)
    roles = [turn.role for turn in turns for part in turn.parts if part == CLIP]
    if roles and len(roles) != len(clips):
        raise BadRow(
            "audio_count", f"{len(roles)} place(s) for audio ({CLIP}) in the messages, and {len(clips)} clip(s)"
        )
    if len(clips) > 1:
        raise BadRow("several_audios", f"{len(clips)} clips in one row; a row may have one")
    if set(roles) - {"user"}:
        raise BadRow("unsupported_chat", f"audio in the {roles[0]}'s message")
    if not all(isinstance(clip, str) for clip in clips):
        raise BadRow("bad_type", f"the path of the clip is {type(clips[0]).__name__}, not text")
    if clips and "://" in clips[0]:
        raise BadRow("remote_audio", f"download it first: {clips[0]}")
    return clips[0] if clips else ""


def _clips(row: Mapping[str, Any]) -> list[Any]:
    """Everything that a row of whatever form names as a clip."""
    listed = row.get("audios")
    values = [*map(_path, listed if isinstance(listed, list) else [listed]), *_clips_of_parts(row)]
    values += [own for key in _OWN_CLIP_KEYS if (own := _path(row.get(key))) not in values]
    return [value for value in values if value not in (None, "")]


def _messages_key(row: Mapping[str, Any]) -> str:
    """The key that holds the messages; one without a value only if there is no other."""
    names = [name for name in MESSAGE_KEYS if name in row]
    return next((name for name in names if row[name] is not None), names[0])


def _clips_of_parts(row: Mapping[str, Any]) -> Iterator[Any]:
    messages = row[_messages_key(row)]
    for message in messages if isinstance(messages, list) else ():
        content = _content(message) if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") in _CLIP_TYPES:
                yield next((path for key in _CLIP_KEYS if (path := _path(part.get(key)))), None)


def _path(value: Any) -> Any:
    """The path in a value that names a clip. Audio in the row itself becomes the beginning of a ``data:`` URL."""
    if isinstance(value, dict):
        value = f"data:{value['data']}"[:100] if value.get("data") else value.get("path") or value.get("url")
    if isinstance(value, str) and value.startswith("file://"):
        return unquote(value.removeprefix("file://"))
    return value
