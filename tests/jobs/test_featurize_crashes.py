"""Featurize after a kill: of all processes at a random moment, and of each process that reads a certain row."""

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
from voxray.features.chunk import MAX_CRASHES_PER_ROW, WorkItem, crash_log_path, start_sample
from voxray.features.crash_log import open_crash_log
from voxray.features.extract import Extractor
from voxray.features.featurize import featurize
from voxray.features.reader import Features

ROWS, ROWS_PER_SHARD, WAIT_SEC = 300, 2, 120


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = read_rows(manifest("asr.train"))[:ROWS]
    rows[17] = {"audio_path": "gone.wav", "transcript": "x"}
    return write_rows(tmp_path_factory.mktemp("m") / "m.jsonl", rows)


def read_files(folder: Path) -> dict[str, bytes]:
    """All files of a feature set, by relative path."""
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
def test_killed_and_restarted_every_row_is_stored_once(speech: str, tmp_path: Path, seed: int) -> None:
    """kill -9 of the driver's group while shards are being written; the second start makes the rest and only that."""
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
        while alive(left_behind):  # Ray's daemons notice that their driver is gone, and exit
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
    [folder] = [path.parent for path in job.folder.glob("*/set.json")]
    assert read_files(folder) == read_files(whole), "not one byte differs from the run that nobody killed"
    features = Features([folder])
    assert sorted(features.ids(range(len(features)))) == sorted(Features([whole]).ids(range(ROWS - 1)))
    same = [path for path, written in survivors.items() if path.stat().st_mtime_ns == written]
    assert len(same) >= len(survivors) - 1, "only unfinished shards, and the one with the missing clip, were made again"
    ledger = [json.loads(line) for line in (job.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in ledger] == [(18, "audio_missing")]


def test_rows_that_kill_their_process_are_skipped(tmp_path: Path) -> None:
    """Two of them in one chunk, each of which ends three processes; no other row is blamed."""
    path = write_rows(tmp_path / "m.jsonl", read_rows(manifest("asr.train"))[:8])
    [chunk] = chunks(path, 8)
    raw, crashes, skipped, killed = chunk.read_bytes(), 0, set(), []
    path = crash_log_path(WorkItem(chunk, tmp_path / "f"), raw)
    for _ in range(2 * MAX_CRASHES_PER_ROW + 1):
        context = open_crash_log(path, MAX_CRASHES_PER_ROW)
        killed.append(context)  # or it would be closed when it is collected
        crash_log, skipped = context.__enter__(), set()
        for number, sample in enumerate(read_chunk(chunk, raw).samples):
            try:
                start_sample(sample, crash_log)
            except BadRow as error:
                assert error.reason == "process_died" and sample.audio_path in error.message
                skipped.add(number)
                continue
            if number in (2, 5):
                crashes += 1
                break  # a killed process runs nothing after this, not even __exit__
        else:
            context.__exit__(None, None, None)
    assert skipped == {2, 5} and crashes == 2 * MAX_CRASHES_PER_ROW == 6
    assert not list((tmp_path / "f").rglob(".attempts*")), "the next run blames no row"


class Poisoned(Extractor):
    """Ends its process at one row, as a crash in a decoder does; pickled by value for Ray's processes."""

    def _read(self, sample: Sample) -> Any:
        import os

        if sample.id == "poison":
            os._exit(9)
        return super()._read(sample)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(200)
def test_ray_continues_after_a_row_that_kills_its_process(local_ray, by_value, tmp_path: Path) -> None:
    rows = [{**row, "id": f"row{number}"} for number, row in enumerate(read_rows(manifest("asr.train"))[:12])]
    rows[4]["id"] = "poison"
    path = write_rows(tmp_path / "m.jsonl", rows)
    report = featurize([path], Poisoned(TINY), tmp_path / "f", rows_per_shard=4, num_actors=2)
    assert (report.num_rows, report.num_bad) == (11, 1)
    assert "process_died" in (report.folders[0] / "quarantine.jsonl").read_text()
    assert Features(report.folders).ids(range(11)) == [row["id"] for row in rows if row["id"] != "poison"]
