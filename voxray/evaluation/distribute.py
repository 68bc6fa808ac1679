"""Distributed evaluation: Ray Data actors, each with a model, answer rows and write prediction shards.

Rows are sorted by expected length and split into parts; each part becomes one Parquet file in ``predictions``. A
restarted evaluation answers only the parts that have no file yet.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from voxray.cluster.actor_pool import ActorPool, fit_memory, present_cpus, run_workers
from voxray.cluster.session import max_gpus, maximum_hint
from voxray.config.flag_groups import as_range
from voxray.core.console import console
from voxray.core.content_hash import combined_hash, path_hash
from voxray.core.errors import RunError, SettingsError, library_errors
from voxray.core.storage import AnyPath, write_json
from voxray.evaluation.prediction_actor import PredictionActor, failed_path
from voxray.evaluation.predictions import (
    PREDICTION_SCHEMA,
    part_path,
    read_part,
    read_predictions,
    set_aside_predictions,
)
from voxray.features.reader import Features
from voxray.generation.generate import sort_by_expected_length
from voxray.generation.model import InferenceConfig, model_bytes
from voxray.models.registry import get_family
from voxray.runs.remote_sync import RemoteSync
from voxray.text.normalize import BASIC, ENGLISH, KOREAN

BATCHES_PER_PART = 8
"""Longer parts waste less time on the last rows of each part; shorter parts lose less work when a run is killed."""
MADE_BY = "made_by.json"
"""File that identifies the evaluation to which the parts beside it belong."""
NOT_IN_KEY = ("engine_python", "max_len", "server")
"""Fields of ``InferenceConfig`` that do not decide the answers; of a server the address does."""
RowProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class ModelCount:
    """Number of models that answer at the same time.

    Attributes:
        number: ``2``, or ``1:4`` for a pool that grows while there is work; 0 loads as many as fit the GPUs, or one
            per two CPUs on a cluster without GPUs.
        gpus_each: GPUs per model, such as 0.5; 0 divides the GPUs evenly, with at most one per model.
    """

    number: int | str = 0
    gpus_each: float = 0.0


def plan_model_pool(models: ModelCount, num_gpus: int, num_cpus: int, num_parts: int) -> tuple[ActorPool, int]:
    """Divide a cluster's GPUs and CPUs among the models.

    Returns:
        Pool of actors with one model each, and the number of threads of each actor on a CPU.
    Raises:
        SettingsError: The settings require more GPUs than the cluster can have.
    """
    default = int(num_gpus / (models.gpus_each or 1)) if num_gpus else num_cpus // 2
    low, high = as_range(models.number or max(1, default))
    max_size = min(high, num_parts)
    min_size = min(low, max_size)
    if num_gpus and min_size * models.gpus_each > num_gpus:
        flags = f"--num_models {min_size} with --gpus_per_model {models.gpus_each:g}"
        number = f"{num_gpus} GPU(s), including those it can still start"
        raise SettingsError(f"{flags}: the cluster has {number}{maximum_hint()}")
    if num_gpus:
        pool = ActorPool(min_size, max_size, models.gpus_each or min(1.0, num_gpus / max_size), None)
    else:
        pool = ActorPool(min_size, max_size, None, min(1.0, num_cpus / max_size))
    return pool, max(1, num_cpus // max_size)


def answer_rows(
    config: InferenceConfig,
    folders: Sequence[AnyPath],
    rows: Sequence[int],
    output_dir: Path,
    *,
    models: ModelCount | None = None,
    use_ray: bool = True,
    retry_failed: bool = False,
    remote: RemoteSync | None = None,
    on_progress: RowProgress = lambda done, total: None,
) -> None:
    """Answer rows and write the answers to ``predictions`` in the output folder; finished parts are kept.

    Args:
        folders: Feature sets.
        rows: Row numbers within them.
        use_ray: False answers in this process.
        retry_failed: Answer parts again that contain failed rows.
        remote: Uploads each finished part.
        on_progress: Called with (rows done, rows in total).
    Raises:
        RunError: Not a single row can be answered.
    """
    features, predictions = Features(folders), output_dir / "predictions"
    order, size = sort_by_expected_length(features, rows), BATCHES_PER_PART * config.batch_size
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    _set_aside_other_evaluation(predictions, answer_key(config, features, parts))
    for number in range(len(parts)):
        if _is_damaged(predictions, number) or (retry_failed and failed_path(predictions, number).is_file()):
            part_path(predictions, number).unlink(missing_ok=True)
            failed_path(predictions, number).unlink(missing_ok=True)
    if remote:
        remote.forget("predictions/")
        remote.push_files([predictions / MADE_BY])  # without it the parts are not recognised
    items = [
        {"part": number, "rows": part}
        for number, part in enumerate(parts)
        if not part_path(predictions, number).is_file()
    ]
    done, total = len(rows) - sum(len(item["rows"]) for item in items), len(rows)
    on_progress(done, total)
    pool, num_threads = None, os.cpu_count() or 1
    if use_ray and items:
        models, num_gpus = models or ModelCount(), 0 if config.server else max_gpus()
        if config.server:  # one process sends as many requests at a time as --per_device_bsz says
            models = replace(models, number=models.number or 1)
        pool, num_threads = plan_model_pool(models, num_gpus, present_cpus(), len(items))
        if not pool.num_gpus:
            pool = fit_memory(pool, *model_bytes(config, pool.max_size))
            num_threads = max(num_threads, present_cpus() // pool.max_size)
    num_models = pool.max_size if pool else 1
    arguments = (config, tuple(folders), predictions, num_threads, remote, num_models)
    for result in run_workers(PredictionActor, arguments, items, pool):
        done += result["rows"]
        on_progress(done, total)
    failed = read_failed(output_dir)
    if len(failed) == total:
        raise RunError(f"not one row could be answered; {features.source(failed[0][0])}: {failed[0][2]}")


def _is_damaged(predictions: Path, number: int) -> bool:
    """Whether the files of a finished part cannot be read, so that it has to be answered again."""
    try:
        if part_path(predictions, number).is_file():
            read_part(part_path(predictions, number))
        if failed_path(predictions, number).is_file():
            _read_failed_rows(failed_path(predictions, number))
    except RunError as error:
        console.print(f"{error}; answered again", markup=False)
        return True
    return False


def read_failed(output_dir: Path) -> list[tuple[int, str, str]]:
    """(row number, reason, message) of the rows that an evaluation could not answer."""
    files = sorted((output_dir / "predictions").glob("part-*.failed.json"))
    return [row for file in files for row in _read_failed_rows(file)]


def _read_failed_rows(file: Path) -> list[tuple[int, str, str]]:
    with library_errors(f"{file}: damaged"):
        rows = [(int(number), str(reason), str(message)) for number, reason, message in json.loads(file.read_bytes())]
    return rows


def delete_crash_logs(output_dir: Path) -> None:
    """Delete the crash logs of processes that were stopped from outside, so that no row is blamed for it.

    Call it only after all actors have ended.
    """
    for path in (output_dir / "predictions").glob(".attempts-*"):
        path.unlink(missing_ok=True)


def check_invariance(
    config: InferenceConfig,
    folders: Sequence[AnyPath],
    rows: Sequence[int],
    output_dir: Path,
    num_rows: int,
    *,
    models: ModelCount | None = None,
    use_ray: bool = True,
) -> dict[str, Any]:
    """Answer some rows again with a batch size of 1 and compare with their answers from the batches.

    Args:
        num_rows: Number of rows to check, spread evenly over all rows.
    Returns:
        {"n", "differing", "ids" of the rows that differ}.
    """
    indices = np.unique(np.linspace(0, len(rows) - 1, min(num_rows, len(rows))).round().astype(int))
    alone_dir = output_dir / "one_by_one"
    alone_config = replace(config, batch_size=1, perplexity="none")
    answer_rows(alone_config, folders, [rows[index] for index in indices], alone_dir, models=models, use_ray=use_ray)
    batched = {row["source"]: row["prediction"] for row in read_predictions(output_dir)}
    alone = [row for row in read_predictions(alone_dir) if row["source"] in batched]
    differing = [row["id"] for row in alone if batched[row["source"]] != row["prediction"]]
    return {"n": len(alone), "differing": len(differing), "ids": differing}


def answer_key(config: InferenceConfig, features: Features, parts: Sequence[Sequence[int]]) -> str:
    """Hash of everything that decides the content of the parts. Answers with another key are not used again.

    Of base, adapter and compiled programs the content counts, not the path.

    Raises:
        RunError: A file of the base, the adapter or the compiled programs cannot be read.
    """
    values: dict[str, Any] = {**asdict(config), "model_id": get_family(config.model_id).content_hash(config.model_id)}
    for name in NOT_IN_KEY:
        del values[name]
    if config.server:
        values["server"] = config.server.url
    if config.engine == "transformers":  # keys of earlier versions had no engine
        del values["engine"]
    for name in ("adapter", "compiled"):
        values[name] = path_hash(Path(getattr(config, name))) if getattr(config, name) else ""
    stored_counts = [PREDICTION_SCHEMA.names, sorted(normalizer.name for normalizer in (KOREAN, BASIC, ENGLISH))]
    return combined_hash([values, features.fingerprint(), parts, stored_counts])


def _set_aside_other_evaluation(predictions: Path, key: str) -> None:
    """Keep finished parts and crash logs only if they belong to this very evaluation; else move the parts aside."""
    made_by = predictions / MADE_BY
    with suppress(OSError, ValueError, AttributeError):
        if json.loads(made_by.read_bytes()).get("key") == key:
            return
    set_aside_predictions(predictions)
    write_json(made_by, {"key": key})
