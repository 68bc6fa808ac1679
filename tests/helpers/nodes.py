"""A Ray cluster of several nodes on this machine: ``ray.cluster_utils.Cluster`` in a process of its own.

It has a folder, a token mode and a mark of its own, so that it and other Rays on the machine never meet. Started as a
program this file is that process: it takes a line of JSON for every node to add and answers with one.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Node:
    """One node: its id in Ray, and the process from which all its others come."""

    id: str
    raylet: int


class Nodes:
    """A head without CPUs, where drivers run, and the nodes that are added to it."""

    def __init__(self) -> None:
        from helpers.running import environment

        self.folder, self.mark = tempfile.mkdtemp(prefix="vx", dir="/tmp"), uuid.uuid4().hex  # short: Ray makes sockets
        env = {**environment(), "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": self.folder, "HOME": self.folder}
        env["VOXRAY_TEST_NODES"] = self.mark
        self._log = open(Path(self.folder) / "nodes.log", "wb")  # noqa: SIM115  # open for the life of the process
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, cwd=self.folder, text=True, start_new_session=True, **pipes
        )
        self.address: str = self._ask(num_cpus=0)["address"]
        self.driver_env = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": self.folder}

    def _ask(self, **node_args: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(node_args) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError((Path(self.folder) / "nodes.log").read_text())

    def add(self, **node_args: Any) -> Node:
        """Add a node, ``num_cpus=1`` for example."""
        return Node(**self._ask(**node_args))

    def kill(self, node: Node) -> None:
        """kill -9 of a node: its raylet and everything below it, at once."""
        for pid in (node.raylet, *_below(node.raylet)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def drain(self, node: Node, deadline_sec: int) -> None:
        """Tell Ray that a node is about to be taken away, as a cloud's spot notice does."""
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.address]
        command += ["--node-id", node.id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        command += ["--deadline-remaining-seconds", str(deadline_sec)]
        done = subprocess.run(command, env={**os.environ, **self.driver_env}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def workers(self, title: str = "RayTrainWorker") -> set[int]:
        """Processes on the nodes that bear a title, such as those that train."""
        from helpers.running import processes_of

        found = set[int]()
        for pid in processes_of(self.mark):
            with suppress(OSError):
                if title.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(pid)
        return found

    def close(self) -> None:
        from helpers.running import end_processes, processes_of

        end_processes({self._process.pid} | processes_of(self.mark))
        self._process.wait(30)
        end_processes(processes_of(self.mark))
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _below(pid: int) -> set[int]:
    """All processes that a process started, and those that these did."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found, more = set[int](), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more}
        found |= more
    return found


def serve() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=json.loads(sys.stdin.readline()))
    print(json.dumps({"address": cluster.address}), flush=True)
    for line in sys.stdin:
        node = cluster.add_node(**json.loads(line))
        raylet = node.all_processes["raylet"][0].process.pid
        print(json.dumps({"id": node.node_id, "raylet": raylet}), flush=True)


if __name__ == "__main__":
    serve()
