"""Kill -9 at any moment, start the same command again: the end is the same to the bit.

Every driver runs in a session of its own and carries a mark in its environment, by which its processes are told from
everybody else's.
"""

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY
from running import ROOT, Driver, alive

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
STEPS = 12
GRACE_SEC = 30  # in which what a killed driver leaves behind has to end by itself
WAIT_SEC = 300


@pytest.fixture
def start(tmp_path: Path, small: dict[str, str]) -> Iterator[Callable[[str], Driver]]:
    """Start the same training in a folder of that name; all of its processes end with the test."""
    drivers: list[Driver] = []

    def begin(name: str) -> Driver:
        line = (
            f"--model_id {TINY} --output_dir {tmp_path / name} --features_dir {tmp_path / 'features'} --num_workers 2"
        )
        line += f" --max_steps {STEPS} --save_steps 2 --lora_dropout 0.1 --seed 3 --per_device_bsz 4 --grad_accum 4"
        train = ",".join(small[f"{task}.train"] for task in ("asr", "sqa", "tqa"))
        command = [sys.executable, str(ROOT / "jobs/train_multitask.py"), *line.split(), "--train_jsonl", train]
        drivers.append(Driver(command, tmp_path / f"{name}.log"))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.end()


def wait(driver: Driver, log: Path) -> None:
    assert driver.process.wait(WAIT_SEC) == 0, log.read_text()


def adapter_hash(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def steps_written(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if '"train"' in line]


def log_size(run: Path) -> int:
    path = run / "train.log"
    return path.stat().st_size if path.is_file() else 0


def test_killed_runs_end_as_the_uninterrupted_one(start: Callable[[str], Driver], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    began = time.monotonic()
    wait(start("whole"), tmp_path / "whole.log")
    usual_sec = time.monotonic() - began
    assert steps_written(whole) == list(range(1, STEPS + 1))
    cut_off = 0
    for seed in range(3):
        name, draw = f"killed{seed}", random.Random(seed)
        run, left_behind = tmp_path / name, set()
        # Once somewhere between start-up and the last step, once at a step: the second is sure to lose work.
        first = start(name)
        time.sleep(draw.uniform(0.3, 0.9) * usual_sec)
        left_behind |= first.processes()
        first.kill()
        said = log_size(run)
        second, target = start(name), draw.randrange(3, STEPS - 3)
        deadline = time.monotonic() + WAIT_SEC
        while second.process.poll() is None and max(steps_written(run), default=0) < target:
            assert time.monotonic() < deadline, (tmp_path / f"{name}.log").read_text()
            if log_size(run) == said:  # not during the steps: looking around takes longer than one of them
                left_behind |= second.processes()
            time.sleep(0.01)
        if second.process.poll() is None:
            second.kill()
        saved = max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)
        cut_off += 0 < saved < STEPS
        wait(start(name), tmp_path / f"{name}.log")
        assert steps_written(run) == list(range(1, STEPS + 1)), f"seed {seed}: every step once"
        assert adapter_hash(run) == adapter_hash(whole), f"seed {seed}"
        deadline = time.monotonic() + GRACE_SEC
        while alive(left_behind):
            assert time.monotonic() < deadline, f"seed {seed}: still running: {alive(left_behind)}"
            time.sleep(0.5)
    assert cut_off, "no run was killed between its first checkpoint and its last: the test has shown nothing"
