"""Evaluate and infer against a server that fails in every way that a server can."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPEECH, WHISPER, read_rows, write_rows
from helpers.fake_server import FakeServer, after, closed, fake_server, reply, reset
from helpers.running import ROOT, Driver, parse_only

from voxray.audio.decode import decode, to_pcm16
from voxray.commands.evaluate import run_evaluation
from voxray.commands.infer import run_inference
from voxray.core.errors import RunError, SettingsError
from voxray.evaluation.predictions import read_predictions
from voxray.generation.engines import server_client
from voxray.models.served import ServedFrontEnd

KEY = "sk-voxray-7b1f9c"
CLIPS = [row["audio_path"] for row in read_rows(str(SPEECH / "asr.val.jsonl"))]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(server_client, "FIRST_WAIT_SEC", 0.02)
    with fake_server() as server:
        yield server


def write_manifest(folder: Path, num_rows: int) -> str:
    """Transcriptions whose context is their id, by which the server knows them."""
    rows = [
        {"id": f"row{number}", "audio_path": CLIPS[number % len(CLIPS)], "transcript": f"heard row{number}"}
        | {"language": "en", "context": f"row{number}"}
        for number in range(num_rows)
    ]
    return write_rows(folder / "rows.jsonl", rows)


def evaluate(server: FakeServer | str, manifest: str, folder: Path, *flags: str) -> Any:
    url = server if isinstance(server, str) else server.url
    argv = ["--server", url, "--served_model", "tiny", "--val_jsonl", manifest, "--output_dir", str(folder)]
    return run_evaluation(parse_only("evaluate", [*argv, "--server_timeout_sec", "2", *flags]))


def ledger(folder: Path) -> dict[str, str]:
    lines = (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row["message"] for row in map(json.loads, lines)}


def texts(folder: Path) -> dict[str, str]:
    return {row["id"]: row["prediction"] for row in read_predictions(folder)}


def assert_no_key(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


OPENAI_ERROR = {"error": {"message": "Audio file\nis too short.", "type": "invalid_request_error", "code": None}}
DATE = "Retry-After is a date"
FAULTS = {
    "429 with Retry-After": ([reply(429, OPENAI_ERROR, retry_after="0.3")], ""),
    DATE: ([], ""),
    "500": ([reply(500, "boom"), reply(502, "<html>bad gateway</html>")], ""),
    "503 for ever": ([reply(503, {"detail": "loading"})] * 9, "ServerError: status 503: loading (attempt 3 of 3)"),
    "400": ([reply(400, OPENAI_ERROR)], "ServerError: status 400: Audio file is too short."),
    "404 without a body": ([reply(404, "")], "ServerError: status 404: without a message"),
    "redirect": ([reply(307, "", location="http://x/")], "ServerError: status 307: http://x/"),
    "closed in the body": ([closed], ""),
    "closed without a response": ([reset, reset], ""),
    "closed for ever": ([closed] * 9, "ServerError: RemoteProtocolError: peer closed connection"),
    "HTML": ([reply(200, "<html>login</html>")], "ServerError: the response is not JSON: '<html>login</html>'"),
    "a list": ([reply(200, [1])], "ServerError: the response is not an object: '[1]'"),
    "no text": ([reply(200, {"task": "x", "a": 1})], "ServerError: the response has no text; it has a, task"),
    "text is null": ([reply(200, {"text": None})], "ServerError: the response has no text; it has text"),
    "half a pair": ([reply(200, '{"text": "\\ud800"}')], "ServerError: the text of the response holds half of"),
    "slow": ([after(2.5, reply(200, {"text": "late"}))], ""),
    "length too short": (
        [reply(200, {"text": "a text"}, content_length="9", connection="close")],
        "ServerError: the response is not JSON",
    ),
    "length too long": ([reply(200, {"text": "a text"}, content_length="99")], ""),
    "key in the error": ([reply(400, {"error": f"not for {KEY}"})], "ServerError: status 400: not for ***"),
}
"""{fault: responses to the first requests of a row, the line in the ledger or "" if the row is answered in the end}"""


@pytest.mark.usefixtures("evaluation_here")
def test_faults_of_rows_stay_with_their_rows(server: FakeServer, tmp_path: Path) -> None:
    faults = dict(FAULTS)
    soon = datetime.now(UTC) + timedelta(seconds=2)
    faults[DATE] = ([reply(429, "", retry_after=format_datetime(soon, usegmt=True))], "")
    manifest = write_manifest(tmp_path, 2 * len(faults))  # every other row has no fault
    names = {f"row{2 * number}": name for number, name in enumerate(faults)}
    server.replies = {row: faults[name][0] for row, name in names.items()}
    evaluate(server, manifest, tmp_path / "e", "--server_retries", "2", "--per_device_bsz", "5")
    expected = {row: faults[name][1] for row, name in names.items() if faults[name][1]}
    lines = ledger(tmp_path / "e")
    assert lines.keys() == expected.keys()
    for row, start in expected.items():
        assert lines[row].startswith(start) and "\n" not in lines[row], names[row]
    rows = [f"row{number}" for number in range(2 * len(faults))]
    assert texts(tmp_path / "e") == {row: f"heard {row}" for row in rows if row not in expected}
    retried = {"429 with Retry-After": 2, DATE: 2, "500": 3, "503 for ever": 3, "closed in the body": 2, "slow": 2}
    retried |= {"closed without a response": 3, "closed for ever": 3, "length too long": 2}
    assert server.counts() == {row: retried.get(names.get(row, ""), 1) for row in rows}
    assert 1 < server.most <= 5
    assert {request["headers"]["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    assert_no_key(tmp_path)


@pytest.mark.usefixtures("evaluation_here")
def test_faults_of_chats(server: FakeServer, tmp_path: Path) -> None:
    def choice(**values: Any) -> dict[str, Any]:
        return {"choices": [{"message": {"content": "cut"}, "finish_reason": "length", **values}]}

    server.replies = {
        "no choices": [reply(200, {"choices": []})],
        "null": [reply(200, choice(message={"content": None}, finish_reason="content_filter"))],
        "no message": [reply(200, choice(message=None))],
        "cut": [reply(200, choice())],
    }
    rows = [{"id": name, "instruction": name, "output": "x"} for name in (*server.replies, "fine")]
    evaluate(server, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "e")
    assert ledger(tmp_path / "e") == {
        "no choices": "ServerError: the response has no choices",
        "null": "ServerError: the response has a choice without text (finish_reason 'content_filter')",
        "no message": "ServerError: the response has a choice without text (finish_reason 'length')",
    }
    columns = ("prediction", "hit_max", "num_new_tokens")
    answers = {row["id"]: tuple(row[name] for name in columns) for row in read_predictions(tmp_path / "e")}
    assert answers == {"cut": ("cut", True, 0), "fine": ("heard fine", False, 7)}


def test_retry_after_is_waited_for(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Response:
        def __init__(self, value: str) -> None:
            self.headers = {"retry-after": value}

    cases = {"3": 3, "0.5": 0.5, "1e9": 600, "inf": 600, "": None, "nan": None, "-1": None, "soon": None}
    cases["Wed, 21 Oct 2015 07:28:00 GMT"] = 0
    assert {value: server_client._retry_after_sec(Response(value)) for value in cases} == cases  # type: ignore[arg-type]


@pytest.mark.usefixtures("evaluation_here")
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_job(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The parts before stay; when the key is accepted, only the others are sent."""
    manifest, folder = write_manifest(tmp_path, 40), tmp_path / "e"
    server.replies["row39"] = [reply(status, {"error": f"wrong key {KEY}"})]
    flags = ("--per_device_bsz", "1")  # parts of 8 rows
    with pytest.raises(RunError) as error:
        evaluate(server, manifest, folder, *flags)
    message = f"status {status}: the server refuses the key in the environment variable OPENAI_API_KEY (--server_key)"
    assert str(error.value) == f"--server {server.url}: {message}"
    finished = len(list(folder.glob("predictions/part-*.parquet")))
    first = server.counts()
    server.replies.clear()
    evaluate(server, manifest, folder, *flags)
    assert texts(folder) == {f"row{number}": f"heard row{number}" for number in range(40)}
    second = server.counts() - first
    assert len(second) == 40 - 8 * finished and set(second.values()) == {1}
    assert_no_key(tmp_path)

    monkeypatch.delenv("OPENAI_API_KEY")
    server.otherwise = reply(status, "")
    before = len(server.requests)
    with pytest.raises(RunError, match="needs a key, and the environment variable OPENAI_API_KEY is not set"):
        evaluate(server, manifest, tmp_path / "f", *flags)
    assert "Authorization" not in server.requests[before]["headers"]


