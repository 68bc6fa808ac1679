"""The demo's server: from checked settings to a page that answers, until Ctrl-C or SIGTERM."""

import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

from voxray.cluster.session import term_is_interrupt
from voxray.config.demo import DemoSettings
from voxray.config.unused_flags import warn_about_unused_flags
from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.core.manifest import language_code

CLOSING_SEC = 1
"""How long open pages are waited for at the end; each of them holds a connection."""


def run_demo(settings: DemoSettings, example: str) -> None:
    """Load the model and serve its page.

    Args:
        example: A clip that the page offers to try, if there is such a file.
    Raises:
        RunError, SettingsError: What the user has to put right.
    """
    try:
        language_code(settings.language)
    except BadRow as error:
        raise SettingsError(f"--language: {error}") from None
    warn_about_unused_flags(settings)
    with term_is_interrupt(), _uploads(), _listener(settings.host, settings.port) as listener:
        try:
            import gradio  # noqa: F401  # said before a model is loaded
        except ImportError:
            raise RunError("the demo needs Gradio: pip install 'voxray[demo]'") from None
        from voxray.demo.answers import open_model

        answering, num_tensors = open_model(settings)
        if answering.how.adapter:
            print(f"adapter {answering.how.adapter}: {num_tensors} tensors", file=sys.stderr, flush=True)
        app = _app(answering, settings, example if Path(example).is_file() else "")
        _serve(app, listener, settings.host, on_stop=answering.stop)
    print("demo stopped", flush=True)


@contextmanager
def _uploads() -> Iterator[None]:
    """A folder of this process's own for what Gradio stores; it reads its place from the environment when imported."""
    with tempfile.TemporaryDirectory(prefix="voxray-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def _app(answering: Any, settings: DemoSettings, example: str) -> Any:
    """The page as a web application that takes uploads alone, and neither sends to nor fetches from anywhere else."""
    import gradio
    from fastapi import FastAPI
    from gradio import processing_utils

    from voxray.demo.page import build_page, look

    page = build_page(answering, settings, example)
    no_docs: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = gradio.mount_gradio_app(
        FastAPI(**no_docs),
        page,
        "/",
        app_kwargs=no_docs,
        footer_links=[],
        run_history=False,
        allowed_paths=[example] if example else [],
        max_file_size=int(settings.max_upload_mib * (1 << 20)),
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **look(),
    )
    # A request may name any file or address in the place of an upload. Gradio refuses files elsewhere on the machine
    # once a page is launched, of which mounting it takes no note; addresses on the internet it would fetch.
    page.has_launched = True
    processing_utils.async_ssrf_protected_get = _fetch_nothing
    return app


async def _fetch_nothing(url: str) -> Any:
    raise ValueError(f"{url}: this demo takes uploads alone, and fetches nothing")


@contextmanager
def _listener(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that holds the port from now on; it takes requests when the server does.

    Raises:
        RunError: The port is taken, or the address is none of this machine's.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            hint = "; --port 0 takes a free one" if port else ""
            raise RunError(f"--host {host} --port {port}: {error.strerror}{hint}") from None
        yield listener


def _serve(app: Any, listener: socket.socket, host: str, on_stop: Callable[[], None]) -> None:
    """Take requests until Ctrl-C or SIGTERM."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            on_stop()
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                _say_where(host, listener.getsockname()[1])

    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=CLOSING_SEC, ws="none")
    with _signals_end_it():
        Server(config).run([listener])


def _say_where(host: str, port: int) -> None:
    address = None if host == "localhost" else ip_address(host)
    everywhere = address is not None and address.is_unspecified
    if address is not None and not address.is_loopback:
        print(
            f"warning: --host {host}: anybody on the network can use this demo; browsers give it a microphone only on "
            "this machine, or behind https",
            file=sys.stderr,
            flush=True,
        )
    name = "127.0.0.1" if everywhere else f"[{host}]" if address is not None and address.version == 6 else host
    print(f"demo at http://{name}:{port}", flush=True)


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Let uvicorn's way of ending be all that Ctrl-C and SIGTERM do: it raises them once more when it is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended_by = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in ended_by}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
