"""The submit job: submits a job to a running cluster and follows it, like ``ray job submit`` but with its exit status.

runtime_env.yaml sets what is uploaded: the repository without .git, data and results. No secrets are uploaded, because
anyone can read a submission's environment on the dashboard; credentials for storage or a hub belong on the nodes.
"""

import asyncio
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from voxray.config.parse import SUBMITTED_JOB_VARIABLE
from voxray.config.submit import SubmitSettings
from voxray.core.errors import RunError, SettingsError, one_line
from voxray.core.project_files import IN_WHEEL, PACKAGE, PROJECT_FILES, job_script

DONE = {"SUCCEEDED", "FAILED", "STOPPED"}
STOPPED_STATUS = 130
ENTRYPOINT = ("entrypoint_num_cpus", "entrypoint_num_gpus")
CONFIG_FLAGS = {"--config", "--cfg-path", "--cfg_path"}
SENT_CONFIG = "submitted.yaml"
"""Name that the user's settings file gets in the job's folder on the cluster."""
LOCAL_ADDRESS = "http://127.0.0.1:8265"
LOST_SEC = 120.0
"""How long the dashboard may be unreachable, as while port forwarding restarts, before submit gives up on the job."""


def run_submit(settings: SubmitSettings, job: str, flags: Sequence[str]) -> int:
    """Submit a job, and with ``--wait`` follow it to its end.

    Args:
        job: Name of a script in ``jobs``.
        flags: The job's flags.
    Returns:
        The job's exit status; 130 if it was stopped, 0 with ``--no_wait``.
    Raises:
        RunError: No cluster answers, it rejects the job, or the connection is lost.
        SettingsError: There is no address.
        SystemExit: Status 2 if the job's flags are invalid. One line for each is printed before anything is uploaded.
    """
    check_flags(job, flags)
    settings = settings.model_copy(update={"address": settings.address or _confirmed_address(job)})
    client = _client(settings)
    name = f"{settings.name or job}-{uuid4().hex[:8]}"
    runtime_env = yaml.safe_load((PROJECT_FILES / "runtime_env.yaml").read_text(encoding="utf-8"))
    runtime_env["working_dir"] = str(PROJECT_FILES)
    if PROJECT_FILES == IN_WHEEL:
        runtime_env["py_modules"] = [str(PACKAGE)]
    flags, file = _pack_config(flags)
    command = f"python jobs/{job}.py {shlex.join(flags)}".rstrip()
    entrypoint = f"cat > {SENT_CONFIG} <<'END-OF-{name}'\n{file}\nEND-OF-{name}\nexec {command}" if file else command
    options = {key: value for key in ENTRYPOINT if (value := getattr(settings, key))}
    deadline = time.monotonic() + LOST_SEC
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime_env, **options)
            break
        except Exception as error:  # the client raises whatever its HTTP library does
            is_starting = "No available agent" in str(error)  # a head that has just been started, on a busy machine
            if not is_starting or time.monotonic() > deadline:
                raise RunError(f"--address {settings.address}: {one_line(error, 300)}") from None
            time.sleep(2.0)
    print(f"submitted {name}: {command}", flush=True)
    return _follow(client, name) if settings.wait else 0


def check_flags(job: str, flags: Sequence[str]) -> None:
    """Let the job's own script check its flags on this machine, from the folder whose copy the job will run in.

    Raises:
        SystemExit: Status 2 after it printed one line for each invalid setting.
    """
    words = list(flags)
    for index, path in _config(flags):
        words[index] = words[index].removesuffix(path) + os.path.abspath(path)
    command = [sys.executable, str(job_script(job)), *words, "--check_flags"]
    env = {**os.environ, SUBMITTED_JOB_VARIABLE: "{}"}
    if flags and subprocess.run(command, cwd=PROJECT_FILES, env=env, stdout=subprocess.DEVNULL).returncode == 2:
        raise SystemExit(2)


