"""Measure how long it takes to read a random row from feature shards.

Writes feature sets of 8 s clips (800 frames of 128 bins; random numbers, because the content does not matter) as
log-mel and as samples. Reads rows in random order on one thread with a warm page cache. ``view`` gets the row, whose
arrays point into the memory-mapped file; ``copy`` also copies its features. The goal for log-mel is 150 us. Prints a
table and one JSON line.

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
STORES: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {
    # dtype, shape of one frame, frames per clip
    "mel": (torch.float16, (128,), CLIP_SEC * 100),
    "pcm16": (torch.int16, (), CLIP_SEC * 16_000),
}
GOAL_US = 150


def make_row(number: int, frames: int, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """A row with random audio."""
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
    """Write a complete feature set of random clips; returns its folder."""
    dtype, shape, frames = STORES[store]
    num_shards = num_rows // ROWS_PER_SHARD
    for shard in range(num_shards):
        numbers = range(shard * ROWS_PER_SHARD, (shard + 1) * ROWS_PER_SHARD)
        rows = [make_row(number, frames, shape, dtype) for number in numbers]
        (data, parts), path = shard_bytes(rows, store, dtype, shape), shard_path(folder, shard)
        write_atomically(path, data)
        report = {"rows": len(rows), "bytes": data.size, "sha256": hashlib.sha256(data).hexdigest(), "parts": parts}
        write_json(path.with_suffix(".json"), {**report, "index": index_part(rows, shard)})
    write_json(
        folder / "set.json", {"content": store, "fingerprint": store, "store": store, **write_index(folder, num_shards)}
    )
    return folder


def median_us(features: Features, order: np.ndarray, *, copy: bool) -> float:
    """Median time to read a row, in microseconds."""
    seconds = []
    for number in order.tolist():
        start_sec = time.perf_counter()
        audio = features.row(number).audio
        if copy:
            audio.copy()
        seconds.append(time.perf_counter() - start_sec)
    return float(np.median(seconds)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="rows per feature set")
    flags = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as name:
        print("store  MB/row  view us  copy us")
        for store, (dtype, shape, frames) in STORES.items():
            features = Features([write_set(Path(name) / store, store, flags.rows)])
            order = np.random.default_rng(0).permutation(len(features))
            median_us(features, order, copy=True)  # opens the shards and warms the page cache
            times = {key: median_us(features, order, copy=key == "copy_us") for key in ("view_us", "copy_us")}
            size_mb = frames * int(np.prod(shape)) * dtype.itemsize / 1e6
            figures.append({"store": store, "mb": round(size_mb, 3), **{key: round(us) for key, us in times.items()}})
            print(f"{store:5}  {size_mb:6.3f}  {times['view_us']:7.0f}  {times['copy_us']:7.0f}", flush=True)
    print(json.dumps({"benchmark": "shards", "goal_us": GOAL_US, "rows": figures}))


if __name__ == "__main__":
    main()
