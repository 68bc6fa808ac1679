"""Jobs on a cluster of several nodes that die, are taken away, and come: what is lost, and how long it takes.

Each test prints a line of the table in README's operating guide: what was killed, the steps or rows that were repeated,
and the seconds until work was done again.
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
    """Two nodes with one CPU each, gone after the test."""
    added = [nodes.add(num_cpus=1) for _ in range(2)]
    yield added
    for node in added:
        nodes.kill(node)


@pytest.fixture(scope="module")
def features(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def planned(
    one_thread: None, small: dict[str, str], features: str, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Losses of the run that nobody interrupts: one process that takes both halves of every step."""
    run = tmp_path_factory.mktemp("planned")
    settings = {"model_id": TINY, "train_jsonl": [small[f"{task}.train"] for task in TASKS], "output_dir": str(run)}
    flags = {"lora_dropout": 0.0, "per_device_bsz": 2, "grad_accum": 8, "max_steps": STEPS, "num_workers": 0, "seed": 5}
    run_training(MultitaskSettings.model_validate({**settings, **flags, "features_dir": features}))
    return [record["loss"] for record in read_metrics(run, "train")]


class Run:
    """A training job on one to two nodes, and what its metrics say of it."""

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

    def said(self) -> str:
        return self.log.read_text()

    def step(self) -> int:
        return max((record["step"] for record in read_metrics(self.folder, "train")), default=0)

    def resumes(self) -> list[int]:
        """Steps that every new start repeated."""
        return [record["repeated_steps"] for record in read_metrics(self.folder, "resume")]

    def wait_for(self, what: Callable[[], bool]) -> float:
        """Wait until it is so; returns the seconds that took."""
        began = time.monotonic()
        while not what():
            assert self.driver.process.poll() is None, self.said()
            assert time.monotonic() < began + WAIT_SEC, self.said() + (self.folder / "ray.log").read_text()[-5000:]
            time.sleep(0.1)
        return time.monotonic() - began

    def wait_for_steps(self, number: int) -> float:
        target = self.step() + number
        return self.wait_for(lambda: self.step() >= target)

    def wait_for_workers(self, number: int) -> None:
        """Wait until so many train, and stepped a little; on a busy machine one may be later than the other."""
        self.wait_for(lambda: len(self._nodes.workers()) == number and self.step() > 0)
        self.wait_for_steps(3)

    def wait_for_resume(self, before: int) -> float:
        """Wait for the first step of a start after so many."""
        self.wait_for(lambda: len(self.resumes()) > before)
        return self.wait_for_steps(1)

    def wait_for_end(self, planned: list[float]) -> None:
        """To the end; every step was done once, on the rows that were planned for it."""
        assert self.driver.process.wait(WAIT_SEC) == 0, self.said()
        records = read_metrics(self.folder, "train")
        assert [record["step"] for record in records] == list(range(1, STEPS + 1))
        assert [record["loss"] for record in records] == pytest.approx(planned, abs=1e-4)

    def end(self) -> None:
        self.driver.end()


@pytest.fixture
def run(
    nodes: Nodes, two: list[Node], small: dict[str, str], features: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Run]:
    started = Run(nodes, small, features, tmp_path / "run", *getattr(request, "param", ()))
    yield started
    started.end()


def row(what: str, repeated: list[int], seconds: float) -> None:
    print(f"\n| {what} | steps repeated {repeated} | {seconds:.0f} s |")


@pytest.mark.parametrize("run", [("--save_steps", "10")], indirect=True)
def test_a_node_dies_and_another_comes(nodes: Nodes, two: list[Node], run: Run, planned: list[float]) -> None:
    """kill -9 of a node: training goes on with the worker that is left; a new node: it saves itself and grows."""
    run.wait_for_workers(2)
    starts = len(run.resumes())
    nodes.kill(two[1])
    began = time.monotonic()
    run.wait_for_resume(starts)
    row("node of one of two workers", run.resumes()[starts:], time.monotonic() - began)
    assert len(nodes.workers()) == 1 and 0 <= run.resumes()[-1] <= 10
    starts, began = len(run.resumes()), time.monotonic()
    two[1] = nodes.add(num_cpus=1)
    run.wait_for_resume(starts)
    row("nothing: a node was added", run.resumes()[starts:], time.monotonic() - began)
    assert len(nodes.workers()) == 2 and run.resumes()[-1] == 0, "it saved itself before it grew"
    run.wait_for_end(planned)
    assert "room for more than 1 worker(s): starting again with them" in run.said()


