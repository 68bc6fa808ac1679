"""Requests by another name or of too many bytes do not reach the page. Clips of a demo that was killed are removed."""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from helpers.running import ROOT

from voxray.demo.guard import MAX_OVERHEAD_BYTES, RequestGuard, clips_folder

LIMIT = 1000 + MAX_OVERHEAD_BYTES


def status(host: str, *, length: int | None = None, blocks: tuple[int, ...] = ()) -> int:
    """Status of a request with blocks of so many bytes."""
    messages = [{"type": "http.request", "body": bytes(size), "more_body": True} for size in blocks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def page(scope: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RuntimeError("the client left")
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    headers = [(b"host", host.encode())] + ([(b"content-length", str(length).encode())] if length is not None else [])
    scope = {"type": "http", "headers": headers}
    asyncio.run(RequestGuard(page, ("Demo.Example",), 1000)(scope, receive, send))
    [start] = [message for message in sent if message["type"] == "http.response.start"]
    return start["status"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:7860",
        "localhost",
        "LOCALHOST:1",
        "[::1]:7860",
        "192.168.1.5",
        socket.gethostname(),
        "demo.example:443",
    ],
)
def test_own_names_are_answered(host: str) -> None:
    assert status(host) == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.nip.io"]
)
def test_other_names_are_refused(host: str) -> None:
    """A web site whose name points to this machine must not read the page."""
    assert status(host) == 421


def test_the_size_of_a_request_is_limited() -> None:
    assert status("localhost", length=LIMIT) == 200
    assert status("localhost", length=LIMIT + 1) == 413
    assert status("localhost", blocks=(LIMIT // 2, LIMIT // 2)) == 200
    assert status("localhost", blocks=(LIMIT // 2, LIMIT // 2, 9)) == 413, "also if its length is not stated"


def test_clips_of_a_killed_demo_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, signal\nfrom voxray.demo.guard import clips_folder\nwith clips_folder() as folder:\n"
    code += " (folder / 'a.wav').touch()\n print(folder, flush=True)\n os.kill(os.getpid(), signal.SIGKILL)"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    dead = Path(killed.stdout.strip())
    assert (dead / "a.wav").is_file(), killed.stderr
    (tmp_path / f"voxray-demo-{os.getpid()}-1-x").mkdir()  # of an earlier process with the number of this one
    (tmp_path / "voxray-demo-notes").mkdir()
    with clips_folder() as first, clips_folder() as second:
        assert set(tmp_path.iterdir()) == {first, second, tmp_path / "voxray-demo-notes"}
    assert not dead.exists() and not first.exists()
