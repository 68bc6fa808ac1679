"""Jobs on a cluster whose nodes die, are taken away, or are added: what is lost, and how long recovery takes.

Each test prints a line of the table in the section "An autoscaled cluster" of docs/cluster.md: what was killed, the
repeated steps or rows, and the seconds until the job made progress again.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY, manifest, read_rows, write_rows
from helpers.nodes import Node, Nodes
from helpers.running import ROOT, Driver, alive

from voxray.commands.train import run_training
from voxray.config.train import MultitaskSettings
from voxray.training.records import read_metrics

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(900)]
STEPS, WAIT_SEC = 160, 300
TASKS = ("asr", "sqa", "tqa")
TRAINING = ["--val_jsonl=", "--lora_dropout", "0", "--per_device_bsz", "2", "--grad_accum", "4", "--seed", "5"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    yield cluster
    cluster.close()


@pytest.fixture
def two(nodes: Nodes) -> Iterator[list[Node]]:
    """Two nodes with one CPU each, killed after the test."""
    two_nodes = [nodes.add(num_cpus=1) for _ in range(2)]
    yield two_nodes
    for node in two_nodes:
        nodes.kill(node)


@pytest.fixture(scope="module")
def features(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def reference_losses(
    one_thread: None, small: dict[str, str], features: str, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Losses of an uninterrupted run in one process, which computes both halves of every step."""
    run = tmp_path_factory.mktemp("planned")
    settings = {"model_id": TINY, "train_jsonl": [small[f"{task}.train"] for task in TASKS], "output_dir": str(run)}
    flags = {"lora_dropout": 0.0, "per_device_bsz": 2, "grad_accum": 8, "max_steps": STEPS, "num_workers": 0, "seed": 5}
    run_training(MultitaskSettings.model_validate({**settings, **flags, "features_dir": features}))
    return [record["loss"] for record in read_metrics(run, "train")]


class Run:
    """A training job on one to two nodes, and its metrics."""

    def __init__(self, nodes: Nodes, small: dict[str, str], features: str, folder: Path, *more: str) -> None:
        train = ",".join(small[f"{task}.train"] for task in TASKS)
        flags = ["--model_id", TINY, "--train_jsonl", train, "--output_dir", str(folder), "--features_dir", features]
        flags += ["--max_steps", str(STEPS), "--num_workers", "1:2", *TRAINING, *more]
        self._command = [sys.executable, str(ROOT / "jobs/train_multitask.py"), *flags]
        self.folder, self.log, self._nodes = folder, folder.with_suffix(".log"), nodes
        self.driver = self.start()

    def start(self) -> Driver:
        self.driver = Driver(self._command, self.log, self._nodes.driver_env)
        return self.driver

    def output(self) -> str:
        return self.log.read_text()

    def step(self) -> int:
        return max((record["step"] for record in read_metrics(self.folder, "train")), default=0)

    def resumes(self) -> list[int]:
        """Number of steps that each restart repeated."""
        return [record["repeated_steps"] for record in read_metrics(self.folder, "resume")]

    def wait_for(self, condition: Callable[[], bool]) -> float:
        """Wait for a condition; returns the seconds that took."""
        started_at = time.monotonic()
        while not condition():
            assert self.driver.process.poll() is None, self.output()
            assert time.monotonic() < started_at + WAIT_SEC, (
                self.output() + (self.folder / "ray.log").read_text()[-5000:]
            )
            time.sleep(0.1)
        return time.monotonic() - started_at

    def wait_for_steps(self, number: int) -> float:
        target = self.step() + number
        return self.wait_for(lambda: self.step() >= target)

    def wait_for_workers(self, number: int) -> None:
        """Wait until this many workers have done a few steps. On a busy machine they start at different times."""
        self.wait_for(lambda: len(self._nodes.workers()) == number and self.step() > 0)
        self.wait_for_steps(3)

    def wait_for_resume(self, num_before: int) -> float:
        """Wait for the first step of a further restart."""
        self.wait_for(lambda: len(self.resumes()) > num_before)
        return self.wait_for_steps(1)

    def wait_for_end(self, reference_losses: list[float]) -> None:
        """Wait for the end. Every step is recorded once, with the loss of its planned rows."""
        assert self.driver.process.wait(WAIT_SEC) == 0, self.output()
        records = read_metrics(self.folder, "train")
        assert [record["step"] for record in records] == list(range(1, STEPS + 1))
        assert [record["loss"] for record in records] == pytest.approx(reference_losses, abs=1e-4)

    def end(self) -> None:
        self.driver.end()


@pytest.fixture
def run(
    nodes: Nodes, two: list[Node], small: dict[str, str], features: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Run]:
    running = Run(nodes, small, features, tmp_path / "run", *getattr(request, "param", ()))
    yield running
    running.end()


def print_row(event: str, repeated: list[int], seconds: float) -> None:
    print(f"\n| {event} | steps repeated {repeated} | {seconds:.0f} s |")


