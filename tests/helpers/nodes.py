"""A Ray cluster of several nodes on this machine: ``ray.cluster_utils.Cluster`` in a separate process.

It has its own folder, token mode and mark, so it does not interfere with other Ray instances on the machine. Run as a
program, this file is that process: it reads a line of JSON for every node to add and answers with another.
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
    """One node: its id in Ray, and its raylet process, the parent of all others."""

    id: str
    raylet: int


class Nodes:
    """A head without CPUs, on which drivers run, and the nodes that tests add."""

    def __init__(self) -> None:
        from helpers.running import environment

        self.folder = tempfile.mkdtemp(prefix="vx", dir="/tmp")  # a short path, because Ray creates sockets in it
        self.mark = uuid.uuid4().hex
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
        """Add a node, for example with ``num_cpus=1``."""
        return Node(**self._ask(**node_args))

    def kill(self, node: Node) -> None:
        """Kill a node with SIGKILL: its raylet and all descendants."""
        for pid in (node.raylet, *_descendants(node.raylet)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def drain(self, node: Node, deadline_sec: int) -> None:
        """Tell Ray that a node is about to be taken away, like the notice of a spot machine."""
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.address]
        command += ["--node-id", node.id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
        command += ["--deadline-remaining-seconds", str(deadline_sec)]
        process = subprocess.run(command, env={**os.environ, **self.driver_env}, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr

    def workers(self, title: str = "RayTrainWorker") -> set[int]:
        """Processes on the nodes with this title, such as Ray Train's workers."""
        from helpers.running import processes_of

        pids = set[int]()
        for pid in processes_of(self.mark):
            with suppress(OSError):
                if title.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    pids.add(pid)
        return pids

    def close(self) -> None:
        from helpers.running import end_processes, processes_of

        end_processes({self._process.pid} | processes_of(self.mark))
        self._process.wait(30)
        end_processes(processes_of(self.mark))
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _descendants(pid: int) -> set[int]:
    """All descendants of a process."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    pids = {pid}
    while children := {child for child, parent in parents.items() if parent in pids} - pids:
        pids |= children
    return pids - {pid}


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
