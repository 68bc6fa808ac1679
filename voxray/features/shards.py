"""Feature shards: the format of feature sets on disk.

A feature set belongs to one manifest, one front end and one kind of stored audio::

    <features_dir>/<manifest stem>-<key>/
      set.json           manifest, fingerprint and counts of the set
      index.arrow        one line per usable row: lengths, task, shard and row number
      shards.json        rows, bytes and checksums of every shard
      quarantine.jsonl   unusable rows
      shards/00000.arrow rows of one manifest chunk; uncompressed Arrow IPC, memory-mapped when read
      shards/00000.json  the chunk's hash, clips, bad rows and part of the index; decides whether the shard is still
                         valid

A set stores clips in one of three forms (see ``STORES``). Compression of log-mel saves under 12 % and makes reading a
random row 3 to 40 times slower, so shards are not compressed.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from voxray.core.storage import AnyPath, checksum, move_into_place, scratch_file, write_json
from voxray.core.tasks import TASK_CODES

LAYOUT = 2
"""Version of the columns of shards and index. Sets of another version are made again."""
ROWS_PER_BATCH = 16
STORES = ("mel", "pcm16", "encoder")
"""Forms in which a set can store clips:

mel      log-mel of the valid frames, float16, (frames, bins); ``fill`` is the value of all frames after them
pcm16    samples, int16, at the model's rate; features are computed when a row is loaded
encoder  outputs of the frozen encoder for whole windows, (windows, positions, hidden), float32, float16 or the bits
         of bfloat16
"""
AUDIO_COLUMN = "audio"
SCALARS = ("id", "task", "language", "source", "prompt", "answer", "fill", "num_windows", "num_samples")
"""Columns that are read with every row, beside the tokens and the audio."""

COLUMNS = [  # prompt_ids holds tokens with a label as -1 - id (models.front_end.with_labels)
    ("id", pa.string()),
    ("task", pa.string()),
    ("language", pa.string()),
    ("source", pa.string()),
    ("audio_path", pa.string()),
    ("prompt", pa.string()),
    ("answer", pa.string()),
    ("prompt_ids", pa.list_(pa.int32())),
    ("target_ids", pa.list_(pa.int32())),
    ("variant", pa.int32()),
    ("num_frames", pa.int32()),
    ("fill", pa.float32()),
    ("num_windows", pa.int32()),
    ("num_samples", pa.int64()),
    ("crc32", pa.uint32()),
]
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("language", pa.string()),
        ("task", pa.int8()),
        ("variant", pa.int32()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("num_prompt_tokens", pa.int32()),
        ("num_target_tokens", pa.int32()),
        ("num_prompt_labels", pa.int32()),
        ("num_frames", pa.int32()),
        ("num_windows", pa.int32()),
        ("num_samples", pa.int64()),
    ]
)
_ARROW_TYPES = {
    torch.float16: pa.float16(),
    torch.int16: pa.int16(),
    torch.float32: pa.float32(),
    torch.bfloat16: pa.uint16(),  # Arrow has no bfloat16, so its bits are stored
}


def shard_schema(store: str, dtype: torch.dtype, frame_shape: Sequence[int]) -> pa.Schema:
    """Columns of a shard.

    Args:
        store: One of ``STORES``.
        dtype: Data type of the stored audio.
        frame_shape: Shape of a clip's stored audio without its first axis: (bins,), () or (positions, hidden).
    """
    metadata = {"store": store, "dtype": str(dtype).removeprefix("torch."), "frame_shape": json.dumps(frame_shape)}
    fields = [*COLUMNS, (AUDIO_COLUMN, pa.large_list(_ARROW_TYPES[dtype]))]
    return pa.schema(fields, metadata=metadata)


def set_folder(features_dir: AnyPath, manifest: str, fingerprint: str) -> AnyPath:
    """Folder of a manifest's feature set. The fingerprint identifies front end and stored form."""
    key = hashlib.sha256(f"{manifest}\n{fingerprint}".encode()).hexdigest()[:12]
    return features_dir / f"{PurePosixPath(manifest).stem}-{key}"


def shard_path(folder: AnyPath, number: int) -> AnyPath:
    return folder / "shards" / f"{number:05d}.arrow"


