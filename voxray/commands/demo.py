"""The demo job: serves a web page that answers with a model, until Ctrl-C or SIGTERM."""

import os
import signal
import socket
import sys
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
from voxray.core.errors import RunError

CLOSING_SEC = 1
"""How long the server waits for the connections of open pages when it stops."""


def run_demo(settings: DemoSettings, example: str) -> None:
    """Load the model and serve its page.

    Args:
        example: Path of a clip that the page offers as an example, if the file exists.
    Raises:
        RunError, SettingsError: The user has to fix an input or a setting.
    """
    warn_about_unused_flags(settings)
    with term_is_interrupt(), _uploads(), _listener(settings.host, settings.port) as listener:
        try:
            import gradio  # noqa: F401  # report a missing Gradio before loading a model
        except ImportError:
            raise RunError("the demo needs Gradio: pip install 'voxray[demo]'") from None
        from voxray.demo.answers import open_model

        answering, num_tensors = open_model(settings)
        if answering.config.adapter:
            print(f"adapter {answering.config.adapter}: {num_tensors} tensors", file=sys.stderr, flush=True)
        app = _app(answering, settings, example if Path(example).is_file() else "")
        _serve(app, listener, settings.host, on_stop=answering.stop)
    print("demo stopped", flush=True)


@contextmanager
def _uploads() -> Iterator[None]:
    """A temporary folder for Gradio's files. Gradio reads its path from the environment when it is imported."""
    from voxray.demo.guard import clips_folder

    with clips_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        yield


def _app(answering: Any, settings: DemoSettings, example: str) -> Any:
    """The page as a web application that accepts uploads only and makes no requests to other servers."""
    import gradio
    from fastapi import FastAPI
    from gradio import processing_utils

    from voxray.demo.guard import RequestGuard
    from voxray.demo.page import build_page, theme_options

    max_bytes = int(settings.max_upload_mib * (1 << 20))
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
        max_file_size=max_bytes,
        show_error=False,  # messages of unexpected errors name files of this machine
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **theme_options(),
    )
    # A request may name any file or URL instead of an upload. Gradio rejects files elsewhere on the machine only once
    # has_launched is set, which mounting the page does not do, and it would fetch URLs.
    page.has_launched = True
    processing_utils.async_ssrf_protected_get = _fetch_nothing
    return RequestGuard(app, settings.allowed_hosts, max_bytes)


async def _fetch_nothing(url: str) -> Any:
    raise ValueError(f"{url}: this demo takes uploads alone, and fetches nothing")


@contextmanager
def _listener(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound to the port, so that no other process takes it while the model loads.

    Raises:
        RunError: The port is in use, or the address is not one of this machine's.
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
    """Serve requests until Ctrl-C or SIGTERM."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            on_stop()
            super().handle_exit(sig, frame)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                _print_address(host, listener.getsockname()[1])

    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=CLOSING_SEC, ws="none")
    with _ignore_signals():
        Server(config).run([listener])


def _print_address(host: str, port: int) -> None:
    address = None if host == "localhost" else ip_address(host)
    all_interfaces = address is not None and address.is_unspecified
    if address is not None and not address.is_loopback:
        print(
            f"warning: --host {host}: anybody on the network can use this demo; browsers give it a microphone only on "
            "this machine, or behind https",
            file=sys.stderr,
            flush=True,
        )
    name = "127.0.0.1" if all_interfaces else f"[{host}]" if address is not None and address.version == 6 else host
    print(f"demo at http://{name}:{port}", flush=True)


@contextmanager
def _ignore_signals() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM outside uvicorn's own handlers: it stops on them and raises them again at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
