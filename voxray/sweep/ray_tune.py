"""Runs the trials of a sweep with Ray Tune. No other module imports Ray Tune."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxray.cluster.session import max_gpus, max_resource, maximum_hint
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import write_json
from voxray.launch.elastic import train_on_workers
from voxray.recipes.run_context import RunContext
from voxray.sweep.queue import Queue
from voxray.sweep.trials import ERROR_FILE, RESULT_FILE, Trial, scheduler_record, with_outcome
from voxray.sweep.work import trial_settings

DRIVER_CPUS = 0.01  # a trial's own process only waits for its workers
ENDLESS_STEPS = 10**9


def concurrent_trials(num_workers: int, limit: int) -> int:
    """Number of trials that run at the same time on the cluster; one CPU is reserved for Ray Data.

    Args:
        num_workers: Processes of one trial.
        limit: Maximum number; 0 for as many as fit.
    Raises:
        SettingsError: The cluster is too small for a single trial.
    """
    gpus, cpus = max_gpus(), max_resource("CPU") - 1
    capacity = (gpus or cpus) // num_workers
    if capacity < 1:
        raise SettingsError(
            f"--num_workers {num_workers}: a trial needs as many GPUs or, on a cluster without any, CPUs, and one CPU "
            f"is kept for Ray Data; the cluster has {cpus + 1} CPUs and {gpus} GPUs{maximum_hint()}"
        )
    if limit > capacity:
        message = f"the cluster has room for {capacity}, which is what runs"
        console.print(f"warning: --max_concurrent_trials {limit}: {message}")
    return min(limit, capacity) if limit else capacity


@dataclass(frozen=True)
class EarlierTrial:
    """Stands for a trial of an earlier start of the sweep in Ray Tune's schedulers, which need its id only."""

    trial_id: str


def build_scheduler(settings: Any, earlier: Sequence[Trial]) -> Any:
    """Create Ray Tune's scheduler and replay the validations of earlier trials; None for ``--scheduler none``."""
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    class Median(MedianStoppingRule):
        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            if "step" in result:  # missing if a trial failed before its first validation; the rule would wait for it
                super().on_trial_complete(tune_controller, trial, result)

    metric, mode = settings.metric, settings.mode
    options = {"time_attr": "step", "metric": metric, "mode": mode, "grace_period": settings.grace_steps}
    if settings.scheduler == "none":
        return None
    if settings.scheduler == "median":
        # an infinite time slice, so that a trial never pauses for others that are about to start
        scheduler = Median(**options, min_time_slice=math.inf)  # type: ignore[arg-type]
    else:
        scheduler = ASHAScheduler(**options, max_t=max(ENDLESS_STEPS, settings.grace_steps))
    for trial in earlier:
        stub = EarlierTrial(f"trial-{trial.number}")
        records = [scheduler_record(record, metric, mode) for record in trial.history]
        if settings.scheduler == "asha":
            scheduler.on_trial_add(None, stub)  # type: ignore[arg-type]
            for record in records:
                scheduler.on_trial_result(None, stub, record)  # type: ignore[arg-type]
        else:
            for record in records:  # the median rule stores results in this method only
                scheduler.on_trial_complete(None, stub, record)  # type: ignore[arg-type]
    return scheduler


def train_trial(settings: Any, num_workers: int, has_bfloat16: bool, config: dict[str, Any]) -> None:
    """Train one trial, in the trial's own process, and write its result or error to its folder.

    Args:
        num_workers: Training processes of the trial.
        has_bfloat16: Whether the GPUs compute in bfloat16.
        config: {"number", "folder", "choice", "data"} of the trial.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    class Report(TuneReportCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            super().after_report(run_context, [scheduler_record(metrics[0], settings.metric, settings.mode)], None)

    trial = with_outcome(Trial(config["number"], Path(config["folder"]), config["choice"]))
    run_settings = trial_settings(settings, trial.choice, trial.folder, has_bfloat16=has_bfloat16)
    for record in trial.history:
        if record["step"] <= trial.saved_step:  # from an earlier start; training repeats the later ones
            tune.report(scheduler_record(record, settings.metric, settings.mode))
    try:
        workers = (num_workers, num_workers)
        run = RunContext.create(run_settings, run_dir=trial.folder)
        result = train_on_workers(run, config["data"], workers, callbacks=[Report()])
    except (RunError, SettingsError) as error:  # written to a file instead of raised, so that Ray Tune does not retry
        write_json(trial.folder / ERROR_FILE, {"message": str(error), "kind": type(error).__name__})
    else:
        write_json(trial.folder / RESULT_FILE, result)


def run_on_tune(queue: Queue, train: Callable[..., None], scheduler: Any, concurrent: int, storage: Path) -> None:
    """Run all trials of a queue.

    Args:
        train: Trains one trial in its own process; takes the config of ``train_trial``.
        scheduler: Ray Tune's scheduler, which stops weak trials; None stops none.
        concurrent: Number of trials that run at the same time.
        storage: Folder for Ray Tune's own files.
    """
    from ray import tune
    from ray.tune.search import Searcher

    first = queue.next()
    if first is None:
        return  # Ray Tune raises an error if there is no trial
    started, numbers = [first], dict[str, int]()

    class QueueSearcher(Searcher):
        """Passes the queue's trials to Ray Tune. Saving and restoring do nothing, as all state is in the trials."""

        def __reduce__(self) -> Any:
            return Searcher, ()

        def suggest(self, trial_id: str) -> Any:
            next_trial = started.pop() if started else queue.next()
            if next_trial is None:
                return Searcher.FINISHED
            trial, data = next_trial
            numbers[trial_id] = trial.number
            return {"number": trial.number, "folder": str(trial.folder), "choice": trial.choice, "data": data}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            if trial_id in numbers:
                queue.end(numbers.pop(trial_id), died=error)

        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).touch()

        def restore(self, checkpoint_path: str) -> None:
            pass

    tuner = tune.Tuner(
        tune.with_resources(train, {"CPU": DRIVER_CPUS}),
        tune_config=tune.TuneConfig(
            num_samples=-1,  # until the queue is empty
            max_concurrent_trials=concurrent,
            search_alg=QueueSearcher(),
            scheduler=scheduler,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"sweep-{os.getpid()}-{id(queue)}",
            storage_path=str(storage),
            verbose=0,
            failure_config=tune.FailureConfig(
                max_failures=1
            ),  # retry once if the process dies, for example with its machine
        ),
    )
    tuner.fit()
