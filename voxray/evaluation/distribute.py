"""Evaluation at scale: Ray Data actors, each with a model, answer the rows and write prediction shards.

Rows are handed out in parts of similar length; a part becomes one Parquet file under ``predictions``. An evaluation
that was cut off and is started again answers only the parts that have no file yet.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from voxray.cluster.session import max_gpus
from voxray.config.flag_groups import as_range
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import AnyPath, write_json
from voxray.evaluation.prediction_actor import PredictionActor, failed_path
from voxray.evaluation.predictions import PREDICTION_SCHEMA, part_path, read_predictions
from voxray.features.reader import Features
from voxray.generation.generate import by_expected_length
from voxray.generation.model import InferenceConfig
from voxray.models.adapters.lora import WEIGHTS
from voxray.runs.remote_sync import RemoteSync

BATCHES_PER_PART = 8
"""A part's last rows wait for each other, so it should be long; what a killed run repeats is its parts in flight."""
MADE_BY = "made_by.json"
"""Says to which evaluation the parts beside it belong."""
RowProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ModelCount:
    """How many models answer at a time.

    Attributes:
        number: ``2``, or ``1:4`` for a pool that grows while there is work; 0 takes one per GPU (or as many as share
            it), or one per two CPUs.
        gpus_each: GPUs that each takes, such as 0.5; 0 shares out what there is, one at most.
    """

    number: int | str = 0
    gpus_each: float = 0.0


@dataclass(frozen=True)
class ActorPool:
    """What Ray is asked for.

    Attributes:
        fewest, most: Actors.
        gpus_each, cpus_each: Of each; None leaves it to Ray.
        num_threads: Of each on a CPU.
    """

    fewest: int
    most: int
    gpus_each: float | None
    cpus_each: float | None
    num_threads: int


