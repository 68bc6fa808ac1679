"""Control a headless Chromium through the DevTools pipe, so that tests need no other package."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")


class Page:
    """An open page.

    Attributes:
        console: Console messages so far.
        requests: URLs requested so far.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._buffer, self._call_id, self._session, self._target = b"", 0, "", ""
        self.console: list[str] = []
        self.requests: list[str] = []

    def open(self, address: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Replace the open page by a file or URL and wait until it is loaded."""
        url, old_target = address if isinstance(address, str) else address.absolute().as_uri(), self._target
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        if old_target:  # of two tabs only one has the focus; the other one is slowed down
            self.call("Target.closeTarget", targetId=old_target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def wait_for(self, condition: str) -> None:
        for _ in range(600):
            if self.read(f"new Promise(done => setTimeout(() => done({condition}), 50))"):
                return
        raise AssertionError(f"never came true: {condition}")

    def read(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        response = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in response, response["exceptionDetails"]
        return response["result"].get("value")

    def click(self, selector: str) -> None:
        """Click with the mouse on the first element that matches a selector."""
        scroll = f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
        centre = "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2];"
        x, y = self.read(f"(() => {{ {scroll} {centre} }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a list."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.read(f"{element}.value = {json.dumps(value)}; {element}.dispatchEvent(new Event('change'))")
        assert self.read(f"{element}.value") == value, f"{selector} has no {value}"

    def type(self, selector: str, text: str) -> None:
        self.read(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """Press and release a key, such as ``Enter``, 13."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": chr(code)} if kind == "char" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def choose_files(self, selector: str, *paths: Path) -> None:
        """Choose files in an <input type="file">."""
        response = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        files = [str(path.absolute()) for path in paths]
        self.call("DOM.setFileInputFiles", files=files, objectId=response["result"]["objectId"])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        response = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(response["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Execute a command of the DevTools protocol; record the events that arrive before its response."""
        self._call_id += 1
        message = {"id": self._call_id, "method": method, "params": params}
        if self._session and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            received = self._receive()
            if received.get("id") == self._call_id:
                assert "error" not in received, (method, received["error"])
                return received["result"]
            self._record(received)

    def _record(self, event: dict[str, Any]) -> None:
        name, params = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(entry.get("value")) for entry in params["args"]))
        elif name == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif name == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._reader, 1 << 20)
            assert part, "the browser has exited"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser(folder: Path, *more_flags: str) -> Iterator[Page]:
    """Start a browser with its own profile in ``folder``."""
    assert BROWSER is not None
    to_child, writer = os.pipe()
    reader, from_child = os.pipe()

    # The pipe must be file descriptors 3 and 4 of the child. A shell sets them, because preexec_fn is not safe with
    # threads.
    command = f'exec 3<&{to_child} 4>&{from_child}; exec "$@"'
    flags = [*FLAGS, *more_flags, f"--user-data-dir={folder / 'profile'}"]
    process = subprocess.Popen(
        ["bash", "-c", command, "bash", BROWSER, *flags],
        pass_fds=(to_child, from_child),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_child)
    os.close(from_child)
    try:
        yield Page(reader, writer)
    finally:
        process.terminate()
        process.wait(30)
        os.close(writer)
        os.close(reader)
