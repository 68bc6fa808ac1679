"""The jobs that run on Ray: features, and training in processes that are started again when one dies."""

from pathlib import Path
from typing import Any

import torch

from voxray.batches.rank import Worker
from voxray.cluster.actor_pool import MIN_ACTORS
from voxray.cluster.placement import require_capacity, warn_about_idle_gpus
from voxray.cluster.session import ray_session
from voxray.config.train import TrainSettings
from voxray.config.unused_flags import warn_about_unused_flags
from voxray.core.console import console
from voxray.core.errors import Stopped
from voxray.core.manifest import require_usable_row, sha256_hex
from voxray.core.storage import write_json
from voxray.launch.elastic import count_workers, train_on_workers
from voxray.launch.progress_view import show_progress, stop_on_signal
from voxray.models.adapters.compatibility import refuse_changed_outputs
from voxray.models.registry import get_family
from voxray.recipes.build_model import find_init_adapter
from voxray.recipes.registry import RECIPES, refuse_other_family
from voxray.recipes.training_data import training_data
from voxray.runs.layout import ERROR_FILE, RESULT_FILE
from voxray.runs.remote_sync import RemoteSync
from voxray.runs.run_folder import add_provenance, note_data, open_run_folder


def run_training(settings: TrainSettings) -> dict[str, Any]:
    """Run a training job from checked settings to its summary line.

    Raises:
        RunError, SettingsError: What the user has to put right.
        Stopped: The run was asked to stop and saved itself.
    """
    mirror = RemoteSync.from_settings(settings)
    run_dir = mirror.folder
    require_usable_row((*settings.train_jsonl, *settings.val_jsonl))
    refuse_other_family(settings)
    refuse_changed_outputs(get_family(settings.model_id), settings.store, settings.quantize, None)
    earlier = find_init_adapter(settings, get_family(settings.model_id)) if settings.init_adapter else None
    if not settings.overwrite:
        mirror.fetch()
    open_run_folder(run_dir, settings, overwrite=settings.overwrite)
    if settings.overwrite:
        mirror.forget()
    mirror.push_all()  # now, to learn that it cannot be written, and workers on other machines begin with it
    if earlier:
        add_provenance(run_dir, init_adapter=earlier.described())
    if prompts := getattr(settings, "prompts", ""):
        add_provenance(run_dir, prompts={"file": prompts, "sha256": sha256_hex(Path(prompts).read_bytes())})
    (run_dir / ERROR_FILE).unlink(missing_ok=True)
    warn_about_unused_flags(settings)
    workers = count_workers(settings.num_workers)
    use_ray = workers[1] > 0

    def work() -> dict[str, Any]:
        if use_ray:
            require_capacity(workers[0])
            warn_about_idle_gpus(workers[0])
        data = training_data(settings, run_dir, use_ray=use_ray)
        note_data(run_dir, (*data.train, *data.validation))
        with stop_on_signal(run_dir), show_progress(run_dir):
            if use_ray:
                result = train_on_workers(settings, run_dir, data, workers)
            else:
                result = RECIPES[type(settings)](settings, run_dir, data, Worker(device=_device(0)))
        write_json(run_dir / RESULT_FILE, result)
        return result

    if use_ray:
        with ray_session(run_dir / "ray.log", max(workers[1], MIN_ACTORS, settings.num_actors)):
            result = work()
    else:
        result = work()
    mirror.push_all()
    if not result["finished"]:
        raise Stopped(f"stopped at step {result['steps']}; the same command goes on from there; run folder {run_dir}")
    console.print(
        f"trained: {result['steps']} steps; adapter in {run_dir / 'adapter'}; run folder {run_dir}", markup=False
    )
    return result


def _device(rank: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
