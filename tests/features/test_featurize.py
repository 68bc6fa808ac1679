"""featurize in two stages: CPUs decode, and GPUs encode and write. Ray counts a GPU here that does not exist."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, manifest, read_rows, write_rows

from voxray.core.errors import RunError
from voxray.core.manifest import Sample, chunks
from voxray.features.chunk import MAX_CRASHES_PER_SHARD, WRITE_LOG, ChunkFeaturizer, WorkItem, crash_log_path
from voxray.features.extract import Extractor, FeatureSpec
from voxray.features.featurize import FeaturizeReport, featurize
from voxray.features.reader import Features
from voxray.features.shards import shard_path

SPEC = FeatureSpec(store="encoder")


@pytest.fixture(scope="module")
def ray_with_gpu() -> Iterator[None]:
    """A Ray with two CPUs and one GPU by name only, so that encoders compute on a CPU."""
    from voxray.cluster.session import RAY_SETTINGS

    os.environ.update(RAY_SETTINGS)
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "none")  # Ray counts names, and torch sees no GPU by that name
        ray.init(address="local", num_cpus=2, num_gpus=1, log_to_driver=False, include_dashboard=False)
        yield
        ray.shutdown()


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Speech and text in five chunks of four rows. One clip is missing, and one line is no row."""
    rows = read_rows(manifest("asr.train"))[:15] + read_rows(manifest("tqa.train"))[:4]
    rows[6] = {"audio_path": "gone.wav", "transcript": "x"}
    path = write_rows(tmp_path / "m.jsonl", rows)
    with open(path, "a") as file:
        file.write("[\n")
    return path


def make(path: str, folder: Path, extractor: Extractor, **options: Any) -> FeaturizeReport:
    return featurize([path], extractor, folder, rows_per_shard=4, **options)


def read_files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.ray
def test_two_stages_write_the_same_bytes(ray_with_gpu, one_thread, mixed: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    expected = make(mixed, one, Extractor(TINY, SPEC), use_ray=False)
    report = make(mixed, two, Extractor(TINY, SPEC))
    assert (expected.num_rows, expected.num_bad, expected.num_made, expected.num_processes) == (18, 2, 20, 1)
    assert (report.num_rows, report.num_bad, report.num_made) == (18, 2, 20)
    assert report.num_processes == 2, "one decodes and one encodes"
    assert read_files(two) == read_files(one) and "quarantine.jsonl" in "".join(read_files(two))
    [missing] = two.glob("*/shards/00002.arrow")
    missing.unlink()
    again = make(mixed, two, Extractor(TINY, SPEC))
    assert again.num_made == 4 + 4, "the chunk without its shard, and the one whose clip may be there now"
    assert read_files(two) == read_files(one)


@pytest.mark.ray
@pytest.mark.slow
def test_errors_of_either_stage_end_the_job_in_one_line(ray_with_gpu, mixed: str, tmp_path: Path, monkeypatch) -> None:
    from voxray.features import disk_estimate

    with pytest.raises(RunError, match=r"m.jsonl:7: .*gone.wav.* \(--strict\)$"):
        make(mixed, tmp_path / "strict", Extractor(TINY, SPEC), strict=True)
    monkeypatch.setattr(disk_estimate, "chunk_bytes", lambda item, extractor: 1)
    with pytest.raises(RunError, match=r"00000.arrow: .* bytes, but its clips seemed to need 4 at most$"):
        make(mixed, tmp_path / "small", Extractor(TINY, SPEC))
    assert not list(tmp_path.glob("small/*/shards/*"))


def test_a_shard_that_kills_its_writers_ends_the_job(mixed: str, tmp_path: Path) -> None:
    """No row is blamed, and the next run tries again."""
    chunk = next(chunks(mixed, 4))
    item, featurizer = WorkItem(chunk, tmp_path / "f"), ChunkFeaturizer(Extractor(TINY))
    log = crash_log_path(item, chunk.read_bytes()).with_suffix(".write")
    log.parent.mkdir(parents=True)
    log.write_text("\n 1" * MAX_CRASHES_PER_SHARD)
    with pytest.raises(RunError, match=r"00000.arrow: 3 processes died while .* 4 lines from .*m.jsonl:1; if memory"):
        featurizer.work(item)
    result = featurizer.work(item)
    assert (result["rows"], result["bad"]) == (4, []) and not log.exists()


class Poisoned(Extractor):
    """Ends its process at one row, as a crash in a decoder does; pickled by value for Ray's processes."""

    def _read(self, sample: Sample) -> Any:
        import os

        if sample.id == "poison":
            os._exit(9)
        return super()._read(sample)


class TooLarge(Extractor):
    """Ends its process in the encoder, as the kernel does if memory is short."""

    def encode(self, rows: Any) -> None:
        import os

        os._exit(9)


@pytest.mark.chaos
@pytest.mark.ray
def test_a_row_that_kills_decoders_is_skipped(ray_with_gpu, by_value, tmp_path: Path) -> None:
    rows = [{**row, "id": f"row{number}"} for number, row in enumerate(read_rows(manifest("asr.train"))[:12])]
    rows[4]["id"] = "poison"
    path = write_rows(tmp_path / "p.jsonl", rows)
    report = make(path, tmp_path / "f", Poisoned(TINY, SPEC))
    assert (report.num_rows, report.num_bad) == (11, 1)
    assert "process_died" in (report.folders[0] / "quarantine.jsonl").read_text()
    assert Features(report.folders).ids(range(11)) == [row["id"] for row in rows if row["id"] != "poison"]


def test_each_job_counts_its_own_deaths(mixed: str, tmp_path: Path) -> None:
    """Logs that an earlier job left behind do not end the next one."""
    [folder] = make(mixed, tmp_path / "f", Extractor(TINY, SPEC), use_ray=False).folders
    for chunk in chunks(mixed, 4):
        shard_path(folder, chunk.number).unlink()
        log = crash_log_path(WorkItem(chunk, folder), chunk.read_bytes()).with_suffix(WRITE_LOG)
        log.write_text(f" {chunk.first_line}\n" * MAX_CRASHES_PER_SHARD)
    report = make(mixed, tmp_path / "f", Extractor(TINY, SPEC), use_ray=False)
    assert (report.num_rows, report.num_bad) == (18, 2)


@pytest.mark.chaos
@pytest.mark.ray
def test_encoders_that_die_blame_no_row(ray_with_gpu, by_value, mixed: str, tmp_path: Path) -> None:
    """The job ends, because Ray would start encoders without end. The next run makes the features."""
    with pytest.raises(RunError, match=rf"{MAX_CRASHES_PER_SHARD} processes died while they wrote the features of 4"):
        make(mixed, tmp_path / "f", TooLarge(TINY, SPEC))
    report = make(mixed, tmp_path / "f", Extractor(TINY, SPEC))
    assert (report.num_rows, report.num_bad) == (18, 2)
