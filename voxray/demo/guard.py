"""What reaches the demo's page: requests by its own name and of limited size. Its folder for clips."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

PREFIX = "voxray-demo-"
MAX_OVERHEAD_BYTES = 1 << 20  # of a form around a file, and of a request without one


class RequestGuard:
    """Refuses requests before they reach the page.

    A web site can let its own name point to this machine, and would then read what the page returns. Its requests have
    that name in their Host header. So names other than this machine's are refused, and addresses are not.

    Args:
        app: The page, an ASGI application.
        allowed_hosts: Further names of this machine.
        max_bytes: Largest file.
    """

    def __init__(self, app: Any, allowed_hosts: tuple[str, ...], max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes + MAX_OVERHEAD_BYTES
        names = ("localhost", socket.gethostname(), *allowed_hosts)
        self._hosts = {name.lower() for name in names}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        host, length = headers.get(b"host", b"").decode("latin-1"), headers.get(b"content-length", b"0")
        if not self._is_allowed(host):
            await _refuse(send, 421, "This demo has another name: --allowed_hosts of jobs/demo.py adds one.")
        elif not length.isdigit() or int(length) > self._max_bytes:
            await _refuse(send, 413, "This request is too large.")
        else:
            await self._pass_on(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
        try:
            ip_address(name)
        except ValueError:
            return name.lower().rstrip(".") in self._hosts
        return True

    async def _pass_on(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Count what arrives: a request may come without its length."""
        num_bytes, has_answered = 0, False

        async def receive_counted() -> Any:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            return {"type": "http.disconnect"} if num_bytes > self._max_bytes else message

        async def send_unless_refused(message: Any) -> None:
            nonlocal has_answered
            if num_bytes <= self._max_bytes or has_answered:
                has_answered = True
                await send(message)

        try:
            await self._app(scope, receive_counted, send_unless_refused)
        except Exception:
            if num_bytes <= self._max_bytes:
                raise
        if num_bytes > self._max_bytes and not has_answered:
            await _refuse(send, 413, "This request is too large.")


async def _refuse(send: Any, status: int, message: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": message.encode()})


@contextmanager
def clips_folder() -> Iterator[Path]:
    """A temporary folder for the clips of this demo, named by its process. Those of dead demos are removed first."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        pid, _, rest = folder.name.removeprefix(PREFIX).partition("-")
        start = rest.partition("-")[0]
        if pid.isdigit() and start.isdigit() and _start_time(int(pid)) != int(start) and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
    prefix = f"{PREFIX}{os.getpid()}-{_start_time(os.getpid())}-"
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _start_time(pid: int) -> int:
    """When a process started, in clock ticks since the start of the machine; -1 if there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return -1
    return int(status.rpartition(")")[2].split()[19])