def _config(flags: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(index of the word that holds it, path) of each file of --config that is on this machine, seen from here."""
    for index, word in enumerate(flags):
        name, is_one_word, value = word.partition("=")
        if name in CONFIG_FLAGS and (is_one_word or index + 1 < len(flags)):
            path = value if is_one_word else flags[index + 1]
            if os.path.isfile(path):
                yield (index if is_one_word else index + 1), path


def _pack_config(flags: Sequence[str]) -> tuple[list[str], str]:
    """The flags for the cluster, and the text of a settings file that is not among the uploaded files; "" without one.

    Raises:
        SettingsError: The file cannot be read.
    """
    words = list(flags)
    for index, path in _config(flags):
        absolute = Path(path).resolve()
        prefix = words[index].removesuffix(path)
        if absolute.is_relative_to(PROJECT_FILES / "jobs"):
            words[index] = prefix + str(absolute.relative_to(PROJECT_FILES))
            continue
        try:
            text = absolute.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SettingsError(f"--config {path}: {one_line(error)}") from None
        words[index] = prefix + SENT_CONFIG
        return words, text
    return words, ""


def _confirmed_address(job: str) -> str:
    """The address to use without ``--address``. A Ray on this machine may be another user's.

    Raises:
        SettingsError: There is nobody to ask, or the answer is no.
    """
    if address := os.environ.get("RAY_API_SERVER_ADDRESS"):
        print(f"submitting {job} to {address} (RAY_API_SERVER_ADDRESS)", flush=True)
        return address
    if sys.stdin.isatty() and input(f"submit {job} to {LOCAL_ADDRESS}? [y/N] ").strip().lower() in ("y", "yes"):
        return LOCAL_ADDRESS
    raise SettingsError(f"--address: name the cluster, such as --address {LOCAL_ADDRESS}")


def _client(settings: SubmitSettings) -> Any:
    """Ray's client. Ray reads RAY_AUTH_MODE from the environment once, when it is imported."""
    file = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    has_token = "RAY_AUTH_TOKEN" in os.environ or Path(file).is_file()
    if settings.auth != "auto" or "RAY_AUTH_MODE" not in os.environ:
        use_token = settings.auth == "token" or (settings.auth == "auto" and has_token)
        os.environ["RAY_AUTH_MODE"] = "token" if use_token else "disabled"
    if settings.auth == "token" and not has_token:
        raise RunError("--auth token: this machine has none; `ray get-auth-token --generate` makes one")
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(settings.address)
    except Exception as error:  # as above
        raise RunError(f"--address {settings.address}: no cluster answers there: {one_line(error, 300)}") from None


def _follow(client: Any, name: str) -> int:
    """Print a job's output until it ends, and return its exit status. Ctrl-C stops the job, a second one detaches."""
    output, is_stopping = _Output(client, name), False
    while True:
        try:
            details = _details(client, name)
            if str(details.status) in DONE:
                break
            time.sleep(1.0)
        except KeyboardInterrupt:
            if is_stopping:
                raise RunError(f"{name} goes on by itself; `ray job logs {name}` shows its output") from None
            is_stopping = True
            print("stopping the job, which saves itself first; Ctrl-C again leaves it alone", flush=True)
            client.stop_job(name)
    output.finish()
    status = str(details.status)
    print(f"{name}: {status.lower()}", flush=True)
    if status == "STOPPED":
        return STOPPED_STATUS
    return 0 if status == "SUCCEEDED" else details.driver_exit_code or 1


def _details(client: Any, name: str) -> Any:
    """A job's details; retries while the dashboard does not answer.

    Raises:
        RunError: It does not answer for two minutes.
    """
    deadline = time.monotonic() + LOST_SEC
    while True:
        try:
            return client.get_job_info(name)
        except Exception as error:  # as above
            if time.monotonic() > deadline:
                raise RunError(f"{name}: the cluster does not answer any more: {one_line(error, 300)}") from None
            time.sleep(2.0)


class _Output:
    """Prints a job's output in a background thread; after a lost connection it continues where it stopped."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name, self._num_printed = client, name, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_following, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Print the rest of the output after the job has ended."""
        self._ended.set()
        self._thread.join(10)
        with suppress(Exception):  # the client raises whatever its HTTP library does
            self._print(self._client.get_job_logs(self._name), 0)

    def _keep_following(self) -> None:
        while not self._ended.is_set():
            with suppress(Exception):  # as above
                asyncio.run(self._follow())
            self._ended.wait(1.0)

    async def _follow(self) -> None:
        offset = 0
        async for text in self._client.tail_job_logs(self._name):
            self._print(text, offset)
            offset += len(text)

    def _print(self, text: str, offset: int) -> None:
        """Print the part of ``text``, which starts at ``offset`` of the output, that is not printed yet."""
        sys.stdout.write(text[max(0, self._num_printed - offset) :])
        sys.stdout.flush()
        self._num_printed = max(self._num_printed, offset + len(text))
