"""Measure what a training on 100,000 hours costs besides the model: memory, time to the first batch, time per batch.

Writes a feature set of ``--rows`` rows of 10 s. Its shards are links to one file with real log-mel, so that the disk
holds little and every shard is a file of its own for the reader. Each measurement is a process that starts a training
of one worker as a job does, with a tiny model, and reads batches instead of training on them:

    start    time from the start of the process to the first batch, planning included, and the largest memory
    resume   the same at ``--step``
    batches  time of a batch at the start, at ``--step``, and at the start of a set of 100 hours: medians of 200
             batches each, which take turns

``private`` is memory that is mapped from no file; the index and the shards are mapped. The check of the manifest, which
featurize makes before, is measured apart: reading its lines. Prints a table and one JSON line.

    python benchmarks/scale.py --folder runs/scale
    python benchmarks/scale.py --folder runs/scale --rows 360000 --step 10000
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

START = time.perf_counter()

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from helpers.private_memory import Peak  # noqa: E402

from voxray.batches.loader import Loader  # noqa: E402
from voxray.batches.rank import Worker  # noqa: E402
from voxray.config.train import AsrAdapterSettings  # noqa: E402
from voxray.core.manifest import chunks, read_chunk  # noqa: E402
from voxray.core.storage import checksum, write_json  # noqa: E402
from voxray.core.units import GIB  # noqa: E402
from voxray.features.extract import Extractor, FeatureSpec  # noqa: E402
from voxray.features.shards import INDEX_SCHEMA, index_part, shard_bytes, shard_path  # noqa: E402

ROWS_PER_SHARD = 1024
CLIP_SEC = 10
NUM_BATCHES = 200
SMALL_ROWS = 36_000


def write_set(folder: Path, num_rows: int) -> None:
    """Write a feature set whose shards have the same content: rows of one clip, with answers of different lengths."""
    import soundfile
    import torch

    random = np.random.default_rng(0)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    folder.mkdir(parents=True)
    soundfile.write(folder / "clip.wav", random.normal(0, 0.1, CLIP_SEC * 16_000), 16_000)
    manifest = folder / "clip.jsonl"
    manifest.write_text(json.dumps({"audio_path": "clip.wav", "transcript": "clip", "language": "ko"}) + "\n")
    [chunk] = chunks(str(manifest), 1)
    [sample] = read_chunk(chunk, chunk.read_bytes()).samples
    [row], _ = Extractor(str(folder.with_name("base")), FeatureSpec("mel")).sample_rows(sample)
    lengths = np.clip(random.lognormal(3.4, 0.5, ROWS_PER_SHARD), 3, 200).astype(int).tolist()
    rows = [{**row, "target_ids": [30] * length} for length in lengths]
    (folder / "shards").mkdir()
    (data, parts), columns = shard_bytes(rows, "mel", torch.float16, (128,)), index_part(rows, 0)
    path = folder / "content.arrow"
    path.write_bytes(data)
    num_shards = num_rows // ROWS_PER_SHARD
    constant = {name: pa.array(columns[name], INDEX_SCHEMA.field(name).type) for name in columns}
    with pa.OSFile(str(folder / "index.arrow"), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        for shard in range(num_shards):
            (folder / "shards" / shard_path(folder, shard).name).symlink_to(path)
            numbers = range(shard * ROWS_PER_SHARD, (shard + 1) * ROWS_PER_SHARD)
            own = {
                "id": pa.array([f"utterance-{number:09}" for number in numbers]),
                "source": pa.array([f"/data/manifest.jsonl:{number + 1}" for number in numbers]),
                "shard": pa.array(np.full(ROWS_PER_SHARD, shard, np.int32)),
            }
            values = [{**constant, **own}[name] for name in INDEX_SCHEMA.names]
            writer.write_batch(pa.RecordBatch.from_arrays(values, schema=INDEX_SCHEMA))
    index = {"index_sha256": checksum(folder / "index.arrow"), "index_bytes": (folder / "index.arrow").stat().st_size}
    write_json(
        folder / "shards.json",
        [{"rows": ROWS_PER_SHARD, "bytes": data.size, "sha256": "", "parts": parts}] * num_shards,
    )
    (folder / "quarantine.jsonl").touch()
    write_json(folder / "set.json", {"content": "simulated", "fingerprint": "simulated", "store": "mel", **index})


def write_manifest(path: Path, num_rows: int) -> None:
    """Write a manifest of rows without their clips."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            clip, text = (
                f"clips/{number // 1000:05}/{number:09}.flac",
                "환자는 어제부터 열이 나고 기침을 하며 혈압은 정상입니다",
            )
            file.write(f'{{"id": "utterance-{number:09}", "audio_path": "{clip}", "transcript": "{text}"}}\n')
    unfinished.rename(path)