@pytest.mark.parametrize("run", [("--save_steps", "100000")], indirect=True)
def test_a_node_is_taken_away(nodes: Nodes, two: list[Node], run: Run, planned: list[float]) -> None:
    """A notice with a deadline: everything is saved before it, though no checkpoint was due, and goes on elsewhere.

    The machine goes as soon as that is done; a run as short as this one would have ended at the deadline.
    """
    run.wait_for_workers(2)
    starts, began, deadline_sec = len(run.resumes()), time.monotonic(), 15
    saved_before = len(list((run.folder / "checkpoints").glob("step-*")))
    nodes.drain(two[1], deadline_sec)
    run.wait_for(lambda: len(list((run.folder / "checkpoints").glob("step-*"))) > saved_before)
    saved = time.monotonic() - began
    assert saved < deadline_sec
    nodes.kill(two[1])
    run.wait_for_resume(starts)
    row(
        f"node with {deadline_sec} s of notice (saved after {saved:.0f} s)",
        run.resumes()[starts:],
        time.monotonic() - began,
    )
    assert "a machine is about to go: saved at step" in run.said()
    assert run.resumes()[-1] < 20, "of the steps since, not of all"
    run.wait_for_end(planned)


@pytest.mark.parametrize("run", [("--save_steps", "10")], indirect=True)
@pytest.mark.parametrize("who", ["driver", "TrainController"])
def test_the_driver_or_the_controller_dies(nodes: Nodes, run: Run, planned: list[float], who: str) -> None:
    """kill -9: the same command goes on, and a controller's driver needs not even that.

    Whatever Ray Train wrote about the run is damaged meanwhile, as a kill in the middle of writing does.
    """
    run.wait_for_workers(2)
    starts, began = len(run.resumes()), time.monotonic()
    if who == "driver":
        left = run.driver.processes() | nodes.workers()
        run.driver.kill()
        while alive(left):
            assert time.monotonic() < began + WAIT_SEC
            time.sleep(0.2)
        for path in (run.folder / "ray").rglob("*.json"):
            path.write_bytes(path.read_bytes()[:10])
        run.driver.end()
        run.start()
    else:
        [controller] = nodes.workers("TrainController")
        os.kill(controller, signal.SIGKILL)
    run.wait_for_resume(starts)
    row(who, run.resumes()[starts:], time.monotonic() - began)
    assert 0 <= run.resumes()[-1] <= 10
    run.wait_for_end(planned)


@pytest.fixture
def speech(tmp_path: Path) -> str:
    rows = [{**row, "id": f"row{at}"} for at, row in enumerate(read_rows(manifest("asr.train"))[:120])]
    return write_rows(tmp_path / "m.jsonl", rows)


@pytest.mark.parametrize("job", ["featurize", "evaluate"])
def test_a_node_dies_under_featurize_and_evaluate(
    nodes: Nodes, two: list[Node], speech: str, tmp_path: Path, job: str
) -> None:
    """kill -9 of a node while it works: the others go on by themselves, and every row is there once."""
    flags, files = {
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
        began = time.monotonic()
        while len(list(out.glob(files))) < 3:
            assert driver.process.poll() is None and time.monotonic() < began + WAIT_SEC, log.read_text()
            time.sleep(0.02)
        nodes.kill(two[1])
        began, before = time.monotonic(), len(list(out.glob(files)))
        while len(list(out.glob(files))) <= before + 2:
            assert driver.process.poll() is None and time.monotonic() < began + WAIT_SEC, log.read_text()
            time.sleep(0.02)
        print(f"\n| node under {job} | rows lost 0 | {time.monotonic() - began:.0f} s |")
        assert driver.process.wait(WAIT_SEC) == 0, log.read_text()
    finally:
        driver.end()
    assert not (out / "quarantine.jsonl").read_text(), "no row is blamed for the death of a node"
    if job == "evaluate":
        assert json.loads((out / "metrics.json").read_text())["asr"]["exact_match"]["n"] == 120
    else:
        [described] = out.glob("*/set.json")
        assert json.loads(described.read_text())["samples"] == 120
