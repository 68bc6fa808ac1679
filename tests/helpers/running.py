"""Load, parse and start job scripts."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
JOBS = tuple(sorted(path.stem for path in (ROOT / "jobs").glob("*.py")))


def load_job(job: str) -> ModuleType:
    """Import a job's script as a new module, which a test may patch."""
    spec = importlib.util.spec_from_file_location(f"job_under_test_{job}", ROOT / "jobs" / f"{job}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Parsed(Exception):
    def __init__(self, settings: Any) -> None:
        self.settings = settings


def parse_only(job: str, argv: Sequence[str]) -> Any:
    """Settings that a job's script parses from its arguments, without running the job."""
    module = load_job(job)
    parse = module.parse

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Parsed(parse(*args, **kwargs))

    module.parse = stop
    try:
        module.main(list(argv))
    except _Parsed as parsed:
        return parsed.settings
    raise AssertionError(f"{job} never called parse")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The job commands in the ``` blocks of a page, as (job, argv).

    Every line that runs python with a script of jobs/ is a command, including `ray job submit` lines. A backslash at
    its end continues a line. A comment sign, a pipe, a redirection or && ends a command.
    """
    jobs = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if not re.search(r"\bpython[\d.]*\s+jobs/", line):
                continue
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            words = list(lexer)
            start = next(index for index, word in enumerate(words) if word.startswith("jobs/"))
            operators = [index for index, word in enumerate(words) if set(word) <= set("|&;<>")]
            end = next((index for index in operators if index > start), len(words))
            jobs.append((Path(words[start]).stem, words[start + 1 : end]))
    return jobs


def environment() -> dict[str, str]:
    """Environment of a job started as a process: this repository's code, no network, no other cluster."""
    others = ("RAY_", "PYTEST_", "LOCAL_RANK")  # DeepSpeed needs the last one, which tells Trainer of other processes
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    isolated = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}
    return {**inherited, **isolated, "PYTHONPATH": path}


def processes_of(*marks: str) -> set[int]:
    """Ids of processes with one of the marks in their command line or environment, and of all their descendants.

    Give every process tree that a test starts a unique mark, so that no other process can match.
    """
    parents, pids = {}, set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] == "Z":
                continue
            parents[int(folder.name)] = int(fields[1])
            text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if any(mark.encode() in text for mark in marks):
            pids.add(int(folder.name))
    while children := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids |= children
    return pids


def alive(pids: Iterable[int]) -> set[int]:
    """The processes that still run."""
    running = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                running.add(pid)
        except OSError:
            continue
    return running


def end_processes(pids: Iterable[int], timeout_sec: float = 30) -> None:
    """Kill processes that a test started, and wait until they are gone."""
    pids, deadline = set(pids), time.monotonic() + timeout_sec
    while remaining := alive(pids):
        assert time.monotonic() < deadline, f"processes {sorted(remaining)} cannot be killed"
        for pid in remaining:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def start(job: str, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a job as a process and wait for its end."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600, **options)


class Driver:
    """A running job, whose processes can be identified and killed.

    Args:
        log: File for the output of the job.
        more_env: Additional environment variables.
    """

    def __init__(self, command: list[str], log: Path, more_env: Mapping[str, str] | None = None) -> None:
        self.mark = f"voxray-test-{uuid.uuid4().hex}"
        self.log = open(log, "ab")  # noqa: SIM115  # open for the life of the process
        env = {**environment(), **(more_env or {}), "VOXRAY_TEST_DRIVER": self.mark}
        output = {"stdout": self.log, "stderr": self.log}
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **output)

    def processes(self) -> set[int]:
        """All processes of the job, including those in other process groups."""
        return processes_of(self.mark)

    def kill(self) -> None:
        """Send SIGKILL to the whole process group."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def end(self) -> None:
        end_processes(processes_of(self.mark))
        self.process.wait(30)
        self.log.close()
