"""A headless Chromium that opens a page, is clicked and read: over DevTools' pipe, so that nothing else is needed."""

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
    """An open page; ``console`` and ``requests`` are what it said and asked for so far."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader, self._writer = reader, writer
        self._left, self._number, self._session, self._target = b"", 0, "", ""
        self.console: list[str] = []
        self.requests: list[str] = []

    def open(self, place: Path | str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file or a URL in the place of what is open and wait until all of it is there."""
        url, before = place if isinstance(place, str) else place.absolute().as_uri(), self._target
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        if before:  # two tabs would take the focus, and their pace, from each other
            self.call("Target.closeTarget", targetId=before)
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
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str) -> None:
        """Click with the mouse on the first element that a selector finds."""
        found = f"const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
        middle = "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2];"
        place = self.read(f"(() => {{ {found} {middle} }})()")
        for kind in ("mousePressed", "mouseReleased"):
            event = {"type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", **event)

    def choose(self, selector: str, value: str) -> None:
        """Choose from a list, as a person would."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.read(f"{place}.value = {json.dumps(value)}; {place}.dispatchEvent(new Event('change'))")
        assert self.read(f"{place}.value") == value, f"{selector} has no {value}"

    def type(self, selector: str, text: str) -> None:
        self.read(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        """A key that is pressed and released, such as ``Enter``, 13."""
        for kind in ("rawKeyDown", "char", "keyUp"):
            text = {"text": chr(code)} if kind == "char" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def give_files(self, selector: str, *paths: Path) -> None:
        """Choose files in an <input type="file">."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        files = [str(path.absolute()) for path in paths]
        self.call("DOM.setFileInputFiles", files=files, objectId=found["result"]["objectId"])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol; what the page says meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._note(found)

    def _note(self, event: dict[str, Any]) -> None:
        name, params = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(entry.get("value")) for entry in params["args"]))
        elif name == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif name == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = os.read(self._reader, 1 << 20)
            assert part, "the browser is gone"
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)


@contextmanager
def browser(folder: Path, *more_flags: str) -> Iterator[Page]:
    """A browser with a profile of its own in ``folder``."""
    assert BROWSER is not None
    to_child, writer = os.pipe()
    reader, from_child = os.pipe()

    # The pipe has to be file descriptors 3 and 4 of the child; a shell puts them there, which preexec_fn would do less
    # safely among threads.
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
