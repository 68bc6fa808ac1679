"""Sweeps: Ray Tune over LoRA ranks and task weights, every trial a Ray Train run, weak ones stopped early by ASHA."""

import csv
import io
import math
import os
from pathlib import Path
from typing import Any

import yaml

from voxray.config.train import TrainSettings
from voxray.errors import RunError, SettingsError
from voxray.launch import count_workers, on_workers, ray_session, refuse_other_family, warn_about_idle_flags
from voxray.manifest import first_fault
from voxray.recipes.data import Data, training_data
from voxray.run_folder import anchor, make_folder, provenance
from voxray.storage import write_atomically, write_json
from voxray.tasks import TASKS
from voxray.terminal import console, progress_bar

DRIVER_CPUS = 0.01  # a trial's own process only waits for its workers


def run_sweep(settings: Any) -> dict[str, Any]:
    """Run the sweep and write ``results.csv`` and ``best.yaml``.

    Returns:
        The best trial's row.
    Raises:
        RunError, SettingsError: What the user has to put right, or no trial finished.
    """
    _check(settings)
    output_dir = anchor(settings.output_dir, settings.storage_path)
    first_fault((*settings.train_jsonl, *settings.val_jsonl))
    refuse_other_family(settings)
    make_folder(output_dir)
    warn_about_idle_flags(settings)
    write_json(output_dir / "settings.json", settings.model_dump(mode="json"))
    write_json(output_dir / "provenance.json", provenance())
    num_workers = max(1, count_workers(settings.num_workers)[1])
    with ray_session(output_dir / "ray.log", num_workers):
        data = training_data(settings, output_dir, use_ray=True)
        results = _tune(settings, output_dir, data, num_workers)
        rows = [_row(result, settings) for result in results]
    finished = [row for row in rows if row[settings.metric] is not None]
    if not finished:
        first = next((str(result.error).strip().splitlines()[-1] for result in results if result.error), "no metric")
        raise RunError(f"no trial finished: {first}; Ray's log: {output_dir / 'ray.log'}")
    sign = 1 if settings.metric_mode == "min" else -1
    finished.sort(key=lambda row: sign * row[settings.metric])
    unfinished = [row for row in rows if row[settings.metric] is None]
    _write_csv(output_dir / "results.csv", [*finished, *unfinished])
    _write_best(output_dir / "best.yaml", settings, finished[0])
    console.print(
        f"sweep: {len(rows)} trials; best {settings.metric} {finished[0][settings.metric]:.4f} with", markup=False
    )
    console.print(f"  {', '.join(f'{name} {finished[0][name]}' for name in swept(settings))}", markup=False)
    console.print(f"results.csv and best.yaml in {output_dir}", markup=False)
    return finished[0]


def _check(settings: Any) -> None:
    task, _, metric = settings.metric.partition("/")
    if task not in TASKS or metric not in TASKS[task].metrics:
        known = ", ".join(f"{name}/{item}" for name, entry in TASKS.items() for item in entry.metrics)
        raise SettingsError(f"--metric {settings.metric}: not one of {known}")
    if settings.tuning == "full":
        raise SettingsError("--tuning full: a sweep is over LoRA ranks, which full tuning does not have")
    if not settings.val_jsonl:
        raise SettingsError("--val_jsonl: a sweep needs validation data to decide by")


def swept(settings: Any) -> tuple[str, ...]:
    """Flags of which a sweep has several choices."""
    return tuple(name for name in ("task_weights", "lora_r") if name in type(settings).model_fields)


def trial_settings(settings: Any, choice: dict[str, Any], trial_dir: Path) -> TrainSettings:
    """Settings of the training run of one trial."""
    values = {name: value for name, value in dict(settings).items() if name in settings.trains.model_fields}
    return settings.trains(**{**values, **choice, "output_dir": str(trial_dir), "storage_path": "", "overwrite": True})


def _tune(settings: Any, output_dir: Path, data: Data, num_workers: int) -> Any:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    def trial(choice: dict[str, Any]) -> None:
        from ray.tune.integration.ray_train import TuneReportCallback

        trial_dir = output_dir / "trials" / tune.get_context().get_trial_id()
        trial_dir.mkdir(parents=True, exist_ok=True)
        run = trial_settings(settings, choice, trial_dir)
        on_workers(run, trial_dir, data, (num_workers, num_workers), callbacks=[TuneReportCallback()])

    class Show(tune.Callback):
        def __init__(self, bar: Any, total: int) -> None:
            self.bar, self.total, self.done = bar, total, 0

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.done += 1
            self.bar.update(self.done, self.total)

    resources = ray.cluster_resources()
    room = int(resources.get("GPU", 0) or resources.get("CPU", 1) - 1) // num_workers
    concurrent = settings.max_concurrent_trials or max(1, room)
    grid = settings.num_trials == 0
    choose = tune.grid_search if grid else tune.choice
    space = {name: choose(list(getattr(settings, name))) for name in swept(settings)}
    num_trials = settings.num_trials or math.prod(len(getattr(settings, name)) for name in swept(settings))
    with progress_bar("trials") as bar:
        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": DRIVER_CPUS}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=settings.metric,
                mode=settings.metric_mode,
                num_samples=settings.num_trials or 1,
                max_concurrent_trials=concurrent,
                scheduler=ASHAScheduler(
                    time_attr="step", max_t=max(settings.max_steps, 10**6), grace_period=settings.grace_steps
                ),
            ),
            run_config=tune.RunConfig(
                name=f"sweep-{os.getpid()}",
                storage_path=str(output_dir / "ray"),
                verbose=0,
                callbacks=[Show(bar, num_trials)],
            ),
        )
        return tuner.fit()


def _row(result: Any, settings: Any) -> dict[str, Any]:
    """One trial as a line of results.csv."""
    metrics, choice = result.metrics or {}, dict(result.config or {})
    if "task_weights" in choice:
        choice["task_weights"] = ",".join(f"{name}={weight:g}" for name, weight in choice["task_weights"].items())
    row = {"trial": metrics.get("trial_id"), **choice}
    row |= {"step": metrics.get("step"), "sec": metrics.get("time_total_s")}
    names = [f"{name}/{item}" for name, task in TASKS.items() for item in task.metrics]
    row |= {name: metrics.get(name) for name in names if name in metrics or name == settings.metric}
    return row | {"error": str(result.error).strip().splitlines()[-1] if result.error else ""}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def _write_best(path: Path, settings: Any, best: dict[str, Any]) -> None:
    """The winner as a file that the recipe's training job takes as --config."""
    values = {
        name: getattr(settings, name)
        for name in settings.trains.model_fields
        if name in settings.model_fields_set and name not in {*swept(settings), "output_dir", "overwrite"}
    }
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    values |= {name: best[name] for name in swept(settings)}
    values["output_dir"] = str(path.parent / "best")
    value, job = f"{best[settings.metric]:.4f}", f"train_{settings.recipe}"
    head = f"# best of the sweep by {settings.metric} ({value}), for {job} --config\n"
    write_atomically(path, (head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)).encode())
