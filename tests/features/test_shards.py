"""Feature shards: what is written is what is read, without copies, from any thread, and all of it or nothing."""

import dataclasses
import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from voxray.core.errors import RunError
from voxray.core.storage import write_atomically, write_json
from voxray.features import reader as features_module
from voxray.features import shards
from voxray.features.reader import FeatureRow, Features
from voxray.features.shards import (
    ROWS_PER_BATCH,
    index_part,
    set_folder,
    shard_bytes,
    shard_path,
    shard_schema,
    write_index,
)

NUM_BINS = 8


def make_row(number: int, task: str = "asr") -> dict[str, Any]:
    random = np.random.default_rng(number)
    frames = 0 if task == "tqa" else 1 + number % 23
    return {
        "id": f"열 {number}",
        "task": task,
        "language": "ko" if number % 2 else "",
        "source": f"/m/a.jsonl:{number + 1}",
        "audio_path": "" if task == "tqa" else f"/clips/{number}.wav",
        "prompt": "" if task == "asr" else f"질문 {number}?",
        "answer": f"답 {number}",
        "prompt_ids": random.integers(0, 131_072, 1 + number % 5).tolist(),
        "target_ids": random.integers(0, 131_072, number % 7).tolist(),
        "audio": random.normal(size=(frames, NUM_BINS)).astype(np.float32),
        "variant": 0,
        "num_frames": frames,
        "fill": float(np.float32(-0.7 - number / 100)),
        "num_windows": int(frames > 0),
        "num_samples": frames * 160,
    }


def make_rows(start: int, count: int) -> list[dict[str, Any]]:
    return [make_row(number, ("asr", "sqa", "tqa")[number % 3]) for number in range(start, start + count)]


def write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    """A shard of log-mel and what its report says for the index."""
    data, parts = shard_bytes(rows, "mel", torch.float16, [NUM_BINS])
    write_atomically(path, data)
    index = index_part(rows, int(path.stem) if path.stem.isdigit() else 0)
    sums = {"rows": len(rows), "bytes": data.size, "sha256": hashlib.sha256(data).hexdigest(), "parts": parts}
    write_json(path.with_suffix(".json"), {**sums, "index": index})


def make_set(folder: Path, *parts: list[dict[str, Any]]) -> Path:
    for number, rows in enumerate(parts):
        write_shard(shard_path(folder, number), rows)
    index = write_index(folder, len(parts))
    assert index["rows"] == sum(map(len, parts))
    assert index["index_sha256"] == hashlib.sha256((folder / "index.arrow").read_bytes()).hexdigest()
    write_json(folder / "set.json", {"content": folder.name, "fingerprint": "f", "store": "mel", **index})
    return folder


def assert_same(stored: FeatureRow, row: dict[str, Any]) -> None:
    for name in ("id", "task", "language", "source", "prompt", "answer", "fill", "num_windows", "num_samples"):
        assert getattr(stored, name) == row[name], name
    assert stored.prompt_ids.tolist() == row["prompt_ids"] and stored.prompt_ids.dtype == np.int32
    assert stored.target_ids.tolist() == row["target_ids"] and stored.target_ids.dtype == np.int32
    assert stored.audio.dtype == np.float16 and len(stored.audio) == row["num_frames"]
    assert stored.audio.ndim == 2
    if row["num_frames"]:
        assert np.array_equal(stored.audio, row["audio"].astype(np.float16))


@pytest.mark.parametrize("sizes", [(1,), (16,), (17,), (40, 0, 5), (0, 33), (3, 16, 32, 1)])
def test_rows_come_back_as_they_were(tmp_path: Path, sizes: tuple[int, ...]):
    parts = [make_rows(100 * number, size) for number, size in enumerate(sizes)]
    rows = [row for part in parts for row in part]
    features = Features([make_set(tmp_path / "set", *parts)])
    assert len(features) == len(rows)
    for number in np.random.default_rng(0).permutation(len(rows)):
        assert_same(features.row(int(number)), rows[number])


