"""A training job from checked settings to its summary line: features, training processes, adapter."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from voxray.batches.rank import Worker
from voxray.cluster.actor_pool import MIN_ACTORS
from voxray.cluster.placement import require_capacity, warn_about_cpus
from voxray.cluster.session import dashboard_line, ray_session
from voxray.commands.next_steps import after_training
from voxray.config.train import SHARED_ROWS, TrainSettings
from voxray.config.unused_flags import warn_about_unused_flags
from voxray.core.console import console
from voxray.core.content_hash import combined_hash, path_hash
from voxray.core.errors import SettingsError, Stopped
from voxray.core.manifest import require_usable_row, sha256_hex
from voxray.core.storage import write_json
from voxray.core.tasks import own_definitions
from voxray.launch.elastic import count_workers, train_on_workers
from voxray.launch.progress_view import show_progress, stop_on_signal
from voxray.models.adapters.compatibility import check_encoder_unchanged
from voxray.recipes.build_model import check_lora_targets, find_init_adapter
from voxray.recipes.run_context import RunContext, assemble_inputs, with_run_dtype
from voxray.recipes.run_stage import train
from voxray.recipes.training_data import training_data
from voxray.runs.inputs import input_hashes
from voxray.runs.layout import ERROR_FILE, RESULT_FILE
from voxray.runs.lease import folder_lease
from voxray.runs.run_folder import add_data_provenance, add_provenance, open_run_folder, resolve_output_dir
from voxray.training.records import LOG, METRICS

STARTED_FROM = "started_from"
"""Key of result.json with the hash of what the run was started with."""


def run_training(settings: TrainSettings, *, show_next: bool = True) -> dict[str, Any]:
    """Run a training job.

    Args:
        show_next: Print the commands that use the adapter.
    Raises:
        RunError, SettingsError: The user has to correct something.
        Stopped: The run was asked to stop. It wrote a checkpoint first.
    """
    resolve_output_dir(settings.output_dir, settings.storage_path, is_mirrored=True)  # refuse a bad path first
    settings = assemble_inputs(settings)
    require_usable_row(settings.manifests)
    run = RunContext.create(settings, worker=Worker(device=_device()))
    check_encoder_unchanged(run.family, settings.store, settings.quantize, None)
    check_lora_targets(run)
    _require_trackers(settings)
    with folder_lease(run.run_dir, run.remote.remote_dir):
        if not settings.overwrite:
            run.remote.fetch()
        num_workers = count_workers(settings.num_workers)
        use_ray = num_workers[1] > 0
        settings = with_run_dtype(settings, run.run_dir, on_ray=use_ray)
        run = replace(run, settings=settings)
        started_from = _starting_point(settings)
        if result := _result(run, started_from):
            console.print(f"this run is finished; --overwrite trains anew: {run.run_dir}", markup=False)
            return _report(run, result, show_next=show_next)
        _open(run)
        _warn_about_shared_rows(settings)
        warn_about_unused_flags(settings)
        if use_ray:
            with ray_session(run.run_dir / "ray.log", max(num_workers[1], MIN_ACTORS, settings.num_actors)):
                num_workers = count_workers(settings.num_workers)  # again: the cluster may have other GPUs
                require_capacity(num_workers[0])
                warn_about_cpus()
                if line := dashboard_line():
                    console.print(line, markup=False)
                result = _train(run, num_workers, started_from)
        else:
            result = _train(run, num_workers, started_from)
        run.remote.push_all()
        if not result["finished"]:
            raise Stopped(
                f"stopped at step {result['steps']}; run the same command again to resume; run folder {run.run_dir}"
            )
        return _report(run, result, show_next=show_next)


def _report(run: RunContext, result: dict[str, Any], *, show_next: bool) -> dict[str, Any]:
    """Print where the adapter of a finished run is and, if asked, the commands that use it; returns the result."""
    adapter = run.run_dir / "adapter"
    console.print(f"trained: {result['steps']} steps; adapter in {adapter}; run folder {run.run_dir}", markup=False)
    for line in after_training(run.settings, run.run_dir, result) if show_next else ():
        console.print(line, markup=False)
    return result


def _result(run: RunContext, started_from: str) -> dict[str, Any] | None:
    """The result of the run folder if the same command finished there.

    Args:
        started_from: Result of ``_starting_point``.
    """
    if run.settings.overwrite:
        return None
    try:
        result = json.loads((run.run_dir / RESULT_FILE).read_text(encoding="utf-8"))
        is_finished = result["finished"] and result.pop(STARTED_FROM) == started_from
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return result if is_finished and (run.run_dir / "adapter" / "adapter_config.json").is_file() else None


def _starting_point(settings: TrainSettings) -> str:
    """Hash of the settings, the models, the manifests and the own tasks of a run; of feature sets, the descriptions."""
    manifests = [Path(path) for path in settings.manifests]
    data = [path_hash(path / "set.json" if path.is_dir() else path) for path in manifests]
    tasks = [[name, definition] for name, definition in own_definitions().items()]
    return combined_hash([settings.model_dump_json(), input_hashes(settings), data, *filter(None, [tasks])])


def _require_trackers(settings: TrainSettings) -> None:
    for name in settings.report_to:
        if not find_spec(name):
            raise SettingsError(f"--report_to {name}: needs {name}, which is not installed: pip install voxray[{name}]")


def _warn_about_shared_rows(settings: TrainSettings) -> None:
    for path in settings.shared_manifests:
        console.print(f"warning: --val_jsonl {path}: {SHARED_ROWS}", markup=False)


def _open(run: RunContext) -> None:
    """Open the run folder, which has been fetched from its URL, and record where the run starts from."""
    settings, run_dir, remote = run.settings, run.run_dir, run.remote
    init_adapter = find_init_adapter(run) if settings.init_adapter else None
    open_run_folder(run_dir, settings, overwrite=settings.overwrite, inputs=input_hashes(settings))
    if settings.overwrite:
        remote.forget()
    remote.push_all()  # before anything is computed: the URL may not be writable, and workers elsewhere read from it
    if init_adapter:
        add_provenance(run_dir, init_adapter=init_adapter.provenance())
    if prompts := getattr(settings, "prompts", ""):
        add_provenance(run_dir, prompts={"file": prompts, "sha256": sha256_hex(Path(prompts).read_bytes())})
    (run_dir / ERROR_FILE).unlink(missing_ok=True)


def _train(run: RunContext, num_workers: tuple[int, int], started_from: str) -> dict[str, Any]:
    """Make the features and train, on Ray Train workers or, without any, in this process.

    Args:
        started_from: Result of ``_starting_point``; the manifests may change during the run.
    """
    use_ray = num_workers[1] > 0
    data = training_data(run, use_ray=use_ray)
    add_data_provenance(run.run_dir, data.folders)
    with stop_on_signal(run.run_dir), run.remote.copy_files([LOG, METRICS]), show_progress(run.run_dir):
        result = train_on_workers(run, data, num_workers) if use_ray else train(run, data)
    write_json(run.run_dir / RESULT_FILE, {**result, STARTED_FROM: started_from})
    return result


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
