"""Feature shards: how features lie on disk, and how single rows are read back.

A feature set belongs to one manifest and one front end::

    <features_dir>/<manifest stem>-<key>/
      set.json           what made it
      index.arrow        one line per usable row: lengths, task, place
      shards/00000.arrow rows of one manifest chunk; uncompressed Arrow IPC, memory-mapped when read
      shards/00000.json  the chunk's hash, its clips, its bad rows: what decides whether the shard is still good

Compressed log-mel saves under 12 % and makes a random row 3 to 40 times slower, so shards are not compressed.
Features are float16, frames major, valid frames only; ``fill`` is the value of all frames after them.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from voxray.errors import RunError
from voxray.tasks import TASKS

ROWS_PER_BATCH = 16
OPEN_SHARDS = 256  # memory maps kept open at a time

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("language", pa.string()),
        ("source", pa.string()),
        ("audio_path", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("target_ids", pa.list_(pa.int32())),
        ("mel", pa.large_list(pa.float16())),
        ("num_frames", pa.int32()),
        ("fill", pa.float32()),
        ("num_windows", pa.int32()),
        ("num_samples", pa.int64()),
    ]
)
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("task", pa.int8()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("num_prompt_tokens", pa.int32()),
        ("num_target_tokens", pa.int32()),
        ("num_frames", pa.int32()),
        ("num_windows", pa.int32()),
        ("num_samples", pa.int64()),
    ]
)
TASK_CODES = {name: code for code, name in enumerate(TASKS)}


@dataclass(frozen=True)
class FeatureRow:
    """One row as it is stored; arrays are read-only views of the mapped file.

    Attributes:
        mel_KB: float16, (num_frames, num_mel_bins); no rows for text tasks.
        fill: Value of the padded frames.
    """

    id: str
    task: str
    language: str
    source: str
    prompt: str
    answer: str
    prompt_ids: np.ndarray
    target_ids: np.ndarray
    mel_KB: np.ndarray
    fill: float
    num_windows: int
    num_samples: int

    @classmethod
    def of(cls, row: dict[str, Any]) -> "FeatureRow":
        """A row that was just computed and never stored (see ``featurize.sample_features``)."""
        values = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        ids = {name: np.asarray(row[name], np.int32) for name in ("prompt_ids", "target_ids")}
        return cls(**{**values, **ids, "mel_KB": row["mel"].astype(np.float16)})


def set_folder(features_dir: Path, manifest: str, fingerprint: str) -> Path:
    """Folder of the feature set of one manifest under one front end."""
    key = hashlib.sha256(f"{manifest}\n{fingerprint}".encode()).hexdigest()[:12]
    return features_dir / f"{Path(manifest).stem}-{key}"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that a reader, or a later run, sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=1).encode())


def write_shard(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as one uncompressed Arrow file, under its final name only when complete."""
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names if name != "mel"}
    lengths = np.array([0, *(row["mel"].size for row in rows)], dtype=np.int64).cumsum()
    values = torch.empty(int(lengths[-1]), dtype=torch.float16)
    for row, start, end in zip(rows, lengths[:-1], lengths[1:], strict=True):
        # torch rounds as numpy does, at thirty times the speed, and straight into its place
        values[start:end] = torch.from_numpy(row["mel"].reshape(-1))
    mel = pa.LargeListArray.from_arrays(pa.array(lengths), pa.array(values.numpy()))
    arrays = [mel if name == "mel" else pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), max_chunksize=ROWS_PER_BATCH)
    write_atomically(path, sink.getvalue())


def shard_path(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}.arrow"


def write_index(folder: Path, num_shards: int) -> int:
    """Gather the lengths of all shards into the index, one shard in memory at a time; returns the number of rows."""
    partial, num_rows = folder / ".index.part", 0
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        for number in range(num_shards):
            with pa.memory_map(str(shard_path(folder, number))) as source:
                table = pa.ipc.open_file(source).read_all()
                if table.num_rows:
                    writer.write_table(_index_rows(table, number))
                    num_rows += table.num_rows
    os.replace(partial, folder / "index.arrow")
    return num_rows


