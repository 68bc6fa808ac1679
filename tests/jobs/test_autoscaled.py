"""Jobs on a cluster that has no worker at all until one needs it: CPU nodes for features, GPU nodes for training."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY, read_rows, write_rows
from helpers.autoscaled import Autoscaled
from helpers.running import ROOT, Driver

from voxray.training.records import read_metrics

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(900)]
WAIT_SEC = 300
GROUPS = {"data": ({"CPU": 2}, 2), "train": ({"CPU": 1, "GPU": 1}, 2)}
SCRIPT = """
import runpy
import sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ON_PRETENDED_GPUS = (
    """
from functools import partial, partialmethod
import ray
from voxray.launch import process_group as ray_backend

def on_cpu():
    import ray.train.torch
    import torch
    ray.train.torch.get_device = lambda: torch.device("cpu")

ray.init = partial(ray.init, runtime_env={"worker_process_setup_hook": on_cpu})
ray_backend.ProcessGroup.__init__ = partialmethod(ray_backend.ProcessGroup.__init__, backend="gloo")
"""
    + SCRIPT
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaled]:
    started = Autoscaled(GROUPS)
    yield started
    started.close()


@pytest.fixture
def job(cluster: Autoscaled, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Run a job on the cluster to its end, looking at the nodes meanwhile; returns what it said."""
    drivers = []

    def run(name: str, *flags: str, status: int = 0, script: str = ON_PRETENDED_GPUS) -> str:
        log = tmp_path / f"{name}.log"
        command = [sys.executable, "-c", script, str(ROOT / f"jobs/{name}.py"), "--model_id", TINY, *flags]
        drivers.append(Driver(command, log, cluster.driver_env))
        deadline = time.monotonic() + WAIT_SEC
        while drivers[-1].process.poll() is None:
            assert time.monotonic() < deadline, log.read_text() + cluster.log() + str(cluster.seen)
            cluster.look()
            time.sleep(0.5)
        assert drivers[-1].process.returncode == status, log.read_text()
        return log.read_text()

    yield run
    for driver in drivers:
        driver.end()


def wait_until_gone(cluster: Autoscaled) -> None:
    deadline = time.monotonic() + WAIT_SEC
    while any(cluster.look().values()):
        assert time.monotonic() < deadline, cluster.seen
        time.sleep(0.5)


def most(cluster: Autoscaled, group: str) -> int:
    return max(counts[group] for _, counts in cluster.seen)


def test_nodes_come_for_each_job_and_go_when_it_is_done(
    cluster: Autoscaled, job: Callable[..., str], small: dict[str, str], tmp_path: Path
) -> None:
    """featurize: 0 -> CPU nodes -> 0; training: 0 -> GPU nodes -> 0."""
    features = str(tmp_path / "features")
    rows = read_rows(small["tqa.train"])
    many = [{**row, "input": f"{row['input']} {n}"} for row in rows for n in range(20)]
    train = write_rows(tmp_path / "train.jsonl", many)
    job("featurize", "--manifest", train, "--rows_per_shard", "1", "--output_dir", features, "--num_actors", "4")
    wait_until_gone(cluster)
    print("featurize:", cluster.seen)
    assert most(cluster, "data") == 2 and most(cluster, "train") == 0, "four actors on two nodes; no GPU for features"
    cluster.seen.clear()
    flags = ["--train_jsonl", train, "--features_dir", features, "--num_workers", "2", "--max_steps", "5"]
    job("train_text", *flags, "--output_dir", str(tmp_path / "run"))
    wait_until_gone(cluster)
    print("train_text:", cluster.seen)
    assert most(cluster, "train") == 2, "two workers, a GPU each"
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == [1, 2, 3, 4, 5]
    said = job("train_text", *flags, "--output_dir", str(tmp_path / "refused"), status=1, script=SCRIPT)
    assert "Ray counts a GPU there, and torch" in said.splitlines()[-1] and "starting again" not in said


def test_more_than_the_limits_allow_is_refused_at_once(
    cluster: Autoscaled, job: Callable[..., str], small: dict[str, str], tmp_path: Path
) -> None:
    """2 x 2 + 2 CPUs may be started, so seven workers never find room; nothing is started for them."""
    wait_until_gone(cluster)
    flags = ["--train_jsonl", small["tqa.train"], "--output_dir", str(tmp_path / "run"), "--num_workers", "7"]
    said = job("train_text", *flags, status=2)
    assert said.splitlines()[-1].startswith("error: --num_workers 7: the cluster has 6 CPU(s)")
    assert not any(cluster.look().values())
