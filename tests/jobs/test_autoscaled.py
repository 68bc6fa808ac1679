"""Jobs on a cluster without workers, whose autoscaler starts CPU nodes for features and GPU nodes for training."""

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
ON_FAKE_GPUS = (
    """
from functools import partial, partialmethod
import ray
from voxray.launch import process_group

def on_cpu():
    import ray.train.torch
    import torch
    ray.train.torch.get_device = lambda: torch.device("cpu")

ray.init = partial(ray.init, runtime_env={"worker_process_setup_hook": on_cpu})
process_group.ProcessGroup.__init__ = partialmethod(process_group.ProcessGroup.__init__, backend="gloo")
"""
    + SCRIPT
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Autoscaled]:
    autoscaled = Autoscaled(GROUPS)
    yield autoscaled
    autoscaled.close()


@pytest.fixture
def job(cluster: Autoscaled, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Run a job on the cluster to its end while counting the nodes; returns its output."""
    drivers = []

    def run(name: str, *flags: str, status: int = 0, script: str = ON_FAKE_GPUS) -> str:
        log = tmp_path / f"{name}.log"
        command = [sys.executable, "-c", script, str(ROOT / f"jobs/{name}.py"), "--model_id", TINY, *flags]
        drivers.append(Driver(command, log, cluster.driver_env))
        deadline = time.monotonic() + WAIT_SEC
        while drivers[-1].process.poll() is None:
            assert time.monotonic() < deadline, log.read_text() + cluster.log() + str(cluster.history)
            cluster.count_nodes()
            time.sleep(0.5)
        assert drivers[-1].process.returncode == status, log.read_text()
        return log.read_text()

    yield run
    for driver in drivers:
        driver.end()


def wait_until_gone(cluster: Autoscaled) -> None:
    deadline = time.monotonic() + WAIT_SEC
    while any(cluster.count_nodes().values()):
        assert time.monotonic() < deadline, cluster.history
        time.sleep(0.5)


def max_nodes(cluster: Autoscaled, group: str) -> int:
    return max(counts[group] for _, counts in cluster.history)


def test_nodes_start_for_each_job_and_stop_after_it(
    cluster: Autoscaled, job: Callable[..., str], small: dict[str, str], tmp_path: Path
) -> None:
    """featurize: 0 -> CPU nodes -> 0; training: 0 -> GPU nodes -> 0."""
    features = str(tmp_path / "features")
    rows = read_rows(small["tqa.train"])
    more_rows = [{**row, "input": f"{row['input']} {n}"} for row in rows for n in range(20)]
    train = write_rows(tmp_path / "train.jsonl", more_rows)
    job("featurize", "--manifest", train, "--rows_per_shard", "1", "--output_dir", features, "--num_actors", "4")
    wait_until_gone(cluster)
    print("featurize:", cluster.history)
    assert max_nodes(cluster, "data") == 2, "four actors on two nodes"
    assert max_nodes(cluster, "train") == 0, "no GPU for features"
    cluster.history.clear()
    flags = ["--train_jsonl", train, "--features_dir", features, "--num_workers", "2", "--max_steps", "5"]
    job("train_text", *flags, "--output_dir", str(tmp_path / "run"))
    wait_until_gone(cluster)
    print("train_text:", cluster.history)
    assert max_nodes(cluster, "train") == 2, "two workers, a GPU each"
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == [1, 2, 3, 4, 5]
    output = job("train_text", *flags, "--output_dir", str(tmp_path / "refused"), status=1, script=SCRIPT)
    assert "Ray reports a GPU on this node, but torch" in output.splitlines()[-1] and "starting again" not in output


def test_more_than_the_limits_allow_is_refused_at_once(
    cluster: Autoscaled, job: Callable[..., str], small: dict[str, str], tmp_path: Path
) -> None:
    """Workers get GPUs where a cluster can start any. At most 2 can be started here, and no node is started for 7."""
    wait_until_gone(cluster)
    flags = ["--train_jsonl", small["tqa.train"], "--output_dir", str(tmp_path / "run"), "--num_workers", "7"]
    output = job("train_text", *flags, status=2)
    assert output.splitlines()[-1].startswith(
        "error: --num_workers 7: the cluster has 2 GPU(s), including those it can still start"
    )
    assert not any(cluster.count_nodes().values())
