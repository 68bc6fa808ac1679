"""The function that every Ray Train process runs."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from voxray.batches.rank import Worker
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import write_json
from voxray.recipes.registry import RECIPES
from voxray.runs.layout import ERROR_FILE
from voxray.runs.remote_sync import RemoteSync
from voxray.training.callbacks import Callbacks
from voxray.training.records import Publish


def _worker_main(config: dict[str, Any]) -> dict[str, Any]:
    """What each Ray Train process runs."""
    import ray.train
    from ray.train.torch import get_device

    context, run_dir = ray.train.get_context(), Path(config["run_dir"])
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)
    settings = config["settings"]
    publish = _gauges(run_dir.name) if worker.is_first else None
    host = Callbacks(ray.train.report, lambda: ray.train.get_preemption_info() is not None, publish)
    mirror = RemoteSync.from_settings(settings)
    mirror.fetch()
    done = mirror.hear_signals()
    try:
        result = RECIPES[type(settings)](settings, run_dir, config["data"], worker, host)
        if worker.is_first:
            mirror.push_or(print)
        return result
    except (RunError, SettingsError) as error:
        with suppress(OSError):  # a full disk, of which Ray carries the news as well
            write_json(run_dir / ERROR_FILE, {"message": str(error), "kind": type(error).__name__})
        raise
    finally:
        done.set()


def _gauges(run: str) -> Publish:
    """Make figures gauges ``voxray_<name>``, tagged with the run and the task, at the node's Prometheus endpoint."""
    from ray.util.metrics import Gauge

    gauges: dict[str, Gauge] = {}

    def publish(name: str, task: str, value: float) -> None:
        if name not in gauges:
            gauges[name] = Gauge(f"voxray_{name}", f"{name} of a training run", tag_keys=("run", "task"))
        gauges[name].set(value, tags={"run": run, "task": task})

    return publish
