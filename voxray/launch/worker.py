"""The function that every Ray Train process runs."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from voxray.batches.rank import Worker
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import write_json
from voxray.recipes.run_context import RunContext
from voxray.recipes.run_stage import train
from voxray.runs.layout import ERROR_FILE
from voxray.training.callbacks import Callbacks
from voxray.training.records import LOG, METRICS, Publish


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train in one process.

    Args:
        config: {"settings", "run_dir", "data"} of the run.
    Returns:
        The result of ``recipes.run_stage.train``.
    """
    import ray.train
    from ray.train.torch import get_device

    context, run_dir = ray.train.get_context(), Path(config["run_dir"])
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)
    publish = _prometheus_gauges(run_dir.name) if worker.is_first else None
    callbacks = Callbacks(ray.train.report, lambda: ray.train.get_preemption_info() is not None, publish)
    stop_listening = None
    try:
        run = RunContext.create(config["settings"], run_dir=run_dir, worker=worker, callbacks=callbacks)
        run.remote.fetch()
        stop_listening = run.remote.watch_signals([LOG, METRICS] if worker.is_first else [])
        result = train(run, config["data"])
        if worker.is_first:
            run.remote.try_push(print)
        return result
    except (RunError, SettingsError) as error:
        with suppress(OSError):  # a full disk; then the error reaches the driver through Ray only
            write_json(run_dir / ERROR_FILE, {"message": str(error), "kind": type(error).__name__})
        raise
    finally:
        if stop_listening:
            stop_listening.set()


def _prometheus_gauges(run: str) -> Publish:
    """Publish metrics as gauges ``voxray_<name>`` with the tags run and task at the node's Prometheus endpoint."""
    from ray.util.metrics import Gauge

    gauges: dict[str, Gauge] = {}

    def publish(name: str, task: str, value: float) -> None:
        if name not in gauges:
            gauges[name] = Gauge(f"voxray_{name}", f"{name} of a training run", tag_keys=("run", "task"))
        gauges[name].set(value, tags={"run": run, "task": task})

    return publish