def private_bytes() -> int:
    """Memory that is mapped from no file, read in less time than from smaps_rollup, which looks at every page."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def with_loader(folder: Path, batching: str, watch: Callable[[Loader], Any]) -> Any:
    """Start a training as a worker does, and call a function in the place of the loop; returns its result."""
    from voxray.recipes import run_stage
    from voxray.recipes.run_context import RunContext
    from voxray.recipes.training_data import TrainingData

    results = []

    def fit(state: Any, loader: Loader, *others: Any) -> Any:
        results.append(watch(loader))
        raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as name:
        values = {"train_jsonl": "unused", "model_id": str(folder.with_name("base")), "num_workers": 0}
        values |= {"batching": batching, "per_device_bsz": 8, "grad_accum": 1, "report_to": "none", "output_dir": name}
        settings = AsrAdapterSettings.model_validate({**values, "loader_workers": 0})
        run = RunContext.create(settings, run_dir=Path(name), worker=Worker())
        with mock.patch.object(run_stage, "fit", fit), suppress(KeyboardInterrupt):
            run_stage.train(run, TrainingData((folder,), ()))
    return results[0]


def start(folder: Path, batching: str, step: int) -> dict[str, float]:
    """Seconds to the first batch, and the largest private memory."""

    def first_batch(loader: Loader) -> float:
        next(loader.steps(step, step + 1))
        return time.perf_counter() - START

    with Peak(private_bytes) as peak:
        seconds = with_loader(folder, batching, first_batch)
    return {"sec": seconds, "private": peak.num_bytes / GIB}


def batch_times(folder: Path, batching: str, step: int) -> dict[str, float]:
    """Median milliseconds of a batch at three places."""

    def timed(steps: Iterator[Any]) -> Iterator[float]:
        while True:
            began = time.perf_counter()
            if next(steps, None) is None:
                return
            yield 1000 * (time.perf_counter() - began)

    def compare(loader: Loader) -> dict[str, float]:
        def compare_with_small(small: Loader) -> dict[str, float]:
            places = {
                "first": timed(loader.steps(1, 10**9)),
                "later": timed(loader.steps(step, 10**9)),
                "small": timed(small.steps(1, 10**9)),
            }
            times: dict[str, list[float]] = {name: [] for name in places}
            for _ in range(NUM_BATCHES):
                for name, values in places.items():
                    times[name] += islice(values, 1)
            return {name: float(np.median(values)) for name, values in times.items()}

        return with_loader(folder.with_name("small"), batching, compare_with_small)

    return with_loader(folder, batching, compare)


def measure(flags: argparse.Namespace, name: str, batching: str, step: int) -> dict[str, float]:
    """Run a measurement in a process of its own."""
    options = ["--folder", str(flags.folder), "--step", str(step), "--batching", batching, "--measure", name]
    return json.loads(subprocess.check_output([sys.executable, __file__, *options], text=True).splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=36_000_000)
    parser.add_argument("--step", type=int, default=1_000_000)
    parser.add_argument("--batching", default="fixed,length,packed", help="kinds, separated by commas")
    parser.add_argument("--measure", help="for the processes that this script starts")
    flags = parser.parse_args()
    large = flags.folder.resolve() / "large"
    if flags.measure == "batches":
        print(json.dumps(batch_times(large, flags.batching, flags.step)))
        return
    if flags.measure:
        print(json.dumps(start(large, flags.batching, flags.step)))
        return
    if not large.with_name("base").is_dir():
        from train import write_model

        write_model(large.with_name("base"), 4096)
    for folder, num_rows in ((large, flags.rows), (large.with_name("small"), SMALL_ROWS)):
        if not (folder / "set.json").is_file():
            write_set(folder, num_rows)
    manifest = flags.folder / "manifest.jsonl"
    if not manifest.is_file():
        write_manifest(manifest, flags.rows)
    began = time.perf_counter()
    num_chunks = sum(1 for _ in chunks(str(manifest), ROWS_PER_SHARD))
    figures: dict[str, Any] = {"manifest_sec": time.perf_counter() - began}
    print(f"{flags.rows:,} rows: {num_chunks:,} chunks of the manifest in {figures['manifest_sec']:.1f} s")
    print("batching  to the first batch: s, GiB private   at the step: s, GiB   ms per batch: first, later, 100 hours")
    for batching in flags.batching.split(","):
        first, later = (measure(flags, "start", batching, step) for step in (0, flags.step))
        times = measure(flags, "batches", batching, flags.step)
        figures[batching] = {"start": first, "resume": later, "batches": times}
        print(
            f"{batching:8} {first['sec']:20.1f} {first['private']:12.2f} {later['sec']:18.1f} {later['private']:6.2f}",
            end="",
        )
        print("   " + ", ".join(f"{value:.2f}" for value in times.values()), flush=True)
    print(json.dumps({"benchmark": "scale", "rows": flags.rows, "step": flags.step, **figures}))


if __name__ == "__main__":
    main()
