"""Loading, parsing and starting job scripts, for the tests of this folder."""

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
    """A job's script as a module of its own, so that a test may change what it holds."""
    spec = importlib.util.spec_from_file_location(f"job_under_test_{job}", ROOT / "jobs" / f"{job}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Parsed(Exception):
    def __init__(self, settings: Any) -> None:
        self.settings = settings


def parse_only(job: str, argv: Sequence[str]) -> Any:
    """Settings that a job's script makes of its arguments, by its own class and demo recipe, without running it."""
    module = load_job(job)
    parse = module.parse

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Parsed(parse(*args, **kwargs))

    module.parse = stop
    try:
        module.main(list(argv))
    except _Parsed as found:
        return found.settings
    raise AssertionError(f"{job} never called parse")


def commands(text: str) -> list[tuple[str, list[str]]]:
    """The job commands in the ``` blocks of a page, as (job, argv).

    Every line in which python is given a script of jobs/ counts, `ray job submit` lines as well. A backslash at the end
    continues a line; what follows a comment sign, a pipe, a redirection or && is not the job's.
    """
    found = []
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if not re.search(r"\bpython[\d.]*\s+jobs/", line):
                continue
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            words = list(lexer)
            place = next(at for at, word in enumerate(words) if word.startswith("jobs/"))
            end = next((at for at, word in enumerate(words) if at > place and set(word) <= set("|&;<>")), len(words))
            found.append((Path(words[place]).stem, words[place + 1 : end]))
    return found


def environment() -> dict[str, str]:
    """Environment of a job started as a process: this repository's code, no network, no other cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **quiet, "PYTHONPATH": path}


def processes_of(*marks: str) -> set[int]:
    """Processes that hold one of the marks in their command line or environment, and all below them.

    Give every tree that a test starts a mark of its own: then nobody else's process can be among them.
    """
    parents, found = {}, set()
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
            found.add(int(folder.name))
    while below := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= below
    return found


def alive(pids: Iterable[int]) -> set[int]:
    """Those of the processes that still run."""
    found = set()
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(pid)
        except OSError:
            continue
    return found


def end_processes(pids: Iterable[int], timeout_sec: float = 30) -> None:
    """Kill processes that a test started, and wait until they are gone."""
    pids, deadline = set(pids), time.monotonic() + timeout_sec
    while left := alive(pids):
        assert time.monotonic() < deadline, f"processes {sorted(left)} cannot be killed"
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def start(job: str, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a job as a process to its end."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200, **options)


class Driver:
    """One start of a job, whose processes can be told from everybody else's and killed.

    Args:
        log: File that takes what it prints.
        more_env: What else stands in its environment.
    """

    def __init__(self, command: list[str], log: Path, more_env: Mapping[str, str] | None = None) -> None:
        self.mark = f"voxray-test-{uuid.uuid4().hex}"
        self.log = open(log, "ab")  # noqa: SIM115  # open for the life of the process
        env = {**environment(), **(more_env or {}), "VOXRAY_TEST_DRIVER": self.mark}
        output = {"stdout": self.log, "stderr": self.log}
        self.process = subprocess.Popen(command, env=env, start_new_session=True, **output)

    def processes(self) -> set[int]:
        """Everything that runs below this start, processes with a group of their own included."""
        return processes_of(self.mark)

    def kill(self) -> None:
        """SIGKILL to the whole process group, without any warning."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def end(self) -> None:
        end_processes(processes_of(self.mark))
        self.process.wait(30)
        self.log.close()