def plan_pool(models: ModelCount, num_gpus: int, num_cpus: int, num_parts: int) -> ActorPool:
    """Share out a cluster's GPUs and CPUs.

    Raises:
        SettingsError: The GPUs that the settings ask for are more than the cluster can have.
    """
    usual = int(num_gpus / (models.gpus_each or 1)) if num_gpus else num_cpus // 2
    low, high = as_range(models.number or max(1, usual))
    most = min(high, num_parts)
    fewest = min(low, most)
    threads = max(1, num_cpus // most)
    if num_gpus and fewest * models.gpus_each > num_gpus:
        asked = f"--num_models {fewest} with --gpus_per_model {models.gpus_each:g}"
        raise SettingsError(f"{asked}: the cluster has {num_gpus} GPU(s), those it may still start counted")
    if num_gpus:
        return ActorPool(fewest, most, models.gpus_each or min(1.0, num_gpus / most), None, threads)
    return ActorPool(fewest, most, None, min(1.0, num_cpus / most), threads)


def answer_rows(
    generation: InferenceConfig,
    folders: Sequence[AnyPath],
    rows: Sequence[int],
    output_dir: Path,
    *,
    models: ModelCount | None = None,
    use_ray: bool = True,
    retry_failed: bool = False,
    mirror: RemoteSync | None = None,
    on_progress: RowProgress = lambda done, total: None,
) -> None:
    """Answer rows and write them to ``predictions`` in the output folder; parts that are there already stay.

    Args:
        folders: Feature sets.
        rows: Row numbers within them.
        retry_failed: Answer parts in which a row failed once more.
        mirror: Where each part is uploaded to when it is done.
        use_ray: False answers in this process.
    Raises:
        RunError: No row at all can be answered.
    """
    features, predictions = Features(folders), output_dir / "predictions"
    order, size = by_expected_length(features, rows), BATCHES_PER_PART * generation.batch_size
    parts = [order[at : at + size] for at in range(0, len(order), size)]
    _forget_other_evaluation(predictions, _key(generation, features, parts))
    for number in range(len(parts)) if retry_failed else ():
        if failed_path(predictions, number).is_file():
            part_path(predictions, number).unlink(missing_ok=True)
            failed_path(predictions, number).unlink()
    if mirror:
        mirror.forget("predictions/")
        mirror.push_files([predictions / MADE_BY])  # the parts count for nothing without it
    waiting = [number for number in range(len(parts)) if not part_path(predictions, number).is_file()]
    done, total = sum(map(len, parts)) - sum(len(parts[number]) for number in waiting), len(rows)
    for num_rows in (_run_on_ray if use_ray else _run_here)(
        generation, folders, predictions, parts, waiting, models or ModelCount(), mirror
    ):
        done += num_rows
        on_progress(done, total)
    failed = read_failed(output_dir)
    if len(failed) == total:
        raise RunError(f"not one row could be answered; {features.source(failed[0][0])}: {failed[0][2]}")


def read_failed(output_dir: Path) -> list[tuple[int, str, str]]:
    """(row number, reason, message) of the rows that an evaluation could not answer."""
    files = sorted((output_dir / "predictions").glob("part-*.failed.json"))
    return [tuple(entry) for file in files for entry in json.loads(file.read_text())]


def forget_attempts(output_dir: Path) -> None:
    """Hold it against no row that its process was ended from outside; for when all of them are gone."""
    for mark in (output_dir / "predictions").glob(".attempts-*"):
        mark.unlink(missing_ok=True)


def check_invariance(
    generation: InferenceConfig,
    folders: Sequence[AnyPath],
    rows: Sequence[int],
    output_dir: Path,
    num_rows: int,
    *,
    models: ModelCount | None = None,
    use_ray: bool = True,
) -> dict[str, Any]:
    """Answer some rows once more, each by itself, and compare with what they were told in their batches.

    Args:
        num_rows: Rows to take, spread evenly over all of them.
    Returns:
        {"n", "differing", "ids" of those that differ}.
    """
    places = np.unique(np.linspace(0, len(rows) - 1, min(num_rows, len(rows))).round().astype(int))
    alone = output_dir / "one_by_one"
    answer_rows(
        replace(generation, batch_size=1, perplexity="none"),
        folders,
        [rows[place] for place in places],
        alone,
        models=models,
        use_ray=use_ray,
    )
    together = {row["source"]: row["prediction"] for row in read_predictions(output_dir)}
    found = [row for row in read_predictions(alone) if row["source"] in together]
    differing = [row["id"] for row in found if together[row["source"]] != row["prediction"]]
    return {"n": len(found), "differing": len(differing), "ids": differing}


def _key(generation: InferenceConfig, features: Features, parts: Sequence[Sequence[int]]) -> str:
    """Hash of all that decides what a part's file holds; the adapter counts by its bytes."""
    weights = Path(generation.adapter) / WEIGHTS if generation.adapter else None
    adapter = hashlib.sha256(weights.read_bytes()).hexdigest() if weights else ""
    described = {**asdict(generation), "adapter": adapter, "data": features.fingerprint(), "parts": parts}
    return hashlib.sha256(json.dumps({**described, "format": PREDICTION_SCHEMA.names}).encode()).hexdigest()


def _forget_other_evaluation(predictions: Path, key: str) -> None:
    """Keep finished parts, and what is remembered of deaths, only if they belong to this very evaluation."""
    mark = predictions / MADE_BY
    if mark.is_file() and json.loads(mark.read_text()).get("key") == key:
        return
    if any(predictions.glob("part-*.parquet")):
        earlier = predictions.with_name("predictions-earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        predictions.rename(earlier)
        console.print(
            f"{predictions.parent} holds answers to other rows or settings; these are in {earlier.name} now",
            markup=False,
        )
    for path in (*predictions.glob("part-*"), *predictions.glob(".attempts-*")):
        path.unlink()
    for name in ("metrics.json", "report.html", "errors.json", "submission.csv", "valid.csv"):
        (predictions.parent / name).unlink(missing_ok=True)
    write_json(mark, {"key": key})


def _run_here(
    generation: InferenceConfig,
    folders: Sequence[AnyPath],
    predictions: Path,
    parts: Sequence[list[int]],
    waiting: Sequence[int],
    models: ModelCount,
    mirror: RemoteSync | None,
) -> Iterator[int]:
    answerer = PredictionActor(generation, folders, predictions, os.cpu_count() or 1, mirror) if waiting else None
    for number in waiting:
        assert answerer is not None
        answerer.write_part(number, parts[number])
        yield len(parts[number])


def _run_on_ray(
    generation: InferenceConfig,
    folders: Sequence[AnyPath],
    predictions: Path,
    parts: Sequence[list[int]],
    waiting: Sequence[int],
    models: ModelCount,
    mirror: RemoteSync | None,
) -> Iterator[int]:
    if not waiting:
        return
    import ray

    pool = plan_pool(models, max_gpus(), int(ray.cluster_resources().get("CPU", 1)) or 1, len(waiting))
    items = [{"item": json.dumps({"part": number, "rows": parts[number]})} for number in waiting]
    results = ray.data.from_items(items, override_num_blocks=min(len(items), 1000)).map_batches(
        PredictionActor,
        fn_constructor_args=(generation, tuple(folders), predictions, pool.num_threads, mirror),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=pool.fewest, max_size=pool.most, max_tasks_in_flight_per_actor=2),
        num_gpus=pool.gpus_each,
        num_cpus=pool.cpus_each,
    )
    for row in results.iter_rows():
        if row["error"]:
            raise RunError(row["error"])
        yield row["rows"]
