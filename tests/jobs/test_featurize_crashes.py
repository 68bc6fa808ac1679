"""Featurize after a death: of everything at a random moment, and of a process at a row that kills it."""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, manifest, read_rows, write_rows
from helpers.running import ROOT, Driver, alive

from voxray.core.errors import BadRow
from voxray.core.manifest import Sample, chunks, read_chunk
from voxray.features.chunk import MAX_ATTEMPTS, WorkItem, attempts
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize
from voxray.features.reader import Features

ROWS, ROWS_PER_SHARD, WAIT_SEC = 300, 2, 120


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = read_rows(manifest("asr.train"))[:ROWS]
    rows[17] = {"audio_path": "gone.wav", "transcript": "x"}
    return write_rows(tmp_path_factory.mktemp("m") / "m.jsonl", rows)


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything of a feature set but when its clips were looked at."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class FeaturizeJob:
    """Starts of jobs/featurize.py in one folder."""

    def __init__(self, speech: str, folder: Path) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        flags = ["--model_id", TINY, "--manifest", speech, "--output_dir", str(folder), "--num_actors", "2"]
        self.command = [
            sys.executable,
            str(ROOT / "jobs/featurize.py"),
            *flags,
            "--rows_per_shard",
            str(ROWS_PER_SHARD),
        ]

    def start(self) -> Driver:
        return Driver(self.command, self.log)

    def num_shards(self) -> int:
        return len(list(self.folder.glob("*/shards/*.arrow")))


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("seed", range(4))
def test_killed_and_started_again_every_row_is_there_once(speech: str, tmp_path: Path, seed: int) -> None:
    """kill -9 of the driver's group while shards are being written; the second start does the rest and only that."""
    [whole] = featurize([speech], Extractor(TINY), tmp_path / "whole", rows_per_shard=2, use_ray=False).folders
    assert isinstance(whole, Path)
    job, target = FeaturizeJob(speech, tmp_path / "job"), random.Random(seed).randrange(5, ROWS // ROWS_PER_SHARD // 2)
    first = job.start()
    try:
        deadline = time.monotonic() + WAIT_SEC
        while job.num_shards() < target:
            assert first.process.poll() is None and time.monotonic() < deadline, job.log.read_text()
            time.sleep(0.002)
        left_behind = first.processes()
        first.kill()
        while alive(left_behind):  # Ray's daemons see that their driver is gone, and end
            assert time.monotonic() < deadline, job.log.read_text()
            time.sleep(0.2)
    finally:
        first.end()
    survivors = {path: path.stat().st_mtime_ns for path in job.folder.glob("*/shards/*.json")}
    assert 0 < len(survivors) < ROWS // ROWS_PER_SHARD, "it was killed while it worked"
    second = job.start()
    try:
        assert second.process.wait(WAIT_SEC) == 0, job.log.read_text()
    finally:
        second.end()
    [made] = [path.parent for path in job.folder.glob("*/set.json")]
    assert files_of(made) == files_of(whole), "not one byte differs from the run that nobody killed"
    numbers = Features([made])
    assert sorted(numbers.ids(range(len(numbers)))) == sorted(Features([whole]).ids(range(ROWS - 1)))
    kept = [path for path, written in survivors.items() if path.stat().st_mtime_ns == written]
    assert len(kept) >= len(survivors) - 1, "only unfinished shards, and the one with the missing clip, were made again"
    ledger = [json.loads(line) for line in (job.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in ledger] == [(18, "audio_missing")]


def test_rows_that_kill_their_process_are_given_up(tmp_path: Path) -> None:
    """Two of them in one chunk, each of which ends three processes; the others are never blamed."""
    path = write_rows(tmp_path / "m.jsonl", read_rows(manifest("asr.train"))[:8])
    [chunk] = chunks(path, 8)
    raw, deaths, given_up, gone = chunk.read_bytes(), 0, set(), []
    for _ in range(2 * MAX_ATTEMPTS + 1):
        working = attempts(WorkItem(chunk, tmp_path / "f"), raw)
        gone.append(working)  # or it would be closed when it is collected
        attempt, given_up = working.__enter__(), set()
        for number, sample in enumerate(read_chunk(chunk, raw).samples):
            try:
                attempt(sample)
            except BadRow as error:
                assert error.reason == "process_died" and sample.audio_path in error.message
                given_up.add(number)
                continue
            if number in (2, 5):
                deaths += 1
                break  # nothing after this happens in a process that is gone, not even __exit__
        else:
            working.__exit__(None, None, None)
    assert given_up == {2, 5} and deaths == 2 * MAX_ATTEMPTS == 6
    assert not list((tmp_path / "f").rglob(".attempts*")), "and nothing is held against them in the next run"


class Poisoned(Extractor):
    """Ends its process at one row, as a crash in a decoder does; travels to Ray's processes by value."""

    def _read(self, sample: Sample) -> Any:
        import os

        if sample.id == "poison":
            os._exit(9)
        return super()._read(sample)


@pytest.mark.ray
@pytest.mark.timeout(200)
def test_ray_goes_on_after_a_row_that_kills_its_process(local_ray, by_value, tmp_path: Path) -> None:
    rows = [{**row, "id": f"row{number}"} for number, row in enumerate(read_rows(manifest("asr.train"))[:12])]
    rows[4]["id"] = "poison"
    path = write_rows(tmp_path / "m.jsonl", rows)
    report = featurize([path], Poisoned(TINY), tmp_path / "f", rows_per_shard=4, num_actors=2)
    assert (report.num_rows, report.num_bad) == (11, 1)
    assert "process_died" in (report.folders[0] / "quarantine.jsonl").read_text()
    assert Features(report.folders).ids(range(11)) == [row["id"] for row in rows if row["id"] != "poison"]
