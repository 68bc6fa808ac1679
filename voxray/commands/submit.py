"""Handing a job in to a running cluster, and following it: ``ray job submit`` with the job's own exit status.

The upload is what runtime_env.yaml says, without .git, data and results. No secret travels with it: what a job needs
to reach storage or a hub is on the nodes, because a submission's environment can be read on the dashboard.
"""

import asyncio
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from voxray.config.parse import REPOSITORY
from voxray.config.submit import SubmitSettings
from voxray.core.errors import RunError, one_line

DONE = {"SUCCEEDED", "FAILED", "STOPPED"}
STOPPED_STATUS = 130
LOST_SEC = 120.0
"""How long the dashboard may be silent, a restart of the forwarding say, before the job is left alone."""


def run_submit(settings: SubmitSettings, job: str, flags: Sequence[str]) -> int:
    """Hand the job in, and follow it unless told otherwise.

    Args:
        job: Name of a script in ``jobs``.
        flags: Its flags.
    Returns:
        The job's exit status; 130 if it was stopped, 0 if it is not waited for.
    Raises:
        RunError: No cluster answers, it refuses, or it is lost on the way.
    """
    client = _client(settings)
    name = f"{settings.name or job}-{uuid4().hex[:8]}"
    runtime_env = yaml.safe_load((REPOSITORY / "runtime_env.yaml").read_text(encoding="utf-8"))
    runtime_env["working_dir"] = str(REPOSITORY)
    entrypoint = f"python jobs/{job}.py {shlex.join(flags)}".rstrip()
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime_env)
    except Exception as error:  # the client raises whatever its HTTP library does
        raise RunError(f"--address {settings.address}: {_line(error)}") from None
    print(f"submitted {name}: {entrypoint}", flush=True)
    return _follow(client, name) if settings.wait else 0


def _client(settings: SubmitSettings) -> Any:
    """Ray's client; it reads how to authenticate from the environment, once, when Ray is imported."""
    has_token = "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").is_file()
    if settings.auth != "auto" or "RAY_AUTH_MODE" not in os.environ:
        wants_token = settings.auth == "token" or (settings.auth == "auto" and has_token)
        os.environ["RAY_AUTH_MODE"] = "token" if wants_token else "disabled"
    if settings.auth == "token" and not has_token:
        raise RunError("--auth token: this machine has none; `ray get-auth-token --generate` makes one")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(settings.address)
    except Exception as error:  # as above
        raise RunError(f"--address {settings.address}: no cluster answers there: {_line(error)}") from None


def _follow(client: Any, name: str) -> int:
    """Show a job's output until it has ended; Ctrl-C stops it, a second one leaves it to itself."""
    output, is_asked = _Output(client, name), False
    while True:
        try:
            details = _details(client, name)
            if str(details.status) in DONE:
                break
            time.sleep(1.0)
        except KeyboardInterrupt:
            if is_asked:
                raise RunError(f"{name} goes on by itself; `ray job logs {name}` shows its output") from None
            is_asked = True
            print("stopping the job, which saves itself first; Ctrl-C again leaves it alone", flush=True)
            client.stop_job(name)
    output.finish()
    status = str(details.status)
    print(f"{name}: {status.lower()}", flush=True)
    if status == "STOPPED":
        return STOPPED_STATUS
    return 0 if status == "SUCCEEDED" else details.driver_exit_code or 1


def _details(client: Any, name: str) -> Any:
    """A job's details, asked for again while the dashboard does not answer.

    Raises:
        RunError: It did not for two minutes.
    """
    deadline = time.monotonic() + LOST_SEC
    while True:
        try:
            return client.get_job_info(name)
        except Exception as error:  # as above
            if time.monotonic() > deadline:
                raise RunError(f"{name}: the cluster does not answer any more: {_line(error)}") from None
            time.sleep(2.0)


class _Output:
    """A job's output, printed in the background as it comes; after a break in the connection, what is new."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name, self._shown = client, name, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_following, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Print what is left once the job has ended."""
        self._ended.set()
        self._thread.join(10)
        with suppress(Exception):  # the client raises whatever its HTTP library does
            self._show(self._client.get_job_logs(self._name), 0)

    def _keep_following(self) -> None:
        while not self._ended.is_set():
            with suppress(Exception):  # as above
                asyncio.run(self._follow())
            self._ended.wait(1.0)

    async def _follow(self) -> None:
        seen = 0
        async for text in self._client.tail_job_logs(self._name):
            self._show(text, seen)
            seen += len(text)

    def _show(self, text: str, start: int) -> None:
        """Print the part of a text, which begins at ``start`` of the output, that nobody has seen."""
        sys.stdout.write(text[max(0, self._shown - start) :])
        sys.stdout.flush()
        self._shown = max(self._shown, start + len(text))


def _line(error: Exception) -> str:
    return one_line(error, 300)
