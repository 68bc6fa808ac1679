"""Random rows out of feature shards: how long one takes, from the index to a copy of its features.

Writes sets of 8 s clips (800 frames of 128 bins; random numbers, as the content does not matter) as log-mel and as
samples, and reads rows in random order, the page cache warm, on one thread. ``view`` is the row alone, whose arrays
point into the mapped file; ``copy`` reads all of its bytes as well. The goal for log-mel is 150 us. Prints a table and
one JSON line.

    python benchmarks/shards.py
"""

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxray.core.storage import write_atomically, write_json
from voxray.features.reader import Features
from voxray.features.shards import index_part, shard_bytes, shard_path, write_index

ROWS_PER_SHARD = 64
CLIP_SEC = 8
KINDS: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {
    # what is stored, the shape of one piece, and pieces of a clip
    "mel": (torch.float16, (128,), CLIP_SEC * 100),
    "pcm16": (torch.int16, (), CLIP_SEC * 16_000),
}
GOAL_US = 150


def make_row(number: int, frames: int, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    random = np.random.default_rng(number)
    size = (frames, *shape)
    audio = random.integers(-9999, 9999, size, np.int16) if dtype == torch.int16 else random.random(size, np.float32)
    texts = {"id": str(number), "task": "asr", "language": "ko", "prompt": "", "audio_path": f"/clips/{number}.flac"}
    texts |= {
        "source": f"/m.jsonl:{number + 1}",
        "answer": "환자는 어제부터 열이 나고 기침을 하며 혈압은 120/80 이었습니다",
    }
    ids = {"prompt_ids": list(range(380)), "target_ids": list(range(40))}
    counts = {"variant": 0, "num_frames": frames, "fill": -0.8, "num_windows": 1, "num_samples": CLIP_SEC * 16_000}
    return {**texts, **ids, **counts, "audio": audio}


def write_set(folder: Path, store: str, num_rows: int) -> Path:
    """A finished feature set of random clips."""
    dtype, shape, frames = KINDS[store]
    num_shards = num_rows // ROWS_PER_SHARD
    for shard in range(num_shards):
        numbers = range(shard * ROWS_PER_SHARD, (shard + 1) * ROWS_PER_SHARD)
        rows = [make_row(number, frames, shape, dtype) for number in numbers]
        data, path = shard_bytes(rows, store, dtype, shape), shard_path(folder, shard)
        write_atomically(path, data)
        sums = {"rows": len(rows), "bytes": data.size, "sha256": hashlib.sha256(data).hexdigest()}
        write_json(path.with_suffix(".json"), {**sums, "index": index_part(rows, shard)})
    write_json(folder / "set.json", {"content": store, "store": store, **write_index(folder, num_shards)})
    return folder


def microseconds(features: Features, order: np.ndarray, *, copied: bool) -> float:
    """Median time of a row."""
    spent = []
    for number in order.tolist():
        began = time.perf_counter()
        audio = features.row(number).audio
        if copied:
            audio.copy()
        spent.append(time.perf_counter() - began)
    return float(np.median(spent)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    flags = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        print("store  MB/row  view us  copy us")
        for store, (dtype, shape, frames) in KINDS.items():
            features = Features([write_set(Path(name) / store, store, flags.rows)])
            order = np.random.default_rng(0).permutation(len(features))
            microseconds(features, order, copied=True)  # opens the shards and warms the page cache
            times = {key: microseconds(features, order, copied=key == "copy_us") for key in ("view_us", "copy_us")}
            size = frames * int(np.prod(shape)) * dtype.itemsize / 1e6
            found.append({"store": store, "mb": round(size, 3), **{key: round(us) for key, us in times.items()}})
            print(f"{store:5}  {size:6.3f}  {times['view_us']:7.0f}  {times['copy_us']:7.0f}", flush=True)
    print(json.dumps({"benchmark": "shards", "goal_us": GOAL_US, "rows": found}))


if __name__ == "__main__":
    main()
