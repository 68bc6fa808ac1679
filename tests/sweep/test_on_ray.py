"""Sweeps on a real Ray: stopped and failed trials, processes that end, a killed driver."""

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY
from helpers.running import ROOT, Driver, alive, parse_only

from voxray.cluster.session import LOCAL, RAY_SETTINGS
from voxray.commands.tune import run_sweep
from voxray.sweep.trials import Trial, read_trials

WAIT_SEC = 900


def flags(small: dict[str, str], folder: Path, line: str) -> list[str]:
    usual = f"--model_id {TINY} --train_jsonl {small['tqa.train']} --val_jsonl {small['tqa.val']} --output_dir {folder}"
    usual += " --recipe text --num_workers 1 --eval_max_new_tokens 4 --metric tqa/loss --per_device_bsz 2"
    return [*usual.split(), *line.split()]


def numbers(trial: Trial, kind: str) -> list[int]:
    lines = (trial.folder / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def ray_of_sweeps() -> Iterator[None]:
    """A Ray that was started as a sweep starts it.

    If Tune kills a trial, Ray Train asks the dashboard whether its controller is alive, and then frees its CPUs.
    """
    os.environ.update(RAY_SETTINGS)
    import ray

    ray.shutdown()
    ray.init(num_cpus=4, **LOCAL)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_trials_are_trained_stopped_and_repeated(
    ray_of_sweeps: None, small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One trial learns, one diverges and fails, one learns nothing and is stopped; then two more seeds of the best."""
    import ray

    line = "--max_steps 8 --eval_steps 2 --grace_steps 2 --max_concurrent_trials 1 --lora_r 4 --top_k 1 --seeds 2"
    space = ["--space", "{lr: [3e-3, 1e30, 1e-9]}", "--max_bad_steps", "1"]
    outcome = run_sweep(parse_only("tune", [*flags(small, tmp_path / "sweep", line), *space]))
    trials = read_trials(tmp_path / "sweep")
    assert [trial.state for trial in trials] == ["done", "failed", "stopped", "done", "done"]
    assert outcome.winner and outcome.winner.number == 1 and len(outcome.repeated[0].values) == 2
    assert "the loss or its gradients were not finite" in trials[1].reason, trials[1].reason
    assert numbers(trials[0], "validation") == [2, 4, 6, 8] and numbers(trials[2], "validation")[-1] < 8
    losses = [trial.value("tqa/loss") for trial in trials]
    assert losses[0] and losses[2] and losses[0] < losses[2]
    assert len({losses[0], losses[3], losses[4]}) == 3, "other seeds, other numbers"
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "a trial that was stopped holds its CPUs"
        time.sleep(0.5)
    output = capsys.readouterr().out
    assert (
        "trial 3: tqa/loss" in output
        and "stopped at step" in output
        and "sweep: 3 trials, 1 stopped, 1 failed" in output
    )
    best = parse_only("train_text", ["--config", str(tmp_path / "sweep" / "best.yaml")])
    assert (best.lr, best.lora_r, best.max_steps) == (3e-3, 4, 8)
    assert "tqa/loss" in (tmp_path / "sweep" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_optuna_and_the_median_with_two_trials_at_a_time(
    ray_of_sweeps: None, small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks and a range of rates: each trial equals a run with its values, and two run at the same time."""
    pytest.importorskip("optuna")
    line = "--max_steps 6 --eval_steps 2 --grace_steps 2 --max_concurrent_trials 2 --search optuna --num_trials 5"
    space = ["--scheduler", "median", "--space", "{lr: {log: [1e-9, 1e-2]}, lora_r: [2, 4], max_len: [64, 128]}"]
    outcome = run_sweep(parse_only("tune", [*flags(small, tmp_path / "sweep", line), *space]))
    trials = read_trials(tmp_path / "sweep")
    assert len(trials) == 5 and {trial.state for trial in trials} <= {"done", "stopped"}
    assert [trial.state for trial in trials].count("done") >= 2, capsys.readouterr().out
    spans = []
    for trial in trials:
        assert set(trial.choice) == {"lr", "lora_r", "max_len"}
        if trial.state == "done":
            assert numbers(trial, "train") == [1, 2, 3, 4, 5, 6]
            assert json.loads((trial.folder / "adapter/adapter_config.json").read_text())["r"] == trial.choice["lora_r"]
        spans.append([(trial.folder / name).stat().st_mtime for name in ("parameters.json", "metrics.jsonl")])
    assert any(a[0] < b[1] and b[0] < a[1] for n, a in enumerate(spans) for b in spans[:n]), "never two at a time"
    values = [trial.value("tqa/loss") for trial in trials if trial.state == "done"]
    assert outcome.winner and outcome.winner.value("tqa/loss") == min(value for value in values if value is not None)


@pytest.fixture
def start(tmp_path: Path, small: dict[str, str]) -> Iterator[Callable[..., Driver]]:
    """Start the same sweep in a named folder; all of its processes end with the test."""
    drivers: list[Driver] = []

    def start_sweep(name: str, line: str) -> Driver:
        line += " --max_steps 60 --save_steps 2 --eval_steps 20 --scheduler none --lora_dropout 0.1 --seed 3"
        line += f" --features_dir {tmp_path / 'features'}"
        argv = flags(small, tmp_path / name, line)
        drivers.append(Driver([sys.executable, str(ROOT / "jobs/tune.py"), *argv], tmp_path / f"{name}.log"))
        return drivers[-1]

    yield start_sweep
    for driver in drivers:
        driver.end()


def adapter(folder: Path, number: int) -> str:
    path = folder / "trials" / f"{number:04d}" / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(trial: Path) -> int:
    return max((int(path.name[5:]) for path in (trial / "checkpoints").glob("step-*")), default=0)


def wait_for_step(driver: Driver, trial: Path, log: Path) -> None:
    """Wait until a trial has started and is far from its end."""
    deadline = time.monotonic() + WAIT_SEC
    while not 4 <= saved(trial) <= 50:
        assert driver.process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def wait_for_end(pids: set[int], kind: str = "") -> None:
    """Wait for processes to end by themselves: all, or those with ``kind`` in their command line."""
    deadline = time.monotonic() + 120
    while running := {pid for pid in alive(pids) if kind in command(pid)}:
        assert time.monotonic() < deadline, f"still there: {sorted(map(command, running))}"
        time.sleep(0.5)


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_sweep_whose_driver_ends_is_finished_by_resume(start: Callable[..., Driver], tmp_path: Path) -> None:
    """Killed in trial 2, interrupted in trial 3: no step is trained twice, and trial 2 equals an uninterrupted run."""
    killed, log, line = tmp_path / "killed", tmp_path / "killed.log", "--lora_r 2,4,8 --max_concurrent_trials 1"
    first, second, third = (killed / "trials" / f"{number:04d}" for number in (1, 2, 3))
    driver = start("killed", line)
    wait_for_step(driver, second, log)
    left_behind = driver.processes()
    driver.process.kill()
    driver.process.wait()
    wait_for_end(left_behind, "RayTrainWorker")
    driver.kill()  # the rest of its Ray, which the killed driver cannot stop
    before, saved_step = {path: path.read_bytes() for path in first.glob("*.json*")}, saved(second)
    assert not (second / "result.json").exists() and len(before) > 3
    for path in (killed / "ray").rglob("*"):  # Ray Tune's own state is not needed to resume
        if path.is_file():
            path.write_bytes(b"damaged")

    driver = start("killed", f"{line} --resume")
    wait_for_step(driver, third, log)
    left_behind = driver.processes()
    os.kill(driver.process.pid, signal.SIGINT)
    assert driver.process.wait(120) == 130, log.read_text()
    assert "stopped; run the same command with --resume to continue" in log.read_text()
    wait_for_end(left_behind)

    assert start("killed", f"{line} --resume").process.wait(WAIT_SEC) == 0, log.read_text()
    trials = read_trials(killed)
    assert [trial.state for trial in trials] == ["done"] * 3, log.read_text()
    assert "going on: 1 trial(s) are over" in log.read_text() and log.read_text().count("trial 1: tqa/loss") == 1
    assert {path: path.read_bytes() for path in before} == before, "a finished trial is not touched"
    assert numbers(trials[1], "resume")[0] >= saved_step >= 4, "it went on, not from 0"
    assert numbers(trials[2], "resume")[0] >= 4
    for trial in trials:
        assert numbers(trial, "train") == list(range(1, 61)), "every step once"
    assert start("whole", "--lora_r 4").process.wait(WAIT_SEC) == 0, (tmp_path / "whole.log").read_text()
    assert adapter(killed, 2) == adapter(tmp_path / "whole", 1), "to the last bit what it is without the kill"
