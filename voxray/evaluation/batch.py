"""Evaluation at scale: Ray Data actors, each with a model, answer the rows and write prediction shards.

Rows are handed out in parts of similar length; a part becomes one Parquet file under ``predictions``. An evaluation
that was cut off and is started again answers only the parts that have no file yet.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from voxray.data.features import Features
from voxray.evaluation.generate import answers, length_batches
from voxray.evaluation.metrics.counts import COUNT_NAMES, as_row, count, metrics_of
from voxray.launch import gpus_within_reach
from voxray.models.family import family_of
from voxray.models.lora import WEIGHTS, load_adapter
from voxray.models.quantize import base_dtype
from voxray.storage import Place, write_atomically, write_json
from voxray.tasks import TASKS
from voxray.text.normalize import KO_V1

BATCHES_PER_PART = 4
KEPT_COLUMNS = ("id", "task", "language", "source", "prompt", "num_samples")
PREDICTION_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "task", "language", "source", "prompt", "reference", "prediction")),
        ("num_samples", pa.int64()),
        *((name, pa.int64()) for name in COUNT_NAMES),
    ],
    metadata={"normalizer": KO_V1},
)


@dataclass(frozen=True)
class Generation:
    """Everything that decides the answers, beside the rows.

    Attributes:
        model_id: Base model.
        adapter: Adapter folder, or "".
        bf16: Compute in bfloat16.
        tf32: Let float32 matrix products use TF32.
        batch_size: Rows generated together.
        max_new_tokens: Longest answer.
        fp16: Compute in float16.
        quantize: none, 8bit or 4bit.
        trim_audio: Whether prompts leave out the audio tokens of padding.
    """

    model_id: str
    adapter: str
    bf16: bool
    batch_size: int
    max_new_tokens: int
    tf32: bool = False
    fp16: bool = False
    quantize: str = "none"
    trim_audio: bool = False


class Answerer:
    """A loaded model that answers parts; the unit of work of a Ray Data actor."""

    def __init__(self, generation: Generation, folders: Sequence[Place], predictions: Path, num_threads: int) -> None:
        self.generation, self.predictions = generation, predictions
        self.features = Features(folders)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(num_threads)
        torch.backends.cuda.matmul.allow_tf32 = generation.tf32
        self.family = family_of(generation.model_id)
        self.front_end = self.family.front_end(generation.model_id, trim_audio=generation.trim_audio)
        dtype, quantize = base_dtype(bf16=generation.bf16, fp16=generation.fp16), generation.quantize
        self.model = self.family.load_model(generation.model_id, dtype=dtype, device=device, quantize=quantize)
        if self.features.store == "encoder":
            self.family.skip_encoder(self.model)
        if generation.adapter:
            self.model, _ = load_adapter(self.model, Path(generation.adapter))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's form of ``write_part``: a batch of one item."""
        item = json.loads(batch["item"][0])
        self.write_part(item["part"], item["rows"])
        return {"part": [item["part"]], "rows": [len(item["rows"])], "pid": [os.getpid()]}

    def write_part(self, part: int, rows: Sequence[int]) -> None:
        """Answer some rows and write their prediction shard."""
        found = []
        for start in range(0, len(rows), self.generation.batch_size):
            stored = [self.features.row(row) for row in rows[start : start + self.generation.batch_size]]
            texts = answers(
                self.model, self.family, self.front_end, stored, max_new_tokens=self.generation.max_new_tokens
            )
            for row, text in zip(stored, texts, strict=True):
                entry = {
                    name: getattr(row, name) for name in ("id", "task", "language", "source", "prompt", "num_samples")
                }
                found.append({**entry, "reference": row.answer, "prediction": text, **as_row(count(row.answer, text))})
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(found, schema=PREDICTION_SCHEMA), sink)
        write_atomically(part_path(self.predictions, part), sink.getvalue().to_pybytes())


def part_path(predictions: Path, part: int) -> Path:
    return predictions / f"part-{part:05d}.parquet"


