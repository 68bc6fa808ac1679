"""Evaluate after a kill: of all processes, of one actor, and of each process that answers a certain row."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, manifest, read_rows, write_rows
from helpers.running import ROOT, Driver, alive

from voxray.evaluation import distribute
from voxray.evaluation.distribute import ModelCount, answer_rows, read_failed
from voxray.evaluation.prediction_actor import PredictionActor
from voxray.evaluation.predictions import read_predictions
from voxray.features.reader import FeatureRow, Features
from voxray.generation.generate import Completion, SamplingParams
from voxray.generation.model import InferenceConfig

ROWS, WAIT_SEC = 120, 240


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = [{**row, "id": f"row{index}"} for index, row in enumerate(read_rows(manifest("asr.train"))[:ROWS])]
    return write_rows(tmp_path_factory.mktemp("m") / "m.jsonl", rows)


class EvaluateJob:
    """Starts of jobs/evaluate.py in one folder: 15 parts of 8 rows, two models."""

    def __init__(self, speech: str, folder: Path) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        flags = ["--model_id", TINY, "--val_jsonl", speech, "--output_dir", str(folder), "--num_models", "2"]
        more = ["--per_device_bsz", "1", "--gen_max_new_tokens", "32"]
        self.command = [sys.executable, str(ROOT / "jobs/evaluate.py"), *flags, *more]

    def start(self) -> Driver:
        return Driver(self.command, self.log)

    def parts(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.folder.glob("predictions/part-*.parquet")}

    def wait_for(self, driver: Driver, num_parts: int) -> None:
        deadline = time.monotonic() + WAIT_SEC
        while len(self.parts()) < num_parts:
            assert driver.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)

    def texts(self) -> dict[str, str]:
        rows = read_predictions(self.folder)
        assert [row["id"] for row in rows] == [f"row{index}" for index in range(ROWS)], (
            "every row exactly once, in order"
        )
        return {row["id"]: row["prediction"] for row in rows}


@pytest.fixture(scope="module")
def expected(speech: str, make_features: Callable[..., tuple[Path, ...]], tmp_path_factory: Any) -> dict[str, str]:
    """Answers of an uninterrupted evaluation, by row id."""
    folder = tmp_path_factory.mktemp("whole")
    answer_rows(
        InferenceConfig(TINY, "", SamplingParams(32), 1), make_features(speech), range(ROWS), folder, use_ray=False
    )
    return {row["id"]: row["prediction"] for row in read_predictions(folder)}


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("num_parts", "number"), [(1, signal.SIGKILL), (5, signal.SIGKILL), (3, signal.SIGTERM)])
def test_killed_and_restarted_every_row_is_answered_once(
    speech: str, expected: dict[str, str], tmp_path: Path, num_parts: int, number: signal.Signals
) -> None:
    """kill -9 of the driver's group, or SIGTERM; the second start answers the rest, and only that."""
    job = EvaluateJob(speech, tmp_path / "job")
    first = job.start()
    try:
        job.wait_for(first, num_parts)
        left_behind = first.processes()
        if number == signal.SIGTERM:
            first.process.terminate()
            assert first.process.wait(60) == 130
            assert job.log.read_text().splitlines()[-1].startswith("stopped; run the same command again to resume")
            assert not list(job.folder.glob("predictions/.attempts-*")), "no row is blamed for it"
        else:
            first.kill()
        deadline = time.monotonic() + WAIT_SEC
        while alive(left_behind):  # Ray's daemons notice that their driver is gone, and exit
            assert time.monotonic() < deadline, job.log.read_text()
            time.sleep(0.2)
    finally:
        first.end()
    survivors = job.parts()
    assert num_parts <= len(survivors) < 15, "it was killed while it worked"
    second = job.start()
    try:
        assert second.process.wait(WAIT_SEC) == 0, job.log.read_text()
    finally:
        second.end()
    assert {path: written for path, written in job.parts().items() if path in survivors} == survivors
    assert job.texts() == expected and not read_failed(job.folder)
    metrics = json.loads((job.folder / "metrics.json").read_text())
    assert metrics["asr"]["exact_match"]["n"] == ROWS


@pytest.mark.ray
@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_the_job_survives_the_death_of_a_model(speech: str, expected: dict[str, str], tmp_path: Path) -> None:
    """kill -9 of one actor while it answers: the job continues, and no row is skipped or answered twice."""
    job = EvaluateJob(speech, tmp_path / "job")
    driver = job.start()
    try:
        job.wait_for(driver, 2)
        titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in driver.processes()}
        actors = [pid for pid, title in titles.items() if b"PredictionActor" in title]
        assert actors, titles
        os.kill(actors[0], signal.SIGKILL)
        assert driver.process.wait(WAIT_SEC) == 0, job.log.read_text()
    finally:
        driver.end()
    assert job.texts() == expected and not read_failed(job.folder)


class Poisoned(PredictionActor):
    """Ends its process whenever a certain row is in the batch; pickled by value for Ray's processes."""

    def generate(self, rows: Sequence[FeatureRow], batch_size: int) -> Iterator[tuple[int, Completion]]:
        import os

        if any(row.id == "row5" for row in rows):
            os._exit(9)
        return super().generate(rows, batch_size)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_row_that_kills_its_process_is_skipped(
    local_ray: None,
    by_value: None,
    speech: str,
    expected: dict[str, str],
    make_features: Callable[..., tuple[Path, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distribute, "PredictionActor", Poisoned)
    folders, config = make_features(speech), InferenceConfig(TINY, "", SamplingParams(32), 1)
    answer_rows(config, folders, range(12), tmp_path, models=ModelCount("1:2"))
    texts = {row["id"]: row["prediction"] for row in read_predictions(tmp_path)}
    assert texts == {name: expected[name] for name in Features(folders).ids(range(12)) if name != "row5"}
    [(row, reason, message)] = read_failed(tmp_path)
    assert (row, reason) == (5, "process_died") and message == "2 processes died while they answered this row"
