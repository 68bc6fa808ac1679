"""The trials of a sweep as Ray Tune trials. No other module imports Ray Tune."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxray.cluster.session import max_gpus, max_resource
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import write_json
from voxray.launch.elastic import train_on_workers
from voxray.sweep.queue import Queue
from voxray.sweep.trials import ERROR_FILE, RESULT_FILE, Trial, reported, with_outcome
from voxray.sweep.work import trial_settings

DRIVER_CPUS = 0.01  # a trial's own process only waits for its workers
ENDLESS_STEPS = 10**9


def concurrent_trials(num_workers: int, asked: int) -> int:
    """How many trials the cluster holds at a time, each with all of its processes; one CPU is kept for Ray Data.

    Args:
        num_workers: Processes of one trial.
        asked: The most there shall be; 0 for as many as there is room for.
    Raises:
        SettingsError: There is not even room for one.
    """
    gpus, cpus = max_gpus(), max_resource("CPU") - 1
    room = (gpus if gpus >= num_workers else cpus) // num_workers
    if room < 1:
        raise SettingsError(
            f"--num_workers {num_workers}: a trial needs as many CPUs or GPUs, and one CPU is kept for Ray Data; the "
            f"cluster has {cpus + 1} CPUs and {gpus} GPUs"
        )
    if asked > room:
        console.print(f"warning: --max_concurrent_trials {asked}: the cluster has room for {room}, which is what runs")
    return min(asked, room) if asked else room


@dataclass(frozen=True)
class EarlierTrial:
    """A trial of an earlier start of the sweep, as schedulers know trials."""

    trial_id: str


def build_scheduler(settings: Any, earlier: Sequence[Trial]) -> Any:
    """Ray Tune's scheduler, which knows the validations of trials that are over already; None stops nobody."""
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    class Median(MedianStoppingRule):
        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            if "step" in result:  # a trial that failed before its first validation has none, and would be waited for
                super().on_trial_complete(tune_controller, trial, result)

    metric, mode = settings.metric, settings.mode
    how = {"time_attr": "step", "metric": metric, "mode": mode, "grace_period": settings.grace_steps}
    if settings.scheduler == "none":
        return None
    if settings.scheduler == "median":
        # the slice of time is one that never ends: a trial is not to pause for others that are about to start
        scheduler = Median(**how, min_time_slice=math.inf)  # type: ignore[arg-type]
    else:
        scheduler = ASHAScheduler(**how, max_t=max(ENDLESS_STEPS, settings.grace_steps))
    for trial in earlier:
        stub, records = EarlierTrial(f"trial-{trial.number}"), [reported(each, metric, mode) for each in trial.history]
        if settings.scheduler == "asha":
            scheduler.on_trial_add(None, stub)  # type: ignore[arg-type]
            for record in records:
                scheduler.on_trial_result(None, stub, record)  # type: ignore[arg-type]
        else:
            for record in records:  # this rule only takes note of what it is told here
                scheduler.on_trial_complete(None, stub, record)  # type: ignore[arg-type]
    return scheduler


def train_trial(settings: Any, num_workers: int, config: dict[str, Any]) -> None:
    """What the process of a trial runs: one training run, whose end it leaves in the trial's folder.

    Args:
        config: {"number", "folder", "choice", "data"} of the trial.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    class Report(TuneReportCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            super().after_report(run_context, [reported(metrics[0], settings.metric, settings.mode)], None)

    trial = with_outcome(Trial(config["number"], Path(config["folder"]), config["choice"]))
    run = trial_settings(settings, trial.choice, trial.folder)
    for record in trial.history:
        if record["step"] <= trial.saved_step:  # of an earlier start; later ones will come again
            tune.report(reported(record, settings.metric, settings.mode))
    try:
        workers = (num_workers, num_workers)
        result = train_on_workers(run, trial.folder, config["data"], workers, callbacks=[Report()])
    except (RunError, SettingsError) as error:  # said in its folder, so that Ray Tune does not try it once more
        write_json(trial.folder / ERROR_FILE, {"message": str(error), "kind": type(error).__name__})
    else:
        write_json(trial.folder / RESULT_FILE, result)


def run_on_tune(queue: Queue, train: Callable[..., None], scheduler: Any, concurrent: int, storage: Path) -> None:
    """Run all trials of a queue.

    Args:
        train: What the process of a trial runs.
        scheduler: Stops trials; None stops nobody.
        concurrent: Trials at a time.
        storage: Where Ray Tune may write.
    """
    from ray import tune
    from ray.tune.search import Searcher

    first = queue.next()
    if first is None:
        return  # Ray Tune takes it for a mistake to have no trial
    waiting, numbers = [first], dict[str, int]()

    class Choose(Searcher):
        """Hands the queue's trials to Ray Tune, which would like to save it; but all that it knows is on disk."""

        def __reduce__(self) -> Any:
            return Searcher, ()

        def suggest(self, trial_id: str) -> Any:
            found = waiting.pop() if waiting else queue.next()
            if found is None:
                return Searcher.FINISHED
            trial, data = found
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
            num_samples=-1,  # until the queue says that it is finished
            max_concurrent_trials=concurrent,
            search_alg=Choose(),
            scheduler=scheduler,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=f"sweep-{os.getpid()}-{id(queue)}",
            storage_path=str(storage),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=1),  # a process that is gone, with its machine perhaps
        ),
    )
    tuner.fit()