def evaluate(
    generation: Generation,
    folders: Sequence[Place],
    rows: Sequence[int],
    output_dir: Path,
    *,
    num_models: int = 0,
    use_ray: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Answer rows, write ``predictions/`` and ``metrics.json``, and return the metrics.

    Args:
        folders: Feature sets.
        rows: Row numbers within them.
        num_models: Models at a time; 0 takes one per GPU, or one per two CPUs.
        use_ray: False answers in this process.
    Returns:
        {task: {metric: {"value", "n"}}}.
    """
    features, predictions = Features(folders), output_dir / "predictions"
    batches = list(length_batches(features, rows, generation.batch_size))
    groups = [batches[at : at + BATCHES_PER_PART] for at in range(0, len(batches), BATCHES_PER_PART)]
    parts = [list(chain.from_iterable(group)) for group in groups]
    _forget_other_evaluation(predictions, _key(generation, features, parts))
    waiting = [number for number in range(len(parts)) if not part_path(predictions, number).is_file()]
    done, total = sum(len(parts[number]) for number in range(len(parts)) if number not in set(waiting)), len(rows)
    run = _run_on_ray if use_ray else _run_here
    for num_rows in run(generation, folders, predictions, parts, waiting, num_models):
        done += num_rows
        on_progress(done, total)
    metrics = metrics_by_task(read_predictions(output_dir))
    write_json(output_dir / "metrics.json", metrics)
    return metrics


def read_predictions(output_dir: Path) -> list[dict[str, Any]]:
    """All prediction rows of an evaluation, ordered by manifest and line."""
    files = sorted((output_dir / "predictions").glob("part-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: (row["source"].rpartition(":")[0], int(row["source"].rpartition(":")[2])))


def metrics_by_task(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {metric: {"value", "n"}}} of prediction rows."""
    grouped = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    return {task: metrics_of(task, found) for task, found in grouped.items() if found}


def _key(generation: Generation, features: Features, parts: Sequence[Sequence[int]]) -> str:
    """Hash of all that decides what a part's file holds; the adapter counts by its bytes."""
    weights = Path(generation.adapter) / WEIGHTS if generation.adapter else None
    adapter = hashlib.sha256(weights.read_bytes()).hexdigest() if weights else ""
    described = {**asdict(generation), "adapter": adapter, "data": features.fingerprint(), "parts": parts}
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _forget_other_evaluation(predictions: Path, key: str) -> None:
    """Keep finished parts only if they belong to this very evaluation."""
    mark = predictions / "made_by.json"
    if not mark.is_file() or json.loads(mark.read_text()).get("key") != key:
        for path in predictions.glob("part-*.parquet"):
            path.unlink()
        write_json(mark, {"key": key, "normalizer": KO_V1})


def _run_here(
    generation: Generation,
    folders: Sequence[Place],
    predictions: Path,
    parts: Sequence[list[int]],
    waiting: Sequence[int],
    num_models: int,
) -> Iterator[int]:
    answerer = Answerer(generation, folders, predictions, os.cpu_count() or 1) if waiting else None
    for number in waiting:
        assert answerer is not None
        answerer.write_part(number, parts[number])
        yield len(parts[number])


def _run_on_ray(
    generation: Generation,
    folders: Sequence[Place],
    predictions: Path,
    parts: Sequence[list[int]],
    waiting: Sequence[int],
    num_models: int,
) -> Iterator[int]:
    if not waiting:
        return
    import ray

    num_gpus, num_cpus = gpus_within_reach(), int(ray.cluster_resources().get("CPU", 1)) or 1
    size = min(num_models or num_gpus or max(1, num_cpus // 2), len(waiting))
    num_threads = max(1, num_cpus // size)
    items = [{"item": json.dumps({"part": number, "rows": parts[number]})} for number in waiting]
    results = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map_batches(
        Answerer,
        fn_constructor_args=(generation, tuple(folders), predictions, num_threads),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        num_gpus=min(1.0, num_gpus / size) if num_gpus else None,
        num_cpus=None if num_gpus else min(1.0, num_cpus / size),
    )
    for row in results.iter_rows():
        yield row["rows"]
