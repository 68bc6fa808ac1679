"""Sends requests to a server with OpenAI's API, and sends them again after errors that may pass."""

import random
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from voxray.core.errors import RunError, SettingsError, one_line
from voxray.generation.model import ServerAddress

RETRIED = {408, 409, 425, 429}
"""Statuses after which a request is sent again, beside those from 500 on."""
FIRST_WAIT_SEC, MAX_WAIT_SEC = 1.0, 60.0
"""Pauses before a request is sent again: the first one, which doubles each time, and the longest one."""
MAX_RETRY_AFTER_SEC = 600.0
"""Longest pause that a server may ask for. After a longer one the request is sent earlier than it asks."""
MAX_MESSAGE_CHARS = 200


class ServerError(Exception):
    """The server did not answer a row."""


class ServerClient:
    """A server; threads may share it.

    Raises:
        SettingsError: The address or the key cannot be used.
    """

    def __init__(self, address: ServerAddress) -> None:
        self.address = address
        self._key = address.key.get_secret_value()
        if not (self._key.isascii() and self._key.isprintable()):  # a library's message would quote it
            raise SettingsError(f"--server_key {address.key_variable}: its value has characters that no key has")
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            httpx2.URL(address.url)
        except httpx2.InvalidURL as error:
            raise SettingsError(f"--server {address.url}: {one_line(error)}") from None
        timeout = httpx2.Timeout(address.timeout_sec, pool=None)
        self._http = httpx2.Client(headers=headers, timeout=timeout, limits=httpx2.Limits())
        self._last_response = float("-inf")

    def post(self, path: str, stop: threading.Event, **content: Any) -> tuple[dict[str, Any], float]:
        """Send a request until it is answered.

        Args:
            path: Path below the address.
            stop: When it is set, nothing is sent again.
            content: Arguments of ``httpx2.Client.post``: the body.
        Returns:
            The JSON object of the response, and the time of the request in seconds.
        Raises:
            RunError: The server refuses the key, or nobody has reached it since the request was first sent.
            ServerError: The server did not answer the request.
        """
        begin, num_tries, reason = time.monotonic(), self.address.num_retries + 1, ""
        is_unreachable = True
        for attempt in range(num_tries):
            pause_sec = min(MAX_WAIT_SEC, FIRST_WAIT_SEC * 2**attempt) * random.uniform(0.5, 1)
            start_sec = time.perf_counter()
            try:
                response = self._http.post(f"{self.address.url}{path}", **content)
            except httpx2.RequestError as error:
                is_unreachable &= isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                reason = self._shown(f"{type(error).__name__}: {error}")
            else:
                self._last_response, is_unreachable = time.monotonic(), False
                if not (response.status_code in RETRIED or response.status_code >= 500):
                    return self._read(response), time.perf_counter() - start_sec
                reason = self._error_line(response)
                if (asked_sec := _retry_after_sec(response)) is not None:
                    pause_sec = asked_sec + random.uniform(0, FIRST_WAIT_SEC)
            if attempt + 1 < num_tries and stop.wait(pause_sec):
                raise ServerError(f"{reason}; the job has ended")
        if is_unreachable and self._last_response < begin:
            raise RunError(f"--server {self.address.url}: cannot be reached, in {num_tries} attempt(s): {reason}")
        raise ServerError(f"{reason} (attempt {num_tries} of {num_tries})")

    def _read(self, response: httpx2.Response) -> dict[str, Any]:
        """The JSON object of a response that is final."""
        if response.status_code in (401, 403):
            raise RunError(self._refusal(response))
        if not response.is_success:
            raise ServerError(self._error_line(response))
        try:
            body = response.json()
        except (ValueError, RecursionError):
            raise ServerError(f"the response is not JSON: {self._shown(response.text)!r}") from None
        if not isinstance(body, dict):
            raise ServerError(f"the response is not an object: {self._shown(response.text)!r}")
        return body

    def _refusal(self, response: httpx2.Response) -> str:
        start, variable = f"--server {self.address.url}: status {response.status_code}", self.address.key_variable
        if not self._key:
            return f"{start}: the server needs a key, and the environment variable {variable} is not set (--server_key)"
        return f"{start}: the server refuses the key in the environment variable {variable} (--server_key)"

    def _error_line(self, response: httpx2.Response) -> str:
        """Status and message of a response, in one line."""
        location = response.headers.get("location", "")
        return self._shown(f"status {response.status_code}: {_message(response) or location or 'without a message'}")

    def _shown(self, text: str) -> str:
        """A text of the server or a library in one short line, without the key."""
        text = text[: 10 * MAX_MESSAGE_CHARS]
        return one_line(text.replace(self._key, "***") if self._key else text, MAX_MESSAGE_CHARS)


def _message(response: httpx2.Response) -> str:
    """What the server says about an error, in the forms of OpenAI, FastAPI and others; else the body."""
    with suppress(ValueError, RecursionError):
        body = response.json()
        for name in ("error", "message", "detail"):
            if isinstance(body, dict) and (value := body.get(name)):
                inner = value.get("message") if isinstance(value, dict) else None
                return str(inner or value)
    return response.text


def _retry_after_sec(response: httpx2.Response) -> float | None:
    """Seconds to wait by the header Retry-After, which has a number or a date; None without a usable one."""
    value, seconds = response.headers.get("retry-after", ""), -1.0
    with suppress(ValueError, TypeError):
        try:
            seconds = float(value)
        except ValueError:
            seconds = max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    return min(seconds, MAX_RETRY_AFTER_SEC) if seconds >= 0 else None
