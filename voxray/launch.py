"""Ray at the edge: start or join a cluster, make features, run training processes, and show how they get on."""

import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from voxray.config.featurize import FeaturizeSettings
from voxray.config.groups import ModelFlags, range_of
from voxray.config.salmonn import SalmonnSettings
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings, TrainSettings, WhisperSettings
from voxray.data.feature_sets import features_place, log_folder, make_features
from voxray.data.featurize import MIN_ACTORS, FeaturizeReport, write_ledger
from voxray.errors import RunError, SettingsError, Stopped
from voxray.manifest import digest, first_fault
from voxray.models.encoder import refuse_changed_outputs
from voxray.models.family import family_of
from voxray.recipes import asr_adapter, multitask, salmonn, text, whisper
from voxray.recipes.build import earlier_of
from voxray.recipes.data import Data, training_data
from voxray.run_folder import add_provenance, anchor, note_data, open_run
from voxray.storage import write_json
from voxray.terminal import console
from voxray.training.checkpoint import list_checkpoints
from voxray.training.engine import Worker
from voxray.training.host import Host
from voxray.training.monitor import Publish
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
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # reports travel with this poll; the default is 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # autoscaled nodes take minutes to come up
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune prints a box of text even when told to be silent, unless this is off
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep as it ends every other job
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # else a trial that fails before its first validation ends the sweep
}


@contextmanager
def ray_session(log_path: Path, num_processes: int = 1) -> Iterator[None]:
    """A Ray to work with: the cluster named by RAY_ADDRESS (set in submitted jobs), else one started here and stopped
    after.

    Args:
        log_path: File that takes Ray's own messages.
        num_processes: Processes that will run at a time. A Ray started here gets one CPU more than that, and not fewer
            than the machine has, because Ray Data hangs when training holds every CPU.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(address="local", num_cpus=max(os.cpu_count() or 1, num_processes + 1), **quiet)
    except Exception as error:  # Ray's start fails in many ways, none of which the user caused by a setting
        raise RunError(f"Ray could not be started or reached: {' '.join(str(error).split())[:300]}") from error
    _quiet_loggers(log_path)
    try:
        with stderr_to(log_path), term_is_interrupt():
            yield
            ray.shutdown()
    finally:
        ray.shutdown()


@contextmanager
def stderr_to(log_path: Path) -> Iterator[None]:
    """Send what C++ code writes to the standard error of this process to a file; Python's own stays on the terminal."""
    sys.stderr.flush()
    terminal, log = os.dup(2), os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    before = sys.stderr
    sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = before
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def term_is_interrupt() -> Iterator[None]:
    """Let SIGTERM, at which Ray ends the driver without a word, end a job as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quiet_loggers(log_path: Path) -> None:
    """Send the messages of Ray's Python side to a file instead of the terminal."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    handler = logging.FileHandler(log_path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            if isinstance(old, logging.StreamHandler) and not isinstance(old, logging.FileHandler):
                logger.removeHandler(old)
    logger = logging.getLogger("ray")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


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
    run_dir = anchor(settings.output_dir, settings.storage_path)
    first_fault((*settings.train_jsonl, *settings.val_jsonl))
    refuse_other_family(settings)
    refuse_changed_outputs(family_of(settings.model_id), settings.store, settings.quantize, None)
    earlier = earlier_of(settings, family_of(settings.model_id)) if settings.init_adapter else None
    open_run(run_dir, settings, overwrite=settings.overwrite)
    if earlier:
        add_provenance(run_dir, init_adapter=earlier.described())
    if prompts := getattr(settings, "prompts", ""):
        add_provenance(run_dir, prompts={"file": prompts, "sha256": digest(Path(prompts).read_bytes())})
    (run_dir / ERROR_FILE).unlink(missing_ok=True)
    warn_about_idle_flags(settings)
    workers = count_workers(settings.num_workers)
    use_ray = workers[1] > 0

    def work() -> dict[str, Any]:
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

    Ray Train runs in a thread so that this one can take signals.

    Args:
        workers: Fewest and most processes; between the two, as many as the cluster has room for.
        callbacks: Ray Train callbacks, used by sweeps.
    Raises:
        RunError: The recipe refused its input (not tried again), or crashed again and again without getting on.
    """
    failures, step = 0, _newest_step(run_dir)
    while True:
        outcome: dict[str, Any] = {}
        thread = threading.Thread(
            target=_fit_once, args=(settings, run_dir, data, workers, callbacks, outcome), daemon=True
        )
        thread.start()
        while thread.is_alive():
            thread.join(0.3)  # short waits, because signals are only taken between them
        if "result" in outcome:
            return outcome["result"]
        error = outcome["error"]
        raise_refusal(error, run_dir)
        _append_trace(run_dir / "ray.log", error)
        reason = f"out of memory: {memory_advice(settings)}" if "low on memory" in str(error) else _last_line(error)
        before, step = step, _newest_step(run_dir)
        failures = 1 if step > before else failures + 1
        if failures > MAX_RESTARTS:
            log = run_dir / "ray.log"
            raise RunError(f"training failed {failures} times at step {step}, last with: {reason}; Ray's log: {log}")
        console.print(f"a worker failed ({reason}); starting again from step {step}", markup=False)


def _newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return max((step for step, _ in list_checkpoints(run_dir)), default=0)


def _fit_once(
    settings: TrainSettings,
    run_dir: Path,
    data: Data,
    workers: tuple[int, int],
    callbacks: Sequence[Any],
    outcome: dict[str, Any],
) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    fewest, most = workers
    trainer = TorchTrainer(
        _worker_main,
        train_loop_config={"settings": settings, "run_dir": str(run_dir), "data": data},
        scaling_config=ray.train.ScalingConfig(
            num_workers=most if fewest == most else workers, use_gpu=gpus_within_reach() >= fewest
        ),
        run_config=ray.train.RunConfig(
            name=f"ray-{os.getpid()}-{threading.get_ident()}",
            storage_path=str(run_dir / "ray"),
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=3),
        ),
    )
    try:
        outcome["result"] = trainer.fit().return_value
    except Exception as error:  # told to the user by on_workers
        outcome["error"] = error


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
    try:
        return RECIPES[type(settings)](settings, run_dir, config["data"], worker, host)
    except (RunError, SettingsError) as error:
        with suppress(OSError):  # a full disk, of which Ray carries the news as well
            write_json(run_dir / ERROR_FILE, {"message": str(error), "kind": type(error).__name__})
        raise


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
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "_base_exc", failure)  # Ray Train keeps what a worker raised in there
        if isinstance(cause, RunError | SettingsError):
            raise cause


def gpus_within_reach() -> int:
    """GPUs of the cluster, counting nodes that its autoscaler has not started yet."""
    return within_reach("GPU")


def within_reach(kind: str) -> int:
    """How much of ``GPU`` or ``CPU`` the cluster has, counting nodes that its autoscaler has not started yet."""
    import ray
    from ray._private.state import state

    present = ray.cluster_resources().get(kind, 0)
    limits = state.get_max_resources_from_cluster_config() or {}  # None without an autoscaler
    return int(max(present, limits.get(kind, 0)))


def cluster_resources(log_path: Path) -> dict[str, float] | None:
    """CPUs, GPUs and memory of the cluster that RAY_ADDRESS names; None without one.

    Raises:
        RunError: It is out of reach.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return None
    with ray_session(log_path):
        import ray

        return dict(ray.cluster_resources())


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
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Worker exit type:")[0][:300] if lines else type(error).__name__
