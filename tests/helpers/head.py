"""A head node of Ray with a dashboard, to which `ray job submit` sends jobs.

It listens on the loopback interface, with its own free ports and folder. It and all its child processes have a mark in
their environment, by which ``start_head`` finds exactly these processes at its end.
"""

import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.running import ROOT, alive, end_processes, environment, processes_of

RAY = str(Path(sys.executable).with_name("ray"))
WAIT_SEC = 240


def free_ports(number: int) -> list[int]:
    """Free ports outside 10002-19999, which Ray gives to its workers."""
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < number:
            sockets.append(socket.create_server(("127.0.0.1", 0)))
            if 10002 <= sockets[-1].getsockname()[1] <= 19999:
                sockets.pop().close()
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


@dataclass
class Head:
    """A running head node, and calls to it."""

    address: str
    env: dict[str, str]
    submitted: list[str] = field(default_factory=list)

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self.env, cwd=ROOT, timeout=120)

    def submit(self, name: str, job: str, arguments: list[str]) -> str:
        """Submit a job as in the README, without waiting for it."""
        name = f"{name}-{uuid.uuid4().hex[:8]}"
        options = ["--address", self.address, "--submission-id", name, "--runtime-env", "runtime_env.yaml", "--no-wait"]
        deadline = time.monotonic() + WAIT_SEC
        while True:
            process = self.ray("submit", *options, "--", sys.executable, f"jobs/{job}.py", *arguments)
            if "No available agent" not in process.stderr or time.monotonic() > deadline:
                break
            time.sleep(2)
        assert process.returncode == 0, process.stdout + process.stderr
        self.submitted.append(name)
        return name

    def answers(self) -> bool:
        """Whether the dashboard answers, if only to ask for a token."""
        try:
            self.get("")
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/api/jobs/{path}", timeout=30) as answer:
            return json.load(answer)

    def wait(self, name: str, timeout_sec: float = WAIT_SEC) -> dict[str, Any]:
        """A finished job's details, including its log."""
        deadline = time.monotonic() + timeout_sec
        while (details := self.get(name))["status"] not in {"SUCCEEDED", "FAILED", "STOPPED"}:
            assert time.monotonic() < deadline, f"{name} is {details['status']}: {self.get(f'{name}/logs')['logs']}"
            time.sleep(0.5)
        return {**details, "logs": self.get(f"{name}/logs")["logs"]}


@contextmanager
def start_head(**variables: str) -> Iterator[Head]:
    """A head with its own ports and home folder, which ends with the block. A job runs the code that it brings."""
    folder, mark = tempfile.mkdtemp(prefix="vx", dir="/tmp"), uuid.uuid4().hex  # short: Ray makes sockets in it
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("metrics-export-port", "ray-client-server-port", "runtime-env-agent-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    env = {**environment(), **variables, "VOXRAY_TEST_HEAD": mark, "HOME": folder}
    del env["PYTHONPATH"]
    command = [RAY, "start", "--head", "--num-cpus=4", "--dashboard-host=127.0.0.1", "--disable-usage-stats", "--block"]
    command += [f"--temp-dir={folder}", *(f"--{name}={port}" for name, port in ports.items())]
    if not variables:  # as on a machine where Ray ran before: it then has a token, and a head asks for it
        subprocess.run([RAY, "get-auth-token", "--generate"], env=env, check=True, capture_output=True, timeout=60)
    with open(Path(folder) / "start.log", "w") as log:
        starter = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    head = Head(f"http://127.0.0.1:{ports['dashboard-port']}", env)
    try:
        deadline = time.monotonic() + 90
        while not head.answers():
            assert starter.poll() is None, (Path(folder) / "start.log").read_text()
            assert time.monotonic() < deadline, "the head does not answer"
            time.sleep(0.5)
        yield head
    finally:
        pids = {starter.pid} | processes_of(mark, folder)
        end_processes(pids)
        starter.wait(30)
        end_processes(processes_of(mark, folder))
        assert not processes_of(mark, folder) and not alive(pids)
        shutil.rmtree(folder, ignore_errors=True)
