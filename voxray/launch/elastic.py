"""Training on Ray Train: start the processes, restart them after a crash, use more of them when the cluster grows."""

import json
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from voxray.cluster.placement import (
    ScaleUpWatcher,
    is_evicted,
    release_placement_group,
    wait_for_workers,
    worker_resource,
)
from voxray.config.flag_groups import as_range
from voxray.config.train import TrainSettings
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError, Stopped
from voxray.launch.worker import _worker_main
from voxray.recipes.training_data import TrainingData
from voxray.runs.layout import ERROR_FILE, list_checkpoints
from voxray.runs.remote_sync import RemoteSync
from voxray.runs.run_folder import GROW_FILE, STOP_FILE
from voxray.training.records import METRICS
from voxray.training.resource_errors import memory_advice

MAX_RESTARTS = 3


def train_on_workers(
    settings: TrainSettings,
    run_dir: Path,
    data: TrainingData,
    workers: tuple[int, int],
    *,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Run the recipe in Ray Train processes; after a crash start them again from the last checkpoint.

    Every start is a run of its own to Ray Train: where training stands is in the run folder alone, so whatever a killed
    Ray leaves behind cannot stand in the way of the next start.

    Args:
        workers: Fewest and most processes; between the two, as many as the cluster has room for. When it gets room for
            more, the run saves itself and goes on with them.
        callbacks: Ray Train callbacks, used by sweeps.
    Raises:
        RunError: The recipe refused its input (not tried again), or crashed again and again without getting on.
        Stopped: By the sweep that this is a trial of.
    """
    mirror = RemoteSync.from_settings(settings)
    (fewest, most), failures, step = workers, 0, _newest_step(run_dir)
    while True:
        (run_dir / GROW_FILE).unlink(missing_ok=True)
        mirror.take_back_signals()
        number = wait_for_workers(fewest, most, (run_dir / STOP_FILE).exists)
        if not number:
            return {"steps": step, "finished": False}
        outcome = _attempt(settings, run_dir, data, number, most, callbacks, mirror)
        mirror.fetch()  # the first worker may have been on another machine
        before, step = step, _newest_step(run_dir)
        if "result" in outcome:
            stopped = not (run_dir / GROW_FILE).exists() or (run_dir / STOP_FILE).exists()
            if outcome["result"]["finished"] or stopped:
                return outcome["result"]
            console.print(f"room for more than {number} worker(s): starting again with them from step {step}")
            continue
        error = outcome["error"]
        raise_refusal(error, run_dir)
        if is_evicted():
            raise Stopped("stopped by the sweep")
        _append_trace(run_dir / "ray.log", error)
        reason = f"out of memory: {memory_advice(settings)}" if "low on memory" in str(error) else _last_line(error)
        failures = 1 if step > before else failures + 1
        if failures > MAX_RESTARTS:
            log = run_dir / "ray.log"
            raise RunError(f"training failed {failures} times at step {step}, last with: {reason}; Ray's log: {log}")
        console.print(f"a worker failed ({reason}); starting again from step {step}", markup=False)


def _newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return max((step for step, _ in list_checkpoints(run_dir)), default=0)


def _attempt(
    settings: TrainSettings,
    run_dir: Path,
    data: TrainingData,
    number: int,
    most: int,
    callbacks: Sequence[Any],
    mirror: RemoteSync,
) -> dict[str, Any]:
    """Train with so many processes until they end, for whatever reason, or there is room for more of them.

    Ray Train runs in a thread so that this one can take signals.

    Returns:
        {"result"} or {"error"}.
    """
    outcome: dict[str, Any] = {}
    thread = threading.Thread(target=_fit_once, args=(settings, run_dir, data, number, callbacks, outcome), daemon=True)
    growth, before = None, _last_written(run_dir / METRICS)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.3)  # short waits, because signals are only taken between them
            if growth is None and number < most and _last_written(run_dir / METRICS) != before:
                growth = ScaleUpWatcher(
                    most - number, worker_resource(number)
                )  # now, that it takes no place of the run's own workers
            if growth and growth.is_there():
                (run_dir / GROW_FILE).touch()
            mirror.send_signals()
    finally:
        if growth:
            growth.close()
    return outcome


def _last_written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _fit_once(
    settings: TrainSettings,
    run_dir: Path,
    data: TrainingData,
    number: int,
    callbacks: Sequence[Any],
    outcome: dict[str, Any],
) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    from voxray.launch.process_group import ProcessGroup

    name = f"{run_dir.name}-{uuid4().hex[:8]}"
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={"settings": settings, "run_dir": str(run_dir), "data": data},
        torch_config=ProcessGroup(run=name),
        scaling_config=ray.train.ScalingConfig(num_workers=number, use_gpu=worker_resource(number) == "GPU"),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(run_dir / "ray"),
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=3
            ),
        ),
    )
    try:
        outcome["result"] = trainer.fit().return_value
    except Exception as error:  # told to the user by on_workers
        outcome["error"] = error
        release_placement_group(name)


def raise_refusal(error: Exception, run_dir: Path) -> None:
    """Raise on the driver what a worker refused; return if it crashed in another way."""
    if (run_dir / ERROR_FILE).is_file():
        stored = json.loads((run_dir / ERROR_FILE).read_text())
        raise (SettingsError if stored["kind"] == "SettingsError" else RunError)(stored["message"])
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for failure in failures:
        cause = getattr(failure, "_base_exc", failure)  # Ray Train keeps what a worker raised in there
        if isinstance(cause, RunError | SettingsError):
            raise cause


def count_workers(num_workers: str | int) -> tuple[int, int]:
    """Fewest and most processes of ``2`` or ``1:4``; ``auto`` is one per GPU of this machine, or one."""
    if num_workers == "auto":
        num_workers = max(1, torch.cuda.device_count())
    return as_range(num_workers)


def _append_trace(log_path: Path, error: BaseException) -> None:
    with open(log_path, "a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(error)))


def _last_line(error: BaseException) -> str:
    for failure in getattr(error, "worker_failures", {}).values():
        if dead := getattr(failure, "health_check_failure", None):
            error = dead  # the others only waited for it in vain
            break
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Worker exit type:")[0][:300] if lines else type(error).__name__