def test_the_index_holds_the_lengths(tmp_path: Path):
    rows = make_rows(0, 20) + make_rows(50, 7)
    features = Features([make_set(tmp_path / "set", rows[:20], rows[20:])])
    assert features.task.tolist() == [("asr", "sqa", "tqa").index(row["task"]) for row in rows]
    assert features.num_prompt_tokens.tolist() == [len(row["prompt_ids"]) for row in rows]
    assert features.num_target_tokens.tolist() == [len(row["target_ids"]) for row in rows]
    assert features.num_tokens.tolist() == [len(row["prompt_ids"]) + len(row["target_ids"]) for row in rows]
    assert features.num_windows.tolist() == [row["num_windows"] for row in rows]
    assert features.num_samples.tolist() == [row["num_samples"] for row in rows]
    assert features.ids([26, 0, 21]) == [rows[26]["id"], rows[0]["id"], rows[21]["id"]]
    assert features.source(22) == rows[22]["source"]


def test_several_sets_are_numbered_through(tmp_path: Path):
    first, second = make_rows(0, 18), make_rows(500, 20)
    folders = [
        make_set(tmp_path / "a", first[:10], first[10:]),
        make_set(tmp_path / "empty", []),
        make_set(tmp_path / "b", second),
    ]
    features = Features(folders)
    for number, row in enumerate(first + second):
        assert_same(features.row(number), row)
    assert features.folders == tuple(folders)
    assert features.fingerprint() == Features(folders).fingerprint() != Features(folders[::-1]).fingerprint()
    assert len(Features([])) == 0


def test_rows_are_read_only_views_of_the_mapped_file(tmp_path: Path):
    features = Features([make_set(tmp_path / "set", make_rows(0, 40))])
    before = pa.total_allocated_bytes()
    stored = [features.row(number) for number in range(40)]
    assert pa.total_allocated_bytes() == before  # Arrow took no memory: the bytes are those of the file
    assert sum(row.audio.size for row in stored) > 1000
    for row in stored:
        for array in (row.audio, row.prompt_ids, row.target_ids):
            assert not array.flags.writeable and not array.flags.owndata
    again = features.row(1)
    assert np.shares_memory(again.audio, stored[1].audio) and np.shares_memory(again.prompt_ids, stored[1].prompt_ids)
    with pytest.raises(ValueError, match="read-only"):
        stored[1].audio[0, 0] = 0


def test_rows_outlive_the_features_that_gave_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = make_rows(0, 12)
    monkeypatch.setattr(features_module, "OPEN_SHARDS", 2)
    features = Features([make_set(tmp_path / "set", *([row] for row in rows))])
    stored_rows = [features.row(number) for number in range(12)]
    assert len(features._open) == 2
    del features
    for stored, row in zip(stored_rows, rows, strict=True):
        assert_same(stored, row)


def test_many_threads_read_the_right_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(features_module, "OPEN_SHARDS", 3)  # so that shards are closed and opened while others read
    rows = make_rows(0, 160)
    features = Features([make_set(tmp_path / "set", *(rows[start : start + 20] for start in range(0, 160, 20)))])
    numbers = np.random.default_rng(0).integers(0, 160, 3000).tolist()
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(features.row, numbers))
    for number, row in zip(numbers, stored, strict=True):
        assert_same(row, rows[number])


def test_a_row_that_was_never_stored_equals_the_stored_one(tmp_path: Path):
    rows = make_rows(0, 3)
    features = Features([make_set(tmp_path / "set", rows)])
    for number, row in enumerate(rows):
        computed, stored = FeatureRow.from_values(row), features.row(number)
        assert_same(computed, row)
        assert np.array_equal(computed.audio, stored.audio) or not row["num_frames"]


def test_shards_are_plain_arrow_files(tmp_path: Path):
    write_shard(tmp_path / "one.arrow", make_rows(0, 40))
    with pa.ipc.open_file(str(tmp_path / "one.arrow")) as reader:
        assert reader.schema == shard_schema("mel", torch.float16, [NUM_BINS])
        assert [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)] == [16, 16, 8]


