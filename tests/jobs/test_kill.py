"""SIGKILL a worker, the driver or everything, at random steps, ten times in a row. The result is the same bit for bit.

Every driver runs in its own session, with a mark in its environment that identifies its processes.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY
from helpers.running import ROOT, Driver, alive

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
STEPS, SAVE_STEPS, KILLS = 60, 3, 10
GRACE_SEC = 30  # within this time, processes that a killed driver left behind have to end
WAIT_SEC = 300
KINDS = ("worker", "driver", "everything")


@pytest.fixture
def start(tmp_path: Path, small: dict[str, str]) -> Iterator[Callable[..., Driver]]:
    """Start the same training in a folder of this name; all of its processes are killed after the test."""
    drivers: list[Driver] = []

    def start_driver(name: str, num_workers: int, flags: str = "") -> Driver:
        line = f"--model_id {TINY} --output_dir {tmp_path / name} --features_dir {tmp_path / 'features'}"
        line += f" --num_workers {num_workers} --max_steps {STEPS} --save_steps {SAVE_STEPS} --seed 3"
        line += " --batching packed --pack_tokens 256 --grad_accum 2 --lora_dropout 0.05 --freq_masks 1 --time_masks 1"
        train = ",".join(small[f"{task}.train"] for task in ("asr", "sqa", "tqa"))
        command = [
            sys.executable,
            str(ROOT / "jobs/train_multitask.py"),
            *line.split(),
            *flags.split(),
            "--train_jsonl",
            train,
        ]
        drivers.append(Driver(command, tmp_path / f"{name}.log"))
        return drivers[-1]

    yield start_driver
    for driver in drivers:
        driver.end()


def wait(driver: Driver, log: Path) -> None:
    assert driver.process.wait(WAIT_SEC) == 0, log.read_text()


def adapter_hash(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def records(run: Path, kind: str) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def last_step(run: Path) -> int:
    return max((record["step"] for record in records(run, "train")), default=0)


def saved_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


def training_processes(driver: Driver) -> list[int]:
    """The processes of Ray Train's workers, by their title."""
    pids = []
    for pid in sorted(alive(driver.processes())):
        try:
            if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                pids.append(pid)
        except OSError:
            continue
    return pids


@pytest.mark.parametrize("num_workers", [2, 3])
def test_a_run_killed_ten_times_equals_the_uninterrupted_run(
    start: Callable[..., Driver], tmp_path: Path, num_workers: int
) -> None:
    whole, run, rng = tmp_path / "whole", tmp_path / "killed", random.Random(num_workers)
    wait(start("whole", num_workers), tmp_path / "whole.log")
    assert [record["step"] for record in records(whole, "train")] == list(range(1, STEPS + 1))
    driver, left_behind, saved_before = start("killed", num_workers), set[int](), 0
    for number in range(KILLS):
        kind, start_step = KINDS[number % len(KINDS)], saved_step(run)
        target, deadline = start_step + rng.randint(1, SAVE_STEPS + 2), time.monotonic() + WAIT_SEC
        resumed = len(records(run, "resume"))
        while last_step(run) < target or (number and len(records(run, "resume")) < min(resumed + 1, number)):
            assert driver.process.poll() is None, (tmp_path / "killed.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "killed.log").read_text()
            time.sleep(0.05)
        left_behind |= driver.processes()
        if kind == "worker":
            os.kill(rng.choice(training_processes(driver)), signal.SIGKILL)
            continue
        if kind == "driver":
            driver.process.kill()
            driver.process.wait()
        driver.kill()
        driver = start("killed", num_workers)
        assert saved_step(run) >= saved_before, "complete checkpoints survive"
        saved_before = saved_step(run)
    wait(driver, tmp_path / "killed.log")
    assert [record["step"] for record in records(run, "train")] == list(range(1, STEPS + 1)), "every step once"
    resumes = records(run, "resume")
    print([(record["step"], record["repeated_steps"]) for record in resumes])
    assert len(resumes) == KILLS and all(0 <= record["repeated_steps"] <= SAVE_STEPS for record in resumes)
    assert any(record["repeated_steps"] for record in resumes), "no kill cost a step, so the test shows nothing"
    assert adapter_hash(run) == adapter_hash(whole)
    deadline = time.monotonic() + GRACE_SEC
    while alive(left_behind):
        assert time.monotonic() < deadline, f"still running: {alive(left_behind)}"
        time.sleep(0.5)


def test_a_worker_that_stands_still(start: Callable[..., Driver], tmp_path: Path) -> None:
    """SIGSTOP. Ray notices after the time limit, and training starts again from the last checkpoint."""
    driver, deadline = start("stopped", 2, "--worker_timeout_sec 15"), time.monotonic() + WAIT_SEC
    while last_step(tmp_path / "stopped") < 4:
        assert driver.process.poll() is None, (tmp_path / "stopped.log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "stopped.log").read_text()
        time.sleep(0.05)
    stopped = training_processes(driver)[0]
    os.kill(stopped, signal.SIGSTOP)
    wait(driver, tmp_path / "stopped.log")
    log = (tmp_path / "stopped.log").read_text()
    assert "a worker failed (it did not respond for 15 s (--worker_timeout_sec)); starting again from step" in log
    assert "Traceback" not in log and not alive({stopped})
    assert [record["step"] for record in records(tmp_path / "stopped", "train")] == list(range(1, STEPS + 1))