def shard_bytes(
    rows: Sequence[dict[str, Any]], store: str, dtype: torch.dtype, frame_shape: Sequence[int]
) -> tuple[pa.Buffer, list[tuple[int, int]]]:
    """Serialize rows as one uncompressed Arrow file.

    Args:
        rows: Values by column name, without ``crc32``; ``audio`` is an array of any shape.
    Returns:
        The file, and (end, CRC-32) of its two parts. The first part is the record batches. It has no checksum (0),
        because every row has one. The second part is what follows them.
    """
    schema = shard_schema(store, dtype, frame_shape)
    lengths = np.array([0, *(row[AUDIO_COLUMN].size for row in rows)], dtype=np.int64).cumsum()
    values = torch.empty(int(lengths[-1]), dtype=dtype)
    for row, start, end in zip(rows, lengths[:-1], lengths[1:], strict=True):
        # torch rounds as numpy does, thirty times faster, and writes straight into the target
        values[start:end] = torch.from_numpy(row[AUDIO_COLUMN].reshape(-1))
    bits = values.view(torch.uint16) if dtype == torch.bfloat16 else values
    audio = pa.LargeListArray.from_arrays(pa.array(lengths), pa.array(bits.numpy()))
    sums = [
        row_checksum(row, bits[start:end].numpy())
        for row, start, end in zip(rows, lengths[:-1], lengths[1:], strict=True)
    ]
    columns = {name: [row[name] for row in rows] for name, _ in COLUMNS if name != "crc32"} | {"crc32": sums}
    arrays = [pa.array(columns[name], kind) for name, kind in COLUMNS]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        table = pa.Table.from_arrays([*arrays, audio], schema=schema)
        for batch in table.to_batches(max_chunksize=ROWS_PER_BATCH):
            writer.write_batch(batch)
        end = sink.tell()
    data = sink.getvalue()
    return data, [(end, 0), (data.size, zlib.crc32(data.slice(end)))]


def row_checksum(row: Mapping[str, Any], audio: np.ndarray) -> int:
    """CRC-32 of a row: of the values that a reader uses, and of its stored audio."""
    values = [row[name] for name in SCALARS if name != "fill"]
    crc = zlib.crc32(json.dumps([*values, float(np.float32(row["fill"]))], default=int).encode())
    for array in (np.asarray(row["prompt_ids"], np.int32), np.asarray(row["target_ids"], np.int32), audio):
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return crc


def index_part(rows: Sequence[dict[str, Any]], shard: int) -> dict[str, list[Any]]:
    """Columns of the index for one shard's rows."""
    return {
        "id": [row["id"] for row in rows],
        "source": [row["source"] for row in rows],
        "language": [row["language"] for row in rows],
        "task": [TASK_CODES[row["task"]] for row in rows],
        "shard": [shard] * len(rows),
        "row": list(range(len(rows))),
        "num_prompt_tokens": [len(row["prompt_ids"]) for row in rows],
        "num_target_tokens": [len(row["target_ids"]) for row in rows],
        "num_prompt_labels": [sum(token < 0 for token in row["prompt_ids"]) for row in rows],
        **{name: [row[name] for row in rows] for name in ("variant", "num_frames", "num_windows", "num_samples")},
    }


def index_batch(columns: Mapping[str, list[Any]]) -> pa.RecordBatch:
    """The index of one shard, by the columns of ``index_part``. Earlier versions had no labels in prompts."""
    missing = {"num_prompt_labels": [0] * len(columns["id"])}
    return pa.RecordBatch.from_pydict({**missing, **columns}, schema=INDEX_SCHEMA)


def write_index(folder: AnyPath, num_shards: int) -> dict[str, Any]:
    """Merge the shards' reports into ``index.arrow`` and ``shards.json``, with one report in memory at a time.

    Returns:
        {"rows", "index_bytes", "index_sha256"}.
    """
    shards: list[dict[str, Any]] = []
    with scratch_file(folder, "index") as partial:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
            for number in range(num_shards):
                report = json.loads(shard_path(folder, number).with_suffix(".json").read_text())
                shards.append({name: report[name] for name in ("rows", "bytes", "sha256", "parts") if name in report})
                if report["rows"]:
                    writer.write_batch(index_batch(report["index"]))
        index = {"index_bytes": partial.stat().st_size, "index_sha256": checksum(partial)}
        move_into_place(partial, folder / "index.arrow")
    write_json(folder / "shards.json", shards)
    return {"rows": sum(shard["rows"] for shard in shards), **index}


def are_parts(parts: Any) -> bool:
    """Whether a report's or list's ``parts`` are pairs of whole numbers, as ``shards.shard_bytes`` returns them."""
    return isinstance(parts, list) and all(
        isinstance(part, list) and [type(number) for number in part] == [int, int] for part in parts
    )
