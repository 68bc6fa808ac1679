"""Training on Ray Train: start the processes, restart them after a crash, use more of them when the cluster grows.

Ray Train's own elastic policy, ``ScalingConfig(num_workers=(min, max))``, was tried with Ray 2.60 and is not used. It
counts the resources of nodes, not what is free on them. It took 30 s to grow after a node joined and 74 s to continue
after one was lost. On a resize it kills the train function, so no checkpoint is written. It also retries errors that
the user has to correct.
"""

import json
import os
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
from voxray.cluster.session import is_connected, max_gpus
from voxray.config.flag_groups import as_range
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError, Stopped
from voxray.launch.progress_view import modified_ns
from voxray.launch.worker import train_worker
from voxray.recipes.run_context import RunContext
from voxray.recipes.training_data import TrainingData
from voxray.runs.layout import ERROR_FILE, newest_step
from voxray.runs.remote_sync import COPIES
from voxray.runs.run_folder import GROW_FILE, STOP_FILE
from voxray.training.records import METRICS
from voxray.training.resource_errors import memory_advice

MAX_RESTARTS = 3
TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"


def train_on_workers(
    run: RunContext, data: TrainingData, num_workers: tuple[int, int], *, callbacks: Sequence[Any] = ()
) -> dict[str, Any]:
    """Train in Ray Train processes. After a crash, start them again from the last checkpoint.

    Each start is a new run for Ray Train. Only the run folder holds the progress of training, so files that a killed
    Ray leaves behind cannot disturb the next start.

    Args:
        num_workers: Minimum and maximum number of processes. The run uses as many as fit into the cluster. When more
            fit later, it writes a checkpoint and restarts with them.
        callbacks: Ray Train callbacks of a sweep.
    Raises:
        RunError: The recipe refused its input (not retried), or training crashed repeatedly without a new checkpoint.
        Stopped: The sweep stopped this trial.
    """
    run_dir = run.run_dir
    (fewest, most), failures, step = num_workers, 0, newest_step(run_dir)
    resource = worker_resource()  # once: a run whose GPU nodes died waits for others
    while True:
        (run_dir / GROW_FILE).unlink(missing_ok=True)
        run.remote.clear_signals()
        number = wait_for_workers(fewest, most, resource, (run_dir / STOP_FILE).exists)
        if not number:
            return {"steps": step, "finished": False}
        outcome = _attempt(run, data, number, most, resource, callbacks)
        run.remote.fetch()  # rank 0 may have been on another machine
        before, step = step, newest_step(run_dir)
        if "result" in outcome:
            stopped = not (run_dir / GROW_FILE).exists() or (run_dir / STOP_FILE).exists()
            if outcome["result"]["finished"] or stopped:
                return outcome["result"]
            console.print(f"more than {number} worker(s) fit into the cluster: starting again from step {step}")
            continue
        error = outcome["error"]
        raise_refusal(error, run_dir)
        if is_evicted():
            raise Stopped("stopped by the sweep")
        log = run_dir / "ray.log"
        _append_traceback(log, error)
        out_of_memory = "low on memory" in str(error)
        reason = f"out of memory: {memory_advice(run.settings)}" if out_of_memory else _last_line(error)
        if TIMEOUT_VARIABLE in str(error):  # Ray's message names it
            reason = f"it did not respond for {run.settings.worker_timeout_sec} s (--worker_timeout_sec)"
        failures = 1 if step > before else failures + 1
        if failures > MAX_RESTARTS:
            raise RunError(f"training failed {failures} times at step {step}, last with: {reason}; Ray's log: {log}")
        console.print(f"a worker failed ({reason}); starting again from step {step}", markup=False)


def _attempt(
    run: RunContext, data: TrainingData, number: int, most: int, resource: str, callbacks: Sequence[Any]
) -> dict[str, Any]:
    """Train with ``number`` processes until they end, or until they stop because more of them fit into the cluster.

    Ray Train runs in a thread, because the main thread has to receive signals.

    Returns:
        {"result"} or {"error"}.
    """
    outcome: dict[str, Any] = {}
    metrics = (run.run_dir / METRICS, run.run_dir / COPIES / METRICS)
    thread = threading.Thread(target=_fit_once, args=(run, data, number, resource, callbacks, outcome), daemon=True)
    watcher, before = None, [*map(modified_ns, metrics)]
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.3)  # Python handles signals between these short waits
            # Only after the first step, because the watcher must not take the resources of the run's own workers.
            if watcher is None and number < most and [*map(modified_ns, metrics)] != before:
                watcher = ScaleUpWatcher(most - number, resource)
            if watcher and watcher.is_ready():
                (run.run_dir / GROW_FILE).touch()
            run.remote.send_signals()
    finally:
        if watcher:
            watcher.close()
    return outcome


def _fit_once(
    run: RunContext,
    data: TrainingData,
    number: int,
    resource: str,
    callbacks: Sequence[Any],
    outcome: dict[str, Any],
) -> None:
    """Run Ray Train once and put its result or its error into ``outcome``."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from voxray.launch.process_group import ProcessGroup

    os.environ[TIMEOUT_VARIABLE] = str(run.settings.worker_timeout_sec)
    name = f"{run.run_dir.name}-{uuid4().hex[:8]}"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"settings": run.settings, "run_dir": str(run.run_dir), "data": data},
        torch_config=ProcessGroup(run=name),
        scaling_config=ray.train.ScalingConfig(num_workers=number, use_gpu=resource == "GPU"),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(run.run_dir / "ray"),
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=3
            ),
        ),
    )
    try:
        outcome["result"] = trainer.fit().return_value
    except Exception as error:  # train_on_workers reports it
        outcome["error"] = error
        release_placement_group(name)


def raise_refusal(error: Exception, run_dir: Path) -> None:
    """Raise the ``RunError`` or ``SettingsError`` of a worker on the driver; return if the worker crashed otherwise."""
    if (run_dir / ERROR_FILE).is_file():
        stored = json.loads((run_dir / ERROR_FILE).read_text())
        raise (SettingsError if stored["kind"] == "SettingsError" else RunError)(stored["message"])
    failures = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    for failure in failures:
        cause = getattr(failure, "_base_exc", failure)  # Ray Train stores the worker's exception there
        if isinstance(cause, RunError | SettingsError):
            raise cause


def count_workers(num_workers: str | int) -> tuple[int, int]:
    """Minimum and maximum number of processes of ``2`` or ``1:4``; for ``auto`` one per GPU, at least one.

    Once this process is connected to Ray, the GPUs of the whole cluster count, with those that it can still start;
    before that, those of this machine.
    """
    if num_workers == "auto":
        num_workers = max(1, max_gpus() if is_connected() else torch.cuda.device_count())
    return as_range(num_workers)


def _append_traceback(log_path: Path, error: BaseException) -> None:
    with open(log_path, "a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(error)))


def _last_line(error: BaseException) -> str:
    """The line of an error that names its cause: of the worker that died, not of those that waited for it."""
    for failure in getattr(error, "worker_failures", {}).values():
        if health_check_failure := getattr(failure, "health_check_failure", None):
            error = health_check_failure
            break
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Worker exit type:")[0][:300] if lines else type(error).__name__
