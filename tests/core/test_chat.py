"""Chats: every format gives the same turns, and what cannot be used is refused with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from voxray.core.chat import CLIP, Turn, clip_path, read_chat, short_form
from voxray.core.errors import BadRow
from voxray.core.manifest import Sample, parse_row
from voxray.core.tasks import detect_task

FIRST, ANSWER, SECOND, LAST = "무엇이 들립니까?", "숫자입니다", "How many?", "다섯"
TURNS = (Turn("user", (CLIP, FIRST)), Turn("assistant", (ANSWER,)), Turn("user", (SECOND,)))


def message(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


REST = [message("assistant", ANSWER), message("user", SECOND), message("assistant", LAST)]
TEXT = {"type": "text", "text": FIRST}


def openai(clip: dict[str, Any], *, text: Any = TEXT) -> dict[str, Any]:
    return {"messages": [message("user", [clip, text]), *REST]}


def sharegpt(first: str, **names: str) -> list[dict[str, str]]:
    names = {"human": "human", "gpt": "gpt", **names}
    texts = ((names["human"], first), (names["gpt"], ANSWER), (names["human"], SECOND), (names["gpt"], LAST))
    return [{"from": name, "value": text} for name, text in texts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a b.wav").write_bytes(b"RIFF")
    return tmp_path


def parse(row: dict[str, Any], folder: Path) -> Sample:
    return parse_row(json.dumps(row).encode(), str(folder / "m.jsonl"), 3)


def refusal(row: dict[str, Any], folder: Path) -> tuple[str, str]:
    with pytest.raises(BadRow) as error:
        parse(row, folder)
    assert len(str(error.value).splitlines()) == 1
    return error.value.reason, str(error.value)


FORMATS: dict[str, dict[str, Any]] = {
    "short": {"audio_path": "a b.wav", "messages": [message("user", FIRST), *REST]},
    "short with the place": {"audio_path": "a b.wav", "messages": [message("user", f"<audio>\n{FIRST} "), *REST]},
    "short with a part for the place": {"audio_path": "a b.wav", **openai({"type": "audio"})},
    "clip named twice": {"audio_path": "a b.wav", **openai({"type": "audio", "path": "a b.wav"})},
    "path": openai({"type": "audio", "path": "a b.wav"}),
    "audio": openai({"type": "audio", "audio": "a b.wav"}),
    "url": openai({"type": "audio", "url": "a b.wav"}),
    "object of datasets": openai({"type": "audio", "audio": {"path": "a b.wav", "bytes": None}}),
    "audio_url": openai({"type": "audio_url", "audio_url": {"url": "a b.wav"}}),
    "audio_url of text": openai({"type": "audio_url", "audio_url": "a b.wav"}),
    "input_audio": openai({"type": "input_audio", "input_audio": {"url": "a b.wav"}}),
    "sharegpt": {"conversations": sharegpt(f"<audio>{FIRST}"), "audios": ["a b.wav"]},
    "sharegpt, other names": {
        "conversations": sharegpt(f"<audio>{FIRST}", human="user", gpt="assistant"),
        "audios": ["a b.wav"],
    },
    "sharegpt without a place": {"conversations": sharegpt(FIRST), "audios": ["a b.wav"], "images": [], "system": ""},
    "llama-factory": {"messages": [message("user", f"<audio>{FIRST}"), *REST], "audios": ["a b.wav"]},
    "list of objects": {"messages": [message("user", f"<audio>{FIRST}"), *REST], "audios": [{"path": "a b.wav"}]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_sample(folder: Path, name: str) -> None:
    row = FORMATS[name]
    sample = parse({"id": 7, "language": "ko", "start": 1, "duration": 2, "channel": 0, **row}, folder)
    prompt = f"user: <audio>{FIRST}\nassistant: {ANSWER}\nuser: {SECOND}"
    assert sample == parse(
        {**FORMATS["short"], "id": 7, "language": "ko", "start": 1, "duration": 2, "channel": 0}, folder
    )
    assert (sample.task.name, sample.turns, sample.answer, sample.prompt) == ("chat", TURNS, LAST, prompt)
    assert (sample.id, sample.audio_path, sample.language) == ("7", str(folder / "a b.wav"), "ko")
    assert (sample.start_sec, sample.duration_sec, sample.channel) == (1, 2, 0)
    assert detect_task(row).name == "chat" and clip_path(row) == "a b.wav"
    assert parse({"id": 7, **short_form(row)}, folder) == parse({"id": 7, **row}, folder)
    assert set(short_form({**row, "note": 1})) == {"audio_path", "messages", "note"}


def test_files_by_url(folder: Path) -> None:
    url = f"file://{folder}/a%20b.wav"
    assert parse(openai({"type": "audio", "url": url}), folder).audio_path == str(folder / "a b.wav")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (f"{FIRST}<audio>", (FIRST, CLIP)),
        ("Listen: <audio> What?", ("Listen:", CLIP, "What?")),
        ("<audio>", (CLIP,)),
        ([TEXT, {"type": "audio"}], (FIRST, CLIP)),
        ([TEXT, {"type": "text", "text": " Briefly. "}, {"type": "audio"}], (f"{FIRST}\nBriefly.", CLIP)),
    ],
)
def test_places_of_a_clip(folder: Path, content: Any, parts: tuple[str, ...]) -> None:
    sample = parse({"audio_path": "a b.wav", "messages": [message("user", content), message("assistant", "a")]}, folder)
    assert sample.turns == (Turn("user", parts),)
    again = short_form({"audio_path": "a b.wav", "messages": [message("user", content), message("assistant", "a")]})
    assert parse(again, folder).turns == sample.turns


def test_a_clip_may_come_later(folder: Path) -> None:
    later = [
        message("user", "Hi"),
        message("assistant", "Hello"),
        message("user", "<audio>"),
        message("assistant", "a"),
    ]
    sample = parse({"messages": later, "audios": ["a b.wav"]}, folder)
    assert [turn.parts for turn in sample.turns] == [("Hi",), ("Hello",), (CLIP,)]


@pytest.mark.parametrize("clip", [{}, {"audio_path": None}, {"audio_path": ""}, {"audios": []}])
def test_chats_without_audio(folder: Path, clip: dict[str, Any]) -> None:
    sample = parse({"system": "짧게.", "conversations": sharegpt(FIRST), **clip}, folder)
    system = Turn("system", ("짧게.",))
    assert (sample.task.name, sample.audio_path) == ("text_chat", "")
    assert sample.turns == (system, Turn("user", (FIRST,)), *TURNS[1:])
    assert sample == parse({"messages": [message("system", "짧게."), message("user", FIRST), *REST]}, folder)
    assert sample.prompt.startswith("system: 짧게.\nuser: ")


def test_keys_of_other_tasks_come_first(folder: Path) -> None:
    chat = FORMATS["short"]
    assert parse({**chat, "transcript": "t"}, folder).task.name == "asr"
    assert parse({**chat, "question": "q", "answer": "a"}, folder).task.name == "sqa"
    assert parse({**chat, "instruction": "i", "output": "o"}, folder).task.name == "tqa"


def test_rows_without_a_reference(folder: Path) -> None:
    row = {"audio_path": "a b.wav", "unlabelled": True}
    sample = parse({**row, "messages": [message("user", FIRST), *REST[:2]]}, folder)
    assert (sample.turns, sample.answer) == (TURNS, "")
    assert parse({**row, "messages": [message("user", FIRST), *REST]}, folder).answer == LAST
    assert parse({**row, "messages": [message("user", FIRST), message("assistant", "")]}, folder).answer == ""


USER, REPLY = message("user", "a"), message("assistant", "b")


@pytest.mark.parametrize(
    ("row", "reason", "part"),
    [
        ({"messages": "x"}, "bad_type", "messages is not a list of objects"),
        ({"conversations": ["x"]}, "bad_type", "conversations is not a list of objects"),
        ({"messages": []}, "unsupported_chat", "roles none: not user and assistant in turn"),
        ({"messages": [message("system", "s")]}, "unsupported_chat", "roles system: not"),
        ({"messages": [USER, USER, REPLY]}, "unsupported_chat", "roles user, user, assistant: not"),
        ({"messages": [REPLY, USER, REPLY]}, "unsupported_chat", "roles assistant, user, assistant: not"),
        ({"messages": [USER, message("system", "s"), REPLY]}, "unsupported_chat", "roles user, system, assistant: not"),
        ({"messages": [message("system", "s"), USER, REPLY], "system": "s"}, "unsupported_chat", "system, system"),
        ({"messages": [USER, message("tool", "x"), REPLY]}, "unsupported_chat", "a message of 'tool', who is not"),
        ({"messages": [message(["user"], "x"), REPLY]}, "unsupported_chat", "a message of ['user'], who is not"),
        ({"messages": [{"content": "x"}, REPLY]}, "unsupported_chat", "a message of None, who is not"),
        (
            {"messages": [USER, message("assistant", None)]},
            "bad_type",
            "a message is NoneType, neither text nor a list",
        ),
        ({"messages": [USER, message("assistant", 3)]}, "bad_type", "a message is int, neither text"),
        ({"messages": [USER, REPLY], "system": 3}, "bad_type", "a message is int"),
        (
            {"messages": [USER, {**REPLY, "weight": 0}, USER, REPLY]},
            "unsupported_chat",
            "an answer with weight 0: all of",
        ),
        ({"messages": [USER, {**REPLY, "loss": False}]}, "unsupported_chat", "an answer with loss False"),
        ({"messages": [USER, {**REPLY, "tool_calls": [{"id": 1}]}]}, "unsupported_chat", "an answer with tool_calls ["),
        (openai({"type": "audio", "url": "https://x.org/a.wav"}), "remote_audio", "download it first: https://x.org"),
        ({"messages": [USER]}, "empty_text", 'the last message is not an answer; a row without one needs "unlabelled"'),
        ({"messages": [USER, message("assistant", " ")]}, "empty_text", "the last answer is empty"),
        ({"messages": [message("user", " "), REPLY]}, "empty_text", "message 1 of the chat (user) is empty"),
        (
            {"messages": [USER, message("assistant", []), USER, REPLY]},
            "empty_text",
            "message 2 of the chat (assistant)",
        ),
        ({"messages": [message("user", ["x"]), REPLY]}, "unsupported_chat", "a part of type None, neither text nor"),
        ({"messages": [message("user", [{"type": "image", "image": "x.png"}]), REPLY]}, "unsupported_chat", "'image'"),
        ({"messages": [message("user", [{"type": "text"}]), REPLY]}, "unsupported_chat", "a part of type 'text'"),
        ({"messages": [USER, REPLY], "images": ["x.png"]}, "unsupported_chat", "images: a chat may have text and one"),
        ({"messages": [USER, REPLY], "audios": 5}, "bad_type", "audios is int, not a list"),
        (
            {"messages": [USER, REPLY], "audios": ["a b.wav"] * 2},
            "several_audios",
            "2 clips in one row; a row may have",
        ),
        ({"messages": [USER, REPLY], "audios": [3]}, "bad_type", "the path of the clip is int, not text"),
        ({"messages": [USER, REPLY], "audio_path": ["x"]}, "bad_type", "the path of the clip is list, not text"),
        (
            {"messages": [message("user", "<audio>"), REPLY]},
            "audio_count",
            "1 place(s) for audio (<audio>) in the mess",
        ),
        (
            {"messages": [message("user", "<audio><audio>"), REPLY], "audios": ["a b.wav"]},
            "audio_count",
            "2 place(s) for audio (<audio>) in the messages, and 1 clip(s)",
        ),
        (openai({"type": "audio", "path": "a b.wav"}, text={"type": "audio", "path": "c.wav"}), "several_audios", "2"),
        (
            {"messages": [USER, message("assistant", "<audio>")], "audios": ["a b.wav"]},
            "unsupported_chat",
            "audio in the assistant's message",
        ),
        (openai({"type": "audio", "path": "gone.wav"}), "audio_missing", "audio file not found: gone.wav"),
        (
            openai({"type": "input_audio", "input_audio": {"data": "UklGRg" * 9999, "format": "wav"}}),
            "audio_missing",
            "the audio is in the row itself; write it to a file: data:UklGRg",
        ),
        (
            openai({"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,UklGRg"}}),
            "audio_missing",
            "the audio is in the row itself; write it to a file: data:audio/wav",
        ),
        ({"messages": [USER, REPLY], "language": 3}, "bad_type", "language"),
        ({"messages": [USER, REPLY], "start": -1}, "bad_segment", "start is -1"),
        ({"dialog": [USER, REPLY]}, "unknown_task", "chat: audio_path, messages; text_chat: messages"),
    ],
)
def test_chats_that_are_refused(folder: Path, row: dict[str, Any], reason: str, part: str) -> None:
    seen, text = refusal(row, folder)
    assert seen == reason and part in text, text


def test_tables_of_chats() -> None:
    """Columns of other formats are null, and a clip may be in the column that Hugging Face names audio."""
    turns = [{"role": "user", "from": None, "content": "q", "value": None}]
    turns += [{"role": None, "from": "gpt", "content": None, "value": "a"}]
    chat = read_chat({"messages": None, "conversations": turns, "audio": {"path": "a.wav", "bytes": None}})
    assert chat.clip == "a.wav" and chat.answer == "a" and chat.turns == (Turn("user", (CLIP, "q")),)
    assert read_chat({"messages": [{"role": "system", "content": " "}, *turns]}).turns == (Turn("user", ("q",)),)
    assert read_chat({"messages": turns, "audios": "a.wav"}).clip == "a.wav"
    with pytest.raises(BadRow, match="tools: a chat may have text and one clip"):
        read_chat({"messages": turns, "tools": [{"name": "f"}]})
