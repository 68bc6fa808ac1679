"""A server with OpenAI's API whose answers to each row are scripted, faults included."""

import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import soundfile
from werkzeug.formparser import parse_form_data

Reply = Callable[["Handler"], None]


def reply(status: int = 200, body: Any = None, **headers: str) -> Reply:
    """A response with a JSON or text body; underscores in names of headers stand for hyphens."""

    def send(handler: "Handler") -> None:
        raw = (body if isinstance(body, str) else json.dumps(body)).encode()
        handler.send_response(status)
        named = {name.replace("_", "-").title(): value for name, value in headers.items()}
        for name, value in ({"Content-Length": str(len(raw))} | named).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw)
        handler.close_connection = named.get("Connection") == "close"

    return send


def closed(handler: "Handler") -> None:
    """Half of a response."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"text": "he')
    handler.close_connection = True


def reset(handler: "Handler") -> None:
    """No response at all."""
    handler.close_connection = True


def after(sec: float, then: Reply) -> Reply:
    def send(handler: "Handler") -> None:
        time.sleep(sec)
        then(handler)

    return send


class FakeServer(ThreadingHTTPServer):
    """Answers each request by its text: the context of a transcription, or the last text of a chat.

    Attributes:
        replies: {text: responses to its first requests}; later ones are good.
        otherwise: Response to every other request; None for a good one.
        requests: What arrived: path, fields or JSON body, samples of the clip, headers.
        most: Largest number of requests at a time.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: dict[str, list[Reply]] = {}
        self.otherwise: Reply | None = None
        self.requests: list[dict[str, Any]] = []
        self.lock, self.running, self.most = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def counts(self) -> Counter[str]:
        """Number of requests per text."""
        return Counter(request["text"] for request in self.requests)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        is_form = self.headers["Content-Type"].startswith("multipart/")
        request = self._form(body) if is_form else self._chat(json.loads(body))
        request |= {"path": self.path, "headers": dict(self.headers)}
        text = request["text"]
        with self.server.lock:
            number = self.server.counts()[text]
            self.server.requests.append(request)
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        good = {"text": f" heard {text} "} if is_form else _completion(f"heard {text}")
        scripted = self.server.replies.get(text, [])
        send = scripted[number] if number < len(scripted) else self.server.otherwise or reply(200, good)
        try:
            send(self)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def _form(self, body: bytes) -> dict[str, Any]:
        environment = {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)), "REQUEST_METHOD": "POST"}
        _, form, files = parse_form_data({**environment, "CONTENT_TYPE": self.headers["Content-Type"]})
        [(name, file)] = files.items()
        clip = {"name": name, "filename": file.filename, "clip": _samples(file.read())}
        return {**clip, "fields": form.to_dict(), "text": form.get("prompt", "")}

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        parts = [part for each in body["messages"] if isinstance(each["content"], list) for part in each["content"]]
        clips = [part["input_audio"]["data"] for part in parts if part["type"] == "input_audio"]
        last = body["messages"][-1]["content"]
        text = last if isinstance(last, str) else next(part["text"] for part in last[::-1] if part["type"] == "text")
        return {"body": body, "text": text, "clip": _samples(base64.b64decode(clips[0])) if clips else None}

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


def _samples(raw: bytes) -> np.ndarray:
    samples, rate_hz = soundfile.read(io.BytesIO(raw), dtype="int16")
    assert rate_hz == 16_000
    return samples


def _completion(text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"completion_tokens": 7}}


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
