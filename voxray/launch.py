"""The jobs that run on Ray: features, and training in processes that are started again when one dies."""

import json
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from rich.console import Console

from voxray.cluster import ray_session
from voxray.config.featurize import FeaturizeSettings
from voxray.config.groups import ModelFlags, range_of
from voxray.config.salmonn import SalmonnSettings
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings, TrainSettings, WhisperSettings
from voxray.data.feature_sets import features_place, log_folder, make_features
from voxray.data.featurize import MIN_ACTORS, FeaturizeReport, write_ledger
from voxray.errors import RunError, SettingsError, Stopped
from voxray.manifest import digest, first_fault
from voxray.mirror import Mirror
from voxray.models.encoder import refuse_changed_outputs
from voxray.models.family import family_of
from voxray.recipes import asr_adapter, multitask, salmonn, text, whisper
from voxray.recipes.build import earlier_of
from voxray.recipes.data import Data, training_data
from voxray.room import (
    Growth,
    find_room,
    free_places,
    is_evicted,
    refuse_without_room,
    say_idle_gpus,
    unit_of,
)
from voxray.run_folder import GROW_FILE, STOP_FILE, add_provenance, note_data, open_run
from voxray.storage import write_json
from voxray.terminal import console
from voxray.training.checkpoint import list_checkpoints
from voxray.training.engine import Worker
from voxray.training.host import Host
from voxray.training.monitor import METRICS, Publish
from voxray.training.trouble import memory_advice
from voxray.watch import stop_on_signal, watched

ERROR_FILE, RESULT_FILE = "error.json", "result.json"
MAX_RESTARTS = 3
RECIPES: dict[type[TrainSettings], Callable[..., dict[str, Any]]] = {
    TextSettings: text.train,
    AsrAdapterSettings: asr_adapter.train,
    MultitaskSettings: multitask.train,
    WhisperSettings: whisper.train,
    SalmonnSettings: salmonn.train,
}
"""Every training job's recipe, by the class of its settings."""


def run_featurize_job(settings: FeaturizeSettings) -> FeaturizeReport:
    """Run the featurize job from checked settings.

    Raises:
        RunError, SettingsError: What the user has to put right.
    """
    first_fault(settings.manifest)
    output_dir = features_place(settings, settings.output_dir, settings.storage_path, flag="--output_dir")
    with ray_session(log_folder(output_dir) / "ray.log", max(MIN_ACTORS, settings.num_actors)):
        report = make_features(settings, settings.model_id, settings.manifest, output_dir, bf16=settings.bf16)
    write_ledger(output_dir / "quarantine.jsonl", report.folders)
    console.print(f"features of {len(report.folders)} manifest(s) in {output_dir}")
    return report


def run_training(settings: TrainSettings) -> dict[str, Any]:
    """Run a training job from checked settings to its summary line.

    Raises:
        RunError, SettingsError: What the user has to put right.
        Stopped: The run was asked to stop and saved itself.
    """
    mirror = Mirror.of(settings)
    run_dir = mirror.folder
    first_fault((*settings.train_jsonl, *settings.val_jsonl))
    refuse_other_family(settings)
    refuse_changed_outputs(family_of(settings.model_id), settings.store, settings.quantize, None)
    earlier = earlier_of(settings, family_of(settings.model_id)) if settings.init_adapter else None
    if not settings.overwrite:
        mirror.fetch()
    open_run(run_dir, settings, overwrite=settings.overwrite)
    if settings.overwrite:
        mirror.forget()
    mirror.push_all()  # now, to learn that it cannot be written, and workers on other machines begin with it
    if earlier:
        add_provenance(run_dir, init_adapter=earlier.described())
    if prompts := getattr(settings, "prompts", ""):
        add_provenance(run_dir, prompts={"file": prompts, "sha256": digest(Path(prompts).read_bytes())})
    (run_dir / ERROR_FILE).unlink(missing_ok=True)
    warn_about_idle_flags(settings)
    workers = count_workers(settings.num_workers)
    use_ray = workers[1] > 0

    def work() -> dict[str, Any]:
        if use_ray:
            refuse_without_room(workers[0])
            say_idle_gpus(workers[0])
        data = training_data(settings, run_dir, use_ray=use_ray)
        note_data(run_dir, (*data.train, *data.validation))
        with stop_on_signal(run_dir), watched(run_dir):
            if use_ray:
                result = on_workers(settings, run_dir, data, workers)
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


def refuse_other_family(settings: TrainSettings) -> None:
    """Refuse a base that the job does not train.

    Raises:
        SettingsError: With the job that does.
    """
    found = family_of(settings.model_id)
    if found.name != settings.family:
        raise SettingsError(
            f"--model_id {settings.model_id}: a {found.name} model, and this job trains {settings.family}; "
            f"jobs/{found.job}.py trains it"
        )


def on_workers(
    settings: TrainSettings,
    run_dir: Path,
    data: Data,
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
    mirror = Mirror.of(settings)
    (fewest, most), failures, step = workers, 0, _newest_step(run_dir)
    while True:
        (run_dir / GROW_FILE).unlink(missing_ok=True)
        mirror.take_back_signals()
        number = find_room(fewest, most, (run_dir / STOP_FILE).exists)
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
    data: Data,
    number: int,
    most: int,
    callbacks: Sequence[Any],
    mirror: Mirror,
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
                growth = Growth(most - number, unit_of(number))  # now, that it takes no place of the run's own workers
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
    data: Data,
    number: int,
    callbacks: Sequence[Any],
    outcome: dict[str, Any],
) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    from voxray.ray_backend import ProcessGroup

    name = f"{run_dir.name}-{uuid4().hex[:8]}"
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={"settings": settings, "run_dir": str(run_dir), "data": data},
        torch_config=ProcessGroup(run=name),
        scaling_config=ray.train.ScalingConfig(num_workers=number, use_gpu=unit_of(number) == "GPU"),
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
        free_places(name)


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
    host = Host(ray.train.report, lambda: ray.train.get_preemption_info() is not None, publish)
    mirror = Mirror.of(settings)
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
    return range_of(num_workers)


def _device(rank: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def warn_about_idle_flags(settings: ModelFlags, talk: Console = console) -> None:
    """Say which flags change nothing on this machine."""
    unused = {"lora_r", "lora_alpha", "lora_dropout"} if getattr(settings, "tuning", "") == "full" else set()
    for name in sorted(unused & settings.model_fields_set):
        talk.print(f"warning: --{name} has no effect: --tuning full has no LoRA", markup=False)
    if not torch.cuda.is_available() and not os.environ.get("RAY_ADDRESS"):
        for name in sorted({"tf32", "pin_memory", "gpus_per_model"} & settings.model_fields_set):
            if getattr(settings, name):
                talk.print(f"warning: --{name} has no effect: there is no GPU on this machine")


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