@pytest.mark.usefixtures("evaluation_here")
def test_a_server_that_cannot_be_reached_ends_the_job(server: FakeServer, tmp_path: Path) -> None:
    with socket.socket() as closed_port:
        closed_port.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed_port.getsockname()[1]}/v1"
        with pytest.raises(RunError, match=r"cannot be reached, in 3 attempt\(s\): ConnectError: .*refused"):
            evaluate(url, write_manifest(tmp_path, 9), tmp_path / "e", "--server_retries", "2")

    def stop(handler: Any) -> None:
        server.socket.close()
        reply(200, {"text": "the last one"})(handler)
        handler.close_connection = True

    server.otherwise = stop
    flags = ("--server_retries", "1", "--per_device_bsz", "1")
    with pytest.raises(RunError, match="cannot be reached"):
        evaluate(server, write_manifest(tmp_path, 9), tmp_path / "f", *flags)


def test_requests_of_all_tasks(server: FakeServer, tmp_path: Path) -> None:
    """What arrives, read by werkzeug and soundfile, for rows of every task."""
    clip = CLIPS[0]
    speech = {"audio_path": clip, "language": "ko"}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<audio>What is it?"},
        {"role": "assistant", "content": "A number."},
        {"role": "user", "content": "Which?"},
    ]
    rows = [
        {**speech, "transcript": "a", "context": ["one", "two"]},
        {**speech, "translation": "a", "target_language": "English"},
        {**speech, "translation": "a", "target_language": "fr"},
        {**speech, "question": "Who?", "answer": "a"},
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {**speech, "messages": [*chat, {"role": "assistant", "content": "8"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ]
    flags = ["--server", server.url, "--served_model", "tiny", "--temperature", "0.5", "--top_p", "0.9", "--seed", "3"]
    manifest = write_rows(tmp_path / "rows.jsonl", rows)
    entries = run_inference(parse_only("infer", [*flags, "--jsonl", manifest, "--max_new_tokens", "9"]), "")
    assert len(entries) == len(server.requests) == len(rows)
    samples = to_pcm16(decode(clip, 16_000))
    for request in server.requests:
        if request["clip"] is not None:
            np.testing.assert_array_equal(request["clip"], samples)
    forms = {request["path"]: request for request in server.requests if "fields" in request}
    form = {"model": "tiny", "temperature": "0.5", "response_format": "json"}
    assert forms["/v1/audio/transcriptions"]["fields"] == {**form, "language": "ko", "prompt": "one, two"}
    assert forms["/v1/audio/translations"]["fields"] == form
    assert {(each["name"], each["filename"]) for each in forms.values()} == {("file", "clip.wav")}
    chats = {request["text"]: request for request in server.requests if "body" in request}
    audio = "input_audio"
    messages = {
        text: [
            (each["role"], each["content"])
            if isinstance(each["content"], str)
            else (each["role"], [part.get("text", part["type"]) for part in each["content"]])
            for each in request["body"].pop("messages")
        ]
        for text, request in chats.items()
    }
    french = "Translate the speech into French."
    assert messages == {
        french: [("user", [audio, french])],
        "Who?": [("user", [audio, "Who?"])],
        "Add\n1 2": [("user", "Add\n1 2")],
        "Which?": [
            ("system", "Be brief."),
            ("user", [audio, "What is it?"]),
            ("assistant", "A number."),
            ("user", "Which?"),
        ],
        "Hi": [("user", "Hi")],
    }
    options = {"model": "tiny", "max_completion_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert all(request["body"] == options and request["path"] == "/v1/chat/completions" for request in chats.values())


def test_infer_names_the_row_that_fails(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.replies["row1"] = [reply(400, OPENAI_ERROR)]
    argv = ["--server", server.url, "--served_model", "tiny", "--jsonl", write_manifest(tmp_path, 3)]
    with pytest.raises(RunError, match="1 of 3 rows could not be answered"):
        run_inference(parse_only("infer", argv), "")
    captured = capsys.readouterr()
    assert "rows.jsonl:2: not answered: ServerError: status 400: Audio file is too short." in captured.err
    assert "row0\theard row0" in captured.out and "row2\theard row2" in captured.out


@pytest.mark.usefixtures("evaluation_here")
def test_contexts_of_flags(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("Tylenol\nAspirin\n")
    manifest = write_manifest(tmp_path, 2)
    evaluate(server, manifest, tmp_path / "a", "--context", str(tmp_path / "terms.txt"))
    evaluate(server, manifest, tmp_path / "b", "--no_context")
    assert server.counts() == {"Tylenol, Aspirin": 2, "": 2}
    assert not any("prompt" in request["fields"] for request in server.requests[2:])


@pytest.mark.usefixtures("evaluation_here")
def test_recordings_over_the_limit_are_sent_in_chunks(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No clip is 2 hours long here, so the limit is lower."""
    monkeypatch.setattr(ServedFrontEnd, "max_audio_sec", 1.7)
    evaluate(server, write_manifest(tmp_path, 5), tmp_path / "e")  # clips of 1.97, 1.9, 1.52, 2.14 and 1.1 s
    assert texts(tmp_path / "e") == {f"row{number}": f"heard row{number}" for number in range(5)}
    assert server.counts() == {"row0": 2, "row1": 2, "row2": 1, "row3": 2, "row4": 1}
    assert max(len(request["clip"]) for request in server.requests) == 1.7 * 16_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--server", "http://h/v1"], "--server and --served_model: give both of them"),
        (["--served_model", "m"], "--server and --served_model: give both of them"),
        (["--server_retries", "1"], "--server_retries: needs --server"),
        (["--server", "ftp://h", "--served_model", "m"], "--server ftp://h: must start with http:// or https://"),
        (["--server", "http://u:p@h/v1", "--served_model", "m"], "--server: needs an address without user, password"),
        (["--server", "http://h/v1?key=1", "--served_model", "m"], "--server: needs an address without user, password"),
        (["--server", "http://h/v1", "--served_model", "m", "--model_id", "x"], "--server: not with --model_id"),
        (["--server", "http://h/v1", "--served_model", "m", "--lora_dir", "x"], "--server: not with --lora_dir"),
        (["--server", "http://h/v1", "--served_model", "m", "--store", "mel"], "--server: needs --store pcm16"),
        (["--server", "http://h/v1", "--served_model", "m", "--server_key", KEY], "--server_key: the name of an env"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_only("evaluate", ["--val_jsonl", "v.jsonl", *flags])
    error = capsys.readouterr().err
    assert message in error and KEY not in error


def test_keys_that_cannot_be_used(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingsError, match="--server_key: the environment has no variable of this name"):
        evaluate(server, write_manifest(tmp_path, 1), tmp_path / "e", "--server_key", "gsk_1")
    argv = ["--server", server.url, "--served_model", "m", "--question", "Why?"]
    monkeypatch.setenv("OPENAI_API_KEY", "one\ntwo")
    with pytest.raises(SettingsError, match="--server_key OPENAI_API_KEY: its value has characters that no key has"):
        run_inference(parse_only("infer", argv), "")
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    run_inference(parse_only("infer", argv), "")
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert not server.requests[1:] and "heard Why?" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse_only("infer", [*argv, "--output_dir", "runs/first"])
    assert "--server: not with --output_dir" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("evaluation_here")
def test_transformers_serve_answers_like_the_model_here(tmp_path: Path) -> None:
    """A server of others: `transformers serve`, which needs the package openai."""
    pytest.importorskip("openai")
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    script = str(Path(sys.executable).with_name("transformers"))
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    driver = Driver([script, "serve", *options], tmp_path / "log")
    manifest = write_rows(tmp_path / "rows.jsonl", read_rows(str(SPEECH / "asr.val.jsonl"))[:6])
    try:
        url, flags = f"http://127.0.0.1:{port}/v1", ["--val_jsonl", manifest, "--output_dir"]
        waiting = ["--server_retries", "20", "--server_timeout_sec", "300"]  # it takes seconds to start
        served = ["--server", url, "--served_model", WHISPER, *waiting]
        run_evaluation(parse_only("evaluate", [*served, *flags, str(tmp_path / "served")]))
    finally:
        driver.end()
    run_evaluation(parse_only("evaluate", ["--model_id", WHISPER, *flags, str(tmp_path / "here")]))
    assert texts(tmp_path / "served") == texts(tmp_path / "here")
    assert len(texts(tmp_path / "served")) == 6


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_killed_and_restarted_only_missing_parts_are_sent(server: FakeServer, tmp_path: Path) -> None:
    """The key reaches the processes of Ray, and no file."""
    manifest, folder = write_manifest(tmp_path, 40), tmp_path / "e"
    flags = ["--server", server.url, "--served_model", "tiny", "--val_jsonl", manifest, "--output_dir", str(folder)]
    command = [sys.executable, str(ROOT / "jobs/evaluate.py"), *flags, "--per_device_bsz", "1"]
    server.otherwise = after(0.2, reply(200, {"text": "slow"}))
    driver = Driver(command, tmp_path / "log")
    try:
        deadline = time.monotonic() + 200
        while len(list(folder.glob("predictions/part-*.parquet"))) < 2:
            assert driver.process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        driver.kill()
    finally:
        driver.end()
    finished = len(list(folder.glob("predictions/part-*.parquet")))
    sent = len(server.requests)
    driver = Driver(command, tmp_path / "log")
    try:
        assert driver.process.wait(200) == 0, (tmp_path / "log").read_text()
    finally:
        driver.end()
    assert len(server.requests) - sent == 40 - 8 * finished < 40
    assert sorted(texts(folder)) == sorted(f"row{number}" for number in range(40))
    assert {request["headers"]["Authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    assert server.most == 1, "one process, one request at a time"
    assert_no_key(tmp_path)
    assert os.environ["OPENAI_API_KEY"] == KEY