def test_the_same_rows_make_the_same_bytes(tmp_path: Path):
    for name in ("a", "b"):
        write_shard(tmp_path / name, make_rows(0, 20))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
):
    write_atomically(tmp_path / "set" / "a.json", b"old")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        for path in (tmp_path / "set" / "a.json", tmp_path / "set" / "b.json"):
            with pytest.raises(type(error)):
                write_atomically(path, b"new")
        with pytest.raises(type(error)):
            write_shard(tmp_path / "set" / "c.arrow", make_rows(0, 2))
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["a.json"]
    assert (tmp_path / "set" / "a.json").read_bytes() == b"old"
    write_atomically(tmp_path / "set" / "a.json", b"new")
    assert (tmp_path / "set" / "a.json").read_bytes() == b"new"


def test_nobody_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, seen = tmp_path / "a.bin", []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: seen.append(path.exists()) or real(*names))
    write_atomically(path, b"x" * 100_000)
    assert seen == [False] and path.stat().st_size == 100_000


def test_an_unfinished_set_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="not a finished feature set"):
        Features([tmp_path])


def test_a_set_has_a_folder_of_its_own():
    folder = set_folder(Path("/f"), "/data/asr.jsonl", "print")
    assert folder.parent == Path("/f") and folder.name.startswith("asr-")
    others = {set_folder(Path("/f"), "/data/asr.jsonl", "other"), set_folder(Path("/f"), "/else/asr.jsonl", "print")}
    assert len({folder, *others}) == 3


def test_json_keeps_hangul(tmp_path: Path):
    write_json(tmp_path / "a.json", {"이름": "값"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "이름" in text and json.loads(text) == {"이름": "값"}


def read_all(folder: Path) -> list[dict[str, Any]]:
    features = Features([folder])
    rows = [dataclasses.asdict(features.row(number)) for number in range(len(features))]
    return [
        {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in row.items()}
        for row in rows
    ]


def test_no_changed_value_of_a_shard_is_returned(tmp_path: Path) -> None:
    """A flipped bit stops the read with the file's name, or lies where no reader looks (padding, other columns)."""
    folder = make_set(tmp_path / "set", make_rows(0, ROWS_PER_BATCH + 3))
    path = shard_path(folder, 0)
    intact, rows = path.read_bytes(), read_all(folder)
    generator, num_noticed = np.random.default_rng(0), 0
    for position in generator.choice(len(intact), 300, replace=False):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            assert read_all(folder) == rows
        except RunError as error:
            assert f"{path}: damaged" in str(error)
            num_noticed += 1
    assert num_noticed > 200
    path.write_bytes(intact)
    assert not path.with_suffix(".json").is_file(), "the next run makes the shard again"


def test_shards_of_earlier_versions_are_checked_by_record_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows have no checksum of their own, and shards.json has one for each record batch."""
    old_columns = [each for each in shards.COLUMNS if each[0] != "crc32"]
    monkeypatch.setattr(shards, "COLUMNS", old_columns)
    folder = make_set(tmp_path / "set", make_rows(0, ROWS_PER_BATCH + 3))
    path, shard_list = shard_path(folder, 0), folder / "shards.json"
    data, [entry] = path.read_bytes(), json.loads(shard_list.read_text())
    with pa.ipc.open_file(path) as reader:
        assert "crc32" not in reader.schema.names
    half, end, size = entry["parts"][0][0] // 2, *(end for end, _ in entry["parts"])
    pairs = [[half, zlib.crc32(data[:half])], [end, zlib.crc32(data[half:end])], [size, zlib.crc32(data[end:])]]
    write_json(shard_list, [{**entry, "parts": pairs}])
    assert len(read_all(folder)) == ROWS_PER_BATCH + 3
    path.write_bytes(data[: half - 1] + bytes([data[half - 1] ^ 1]) + data[half:])
    with pytest.raises(RunError, match=f"{path}: damaged"):
        read_all(folder)


@pytest.mark.parametrize("name", ["set.json", "index.arrow", "shards.json"])
def test_a_damaged_description_is_one_line(tmp_path: Path, name: str) -> None:
    folder = make_set(tmp_path / "set", make_rows(0, 3))
    data = (folder / name).read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"[1]", b"\xff" * len(data)):
        (folder / name).write_bytes(damaged)
        with pytest.raises(RunError, match=f"{folder / name}"):
            Features([folder]).row(0)