@pytest.mark.parametrize("run", [("--save_steps", "10")], indirect=True)
def test_a_node_dies_and_another_is_added(
    nodes: Nodes, two: list[Node], run: Run, reference_losses: list[float]
) -> None:
    """After a SIGKILL of a node, training resumes with one worker. When a node is added, the run saves and grows."""
    run.wait_for_workers(2)
    num_starts = len(run.resumes())
    nodes.kill(two[1])
    started_at = time.monotonic()
    run.wait_for_resume(num_starts)
    print_row("node of one of two workers", run.resumes()[num_starts:], time.monotonic() - started_at)
    assert len(nodes.workers()) == 1 and 0 <= run.resumes()[-1] <= 10
    num_starts, started_at = len(run.resumes()), time.monotonic()
    two[1] = nodes.add(num_cpus=1)
    run.wait_for_resume(num_starts)
    print_row("nothing: a node was added", run.resumes()[num_starts:], time.monotonic() - started_at)
    assert len(nodes.workers()) == 2 and run.resumes()[-1] == 0, "saved before growing"
    run.wait_for_end(reference_losses)
    assert "more than 1 worker(s) fit into the cluster: starting again" in run.output()


@pytest.mark.parametrize("run", [("--save_steps", "100000")], indirect=True)
def test_a_node_is_taken_away(nodes: Nodes, two: list[Node], run: Run, reference_losses: list[float]) -> None:
    """A run saves before the deadline of a notice, although no checkpoint is due, and resumes on other nodes.

    The test kills the node as soon as the run has saved, because a run this short would end before the deadline.
    """
    run.wait_for_workers(2)
    num_starts, started_at, deadline_sec = len(run.resumes()), time.monotonic(), 40
    saved_before = len(list((run.folder / "checkpoints").glob("step-*")))
    nodes.drain(two[1], deadline_sec)
    run.wait_for(lambda: len(list((run.folder / "checkpoints").glob("step-*"))) > saved_before)
    save_sec = time.monotonic() - started_at
    assert save_sec < deadline_sec
    nodes.kill(two[1])
    run.wait_for_resume(num_starts)
    event = f"node with {deadline_sec} s of notice (saved after {save_sec:.0f} s)"
    print_row(event, run.resumes()[num_starts:], time.monotonic() - started_at)
    assert "a machine is about to leave: saved at step" in run.output()
    assert run.resumes()[-1] < 20, "only the steps since the notice"
    run.wait_for_end(reference_losses)


@pytest.mark.parametrize("run", [("--save_steps", "10")], indirect=True)
@pytest.mark.parametrize("target", ["driver", "TrainController"])
def test_the_driver_or_the_controller_dies(nodes: Nodes, run: Run, reference_losses: list[float], target: str) -> None:
    """After a SIGKILL of the driver, the same command resumes. After one of the controller, the driver does so itself.

    The test also truncates the files that Ray Train wrote, like a kill in the middle of writing.
    """
    run.wait_for_workers(2)
    num_starts, started_at = len(run.resumes()), time.monotonic()
    if target == "driver":
        pids = run.driver.processes() | nodes.workers()
        run.driver.kill()
        while alive(pids):
            assert time.monotonic() < started_at + WAIT_SEC
            time.sleep(0.2)
        for path in (run.folder / "ray").rglob("*.json"):
            path.write_bytes(path.read_bytes()[:10])
        run.driver.end()
        run.start()
    else:
        [controller] = nodes.workers("TrainController")
        os.kill(controller, signal.SIGKILL)
    run.wait_for_resume(num_starts)
    print_row(target, run.resumes()[num_starts:], time.monotonic() - started_at)
    assert 0 <= run.resumes()[-1] <= 10
    run.wait_for_end(reference_losses)


@pytest.fixture
def speech(tmp_path: Path) -> str:
    rows = [{**row, "id": f"row{index}"} for index, row in enumerate(read_rows(manifest("asr.train"))[:120])]
    return write_rows(tmp_path / "m.jsonl", rows)


@pytest.mark.parametrize("job", ["featurize", "evaluate"])
def test_a_node_dies_under_featurize_and_evaluate(
    nodes: Nodes, two: list[Node], speech: str, tmp_path: Path, job: str
) -> None:
    """After a SIGKILL of a busy node, the job continues on the other nodes, and every row is there once."""
    flags, pattern = {
        "featurize": (["--manifest", speech, "--rows_per_shard", "2"], "*/shards/*.arrow"),
        "evaluate": (
            ["--val_jsonl", speech, "--per_device_bsz", "1", "--gen_max_new_tokens", "32", "--num_models", "2"],
            "predictions/part-*.parquet",
        ),
    }[job]
    out, log = tmp_path / "out", tmp_path / "job.log"
    command = [sys.executable, str(ROOT / f"jobs/{job}.py"), "--model_id", TINY, "--output_dir", str(out), *flags]
    driver = Driver(command, log, nodes.driver_env)
    try:
        started_at = time.monotonic()
        while len(list(out.glob(pattern))) < 3:
            assert driver.process.poll() is None and time.monotonic() < started_at + WAIT_SEC, log.read_text()
            time.sleep(0.02)
        nodes.kill(two[1])
        started_at, num_files = time.monotonic(), len(list(out.glob(pattern)))
        while len(list(out.glob(pattern))) <= num_files + 2:
            assert driver.process.poll() is None and time.monotonic() < started_at + WAIT_SEC, log.read_text()
            time.sleep(0.02)
        print(f"\n| node under {job} | rows lost 0 | {time.monotonic() - started_at:.0f} s |")
        assert driver.process.wait(WAIT_SEC) == 0, log.read_text()
    finally:
        driver.end()
    assert not (out / "quarantine.jsonl").read_text(), "no row is blamed for the death of a node"
    if job == "evaluate":
        assert json.loads((out / "metrics.json").read_text())["asr"]["exact_match"]["n"] == 120
    else:
        [description] = out.glob("*/set.json")
        assert json.loads(description.read_text())["samples"] == 120