def _index_rows(table: pa.Table, shard: int) -> pa.Table:
    columns = {
        "id": table["id"],
        "source": table["source"],
        "task": pa.array([TASK_CODES[name] for name in table["task"].to_pylist()], pa.int8()),
        "shard": pa.array([shard] * table.num_rows, pa.int32()),
        "row": pa.array(range(table.num_rows), pa.int32()),
        "num_prompt_tokens": _lengths(table["prompt_ids"]),
        "num_target_tokens": _lengths(table["target_ids"]),
        **{name: table[name] for name in ("num_frames", "num_windows", "num_samples")},
    }
    return pa.table([columns[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)


def _lengths(lists: pa.ChunkedArray) -> pa.Array:
    offsets = [np.diff(chunk.offsets.to_numpy()) for chunk in lists.chunks]
    return pa.array(np.concatenate(offsets), pa.int32())


class Features:
    """Rows of one or several feature sets, addressed by one running number in manifest order.

    Attributes:
        folders: The feature sets.
        task: Task code of every row, int8 (see ``TASK_CODES``).
        num_prompt_tokens: Tokens before the answer, audio positions included.
        num_target_tokens: Tokens of the answer, the end-of-text token included.
        num_windows: Model windows of the clip, 0 for text.
        num_samples: Samples of the clip at the model's rate.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(folders)
        tables, sets = [], []
        for number, folder in enumerate(self.folders):
            if not (folder / "index.arrow").is_file():
                raise RunError(f"{folder}: not a finished feature set; run featurize on its manifest")
            table = pa.ipc.open_file(pa.memory_map(str(folder / "index.arrow"))).read_all()
            tables.append(table)
            sets.append(np.full(table.num_rows, number, np.int32))
        self._index = pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()
        self._set = np.concatenate(sets) if sets else np.empty(0, np.int32)
        self._shard, self._row = self._numbers("shard"), self._numbers("row")
        self.task = self._numbers("task")
        self.num_prompt_tokens = self._numbers("num_prompt_tokens")
        self.num_target_tokens = self._numbers("num_target_tokens")
        self.num_windows = self._numbers("num_windows")
        self.num_samples = self._numbers("num_samples")
        self._open: OrderedDict[tuple[int, int], pa.RecordBatchFileReader] = OrderedDict()
        self._lock = threading.Lock()  # loader threads share the open shards

    def __len__(self) -> int:
        return len(self._row)

    def _numbers(self, name: str) -> np.ndarray:
        return self._index[name].combine_chunks().to_numpy(zero_copy_only=False)

    @property
    def num_tokens(self) -> np.ndarray:
        return self.num_prompt_tokens + self.num_target_tokens

    def ids(self, numbers: Iterable[int]) -> list[str]:
        return [self._index["id"][int(number)].as_py() for number in numbers]

    def source(self, number: int) -> str:
        """``<manifest>:<line>`` of a row."""
        return self._index["source"][int(number)].as_py()

    def row(self, number: int) -> FeatureRow:
        """Read one row from its mapped shard; no copy of the features is made."""
        place = int(self._row[number])
        batch = self._reader(int(self._set[number]), int(self._shard[number])).get_batch(place // ROWS_PER_BATCH)
        place %= ROWS_PER_BATCH
        values = {name: batch.column(name)[place].as_py() for name in ("id", "task", "language", "source")}
        values |= {name: batch.column(name)[place].as_py() for name in ("prompt", "answer", "fill")}
        values |= {name: batch.column(name)[place].as_py() for name in ("num_windows", "num_samples")}
        num_frames = batch.column("num_frames")[place].as_py()
        mel = batch.column("mel")[place].values.to_numpy()
        return FeatureRow(
            **values,
            prompt_ids=batch.column("prompt_ids")[place].values.to_numpy(),
            target_ids=batch.column("target_ids")[place].values.to_numpy(),
            mel_KB=mel.reshape(num_frames, -1) if num_frames else mel.reshape(0, 0),
        )

    def _reader(self, set_number: int, shard: int) -> pa.RecordBatchFileReader:
        key = (set_number, shard)
        with self._lock:
            if key not in self._open:
                self._open[key] = pa.ipc.open_file(pa.memory_map(str(shard_path(self.folders[set_number], shard))))
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(key)
            return self._open[key]

    def fingerprint(self) -> str:
        """Hash of what the sets were made of; a run that resumes must find the same."""
        parts = [json.loads((folder / "set.json").read_text())["content"] for folder in self.folders]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()
