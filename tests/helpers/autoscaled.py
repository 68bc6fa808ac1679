"""A Ray cluster whose autoscaler starts and stops nodes on this machine, like a cluster from cluster.yaml in a cloud.

``ray.cluster_utils.AutoscalingCluster`` cannot be used. Its constructor reads a file that the wheel lacks, and its
start and stop run ``ray stop --force``, which stops every Ray on the machine. This module starts one head with its own
port, folder and mark, and kills the processes with the mark.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from helpers.running import end_processes, environment, processes_of

HEAD_ID = "f" * 51 + "0" * 5
"""The id of the head in Ray's fake provider."""
EMPTY: dict[str, Any] = {
    **{key: {} for key in ("docker", "auth", "file_mounts")},
    **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")},
    **{key: [] for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")},
    **{key: [] for key in ("head_start_ray_commands", "worker_start_ray_commands")},
    "file_mounts_sync_continuously": False,
}
"""Keys that ``ray up`` adds and the autoscaler requires."""


class Autoscaled:
    """A head without CPUs, and groups of nodes that start on demand.

    Args:
        groups: {name: (resources of a node, maximum number of nodes)}. The resources identify the group of a node.
    """

    def __init__(self, groups: dict[str, tuple[dict[str, int], int]]) -> None:
        self.folder, self.mark, self._groups = tempfile.mkdtemp(prefix="vx", dir="/tmp"), uuid.uuid4().hex, groups
        ip, port = _own_address(), _free_port()
        self.address = f"{ip}:{port}"
        node_types = {
            name: {"resources": resources, "node_config": {}, "max_workers": max_nodes}
            for name, (resources, max_nodes) in groups.items()
        }
        config = {
            **EMPTY,
            "cluster_name": "voxray-test",
            "max_workers": sum(max_nodes for _, max_nodes in groups.values()),
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 0.1,
            "provider": {"type": "fake_multinode", "gcs_address": self.address, "use_node_id_as_ip": True},
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                **node_types,
            },
            "head_node_type": "ray.head.default",
        }
        path = Path(self.folder) / "ray_bootstrap_config.yaml"  # in the home folder, where `ray up` writes it
        path.write_text(json.dumps(config))
        self._env = {**environment(), "RAY_AUTH_MODE": "disabled", "HOME": self.folder, "VOXRAY_TEST_NODES": self.mark}
        del self._env["CUDA_VISIBLE_DEVICES"]  # with "", Ray refuses a node that claims a GPU
        self.driver_env = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", "HOME": self.folder}
        fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
        command += [f"--node-ip-address={ip}", "--num-cpus=0", f"--autoscaling-config={path}"]
        command += [f"--temp-dir={self.folder}", "--disable-usage-stats", "--dashboard-host=127.0.0.1"]
        self._log = open(Path(self.folder) / "start.log", "wb")  # noqa: SIM115  # open for the life of the process
        for attempts_left in (2, 1, 0):  # on a busy machine Ray's daemons time out on each other
            self._head = subprocess.Popen(
                command,
                env={**self._env, **fake, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID},
                cwd=self.folder,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
            if self._is_up():
                break
            end_processes({self._head.pid} | processes_of(self.mark))
            assert attempts_left, self.log()
        self._started_at = time.monotonic()
        self.history: list[tuple[int, dict[str, int]]] = []

    def _is_up(self) -> bool:
        num_starts, deadline = self.log().count("Ray runtime started"), time.monotonic() + 120
        while self._head.poll() is None and time.monotonic() < deadline:
            if self.log().count("Ray runtime started") > num_starts:
                return True
            time.sleep(0.5)
        return False

    def log(self) -> str:
        return (Path(self.folder) / "start.log").read_text()

    def count_nodes(self) -> dict[str, int]:
        """Number of running nodes of each group. Changes are appended to ``history`` as (second, counts)."""
        counts = dict.fromkeys(self._groups, 0)
        for pid in processes_of(self.mark):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
                if not words[0].endswith("/raylet"):
                    continue
                [argument] = [word for word in words if word.startswith("--static_resource_list=")]
                of_node = {name: float(number) for name, number in re.findall(r"(CPU|GPU),([\d.]+)", argument)}
                for name, (resources, _) in self._groups.items():
                    counts[name] += all(of_node.get(key, 0) == resources.get(key, 0) for key in ("CPU", "GPU"))
        if not self.history or self.history[-1][1] != counts:
            self.history.append((round(time.monotonic() - self._started_at), counts))
        return counts

    def close(self) -> None:
        end_processes({self._head.pid} | processes_of(self.mark))
        self._head.wait(30)
        end_processes(processes_of(self.mark))
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _own_address() -> str:
    """The address that Ray gives to nodes on this machine; Ray accepts no loopback address."""
    process = subprocess.run(
        [sys.executable, "-c", "import ray; print(ray.util.get_node_ip_address())"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=True,
    )
    return process.stdout.split()[-1]


def _free_port() -> int:
    """A free port outside 10002-19999, the range of Ray's workers."""
    while True:
        with socket.create_server(("", 0)) as server:
            if not 10002 <= (port := server.getsockname()[1]) <= 19999:
                return port
