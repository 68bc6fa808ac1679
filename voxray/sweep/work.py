"""A sweep at work: which trials are to run, with which feature sets, and what is said when one ends.

Whoever runs the trials (Ray Tune; a test) is handed a ``Queue`` and need not know why they are in it.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from voxray.config.flag_groups import SALMONN_PARTS, FeatureFlags, TrimFlags, VariantFlags
from voxray.config.parse import with_absolute_inputs
from voxray.config.search_space import Choice, choice_key, described
from voxray.config.train import TrainSettings
from voxray.config.tune import trial_values
from voxray.core.console import console, progress_bar
from voxray.core.errors import RunError, SettingsError
from voxray.core.manifest import require_usable_row
from voxray.features.reader import Features
from voxray.features.shards import TASK_CODES
from voxray.metrics.names import validation_metrics
from voxray.recipes.registry import refuse_other_family
from voxray.recipes.training_data import TrainingData, training_data
from voxray.sweep.queue import Queue
from voxray.sweep.results import ranked, top_trials
from voxray.sweep.search import Search
from voxray.sweep.trials import Trial, new_trial, read_trials, with_outcome

OF_FEATURES = {
    *(*FeatureFlags.model_fields, *VariantFlags.model_fields, *TrimFlags.model_fields),
    *("model_id", "train_jsonl", "bf16"),
}
"""Flags whose trials need feature shards of their own."""

RunTrials = Callable[[Queue, Sequence[Trial] | None], None]
"""Runs all trials of a queue. The second argument is trials whose validations weak ones are measured by besides those
of the queue; None lets all run to their end."""


class Sweep:
    """A sweep and its trials.

    Args:
        settings: Of the sweep; for SALMONN with the base put together.
        output_dir: Its folder; trials in it are gone on with.
        run: Who runs the trials.
    Raises:
        RunError, SettingsError: The data cannot be used, or never gives the metric.
    """

    def __init__(self, settings: Any, output_dir: Path, run: RunTrials) -> None:
        self._settings, self._output_dir, self._run = settings, output_dir, run
        self._trials = {trial.number: trial for trial in read_trials(output_dir)}
        self._swept_features = sorted(OF_FEATURES & set(settings.domains))
        self._data: dict[str, TrainingData] = {}
        self._make_features()

    def _make_features(self) -> None:
        """Make what trials train on before they take the CPUs: for all choices of the flags that features depend on.

        Where those are drawn from ranges, nobody knows yet what is needed; a choice that cannot be had is left to fail
        as a trial.
        """
        domains = [self._settings.domains[name] for name in self._swept_features]
        if not domains:
            self._data_of(self._settings, use_ray=True)
        elif math.prod(domain.size for domain in domains) <= (self._settings.num_trials or math.inf):
            for values in itertools.product(*(domain.all() for domain in domains)):
                choice = dict(zip(self._swept_features, values, strict=True))
                with suppress(RunError, SettingsError):
                    self._prepare(new_trial(self._output_dir, 0, choice), use_ray=True)
        for data in self._data.values():
            refuse_missing_metric(self._settings.metric, data)

    def search(self) -> None:
        """Run the trials that the space asks for and that are not over."""
        settings, mine = self._settings, self._of_search()
        known = [(trial.choice, trial.value(settings.metric)) for trial in mine]
        search = Search(settings.domains, settings.method, seed=settings.seed, mode=settings.mode, known=known)
        size = math.prod(domain.size for domain in settings.domains.values())
        total = max(len(mine), int(min(settings.num_trials or math.inf, size)))

        def more() -> Trial | None:
            choice = search.ask() if len(self._of_search()) < total else None
            return self._new(choice) if choice is not None else None

        waiting = [trial for trial in mine if trial.state in {"running", "failed"}]
        over = [trial for trial in mine if trial not in waiting]
        if mine:
            console.print(f"going on: {len(over)} trial(s) are over, {len(waiting)} go on or are tried again")
        self._work(
            "trials", waiting, more, over, total, lambda trial: search.tell(trial.choice, trial.value(settings.metric))
        )

    def repeat(self) -> None:
        """Train the best choices again with other seeds, every one of them to its end."""
        settings, wanted = self._settings, list[Trial]()
        ordered = ranked(self._of_search(), settings.metric, settings.mode)
        known = {(trial.repeats, trial.choice["seed"]): trial for trial in self._trials.values() if trial.repeats}
        for seed in range(settings.seed + 1, settings.seed + settings.seeds + 1):
            for first in top_trials(ordered, settings.metric, settings.top_k):
                mine = known.get((first.number, seed))
                wanted.append(mine or self._new({**first.choice, "seed": seed}, first.number))
        waiting = [trial for trial in wanted if trial.state in {"running", "failed"}]
        self._work("repeats", waiting, lambda: None, None, len(wanted))

    def _work(
        self,
        title: str,
        waiting: list[Trial],
        more: Callable[[], Trial | None],
        over: Sequence[Trial] | None,
        total: int,
        note: Callable[[Trial], Any] = lambda trial: None,
    ) -> None:
        """Run trials, with a bar over all of the kind and a line for each that ends."""
        left = {trial.number for trial in waiting}
        with progress_bar(title) as bar:

            def on_end(trial: Trial) -> None:
                trial = self._trials[trial.number] = with_outcome(trial)
                note(trial)
                left.discard(trial.number)
                bar.say(told(trial, self._settings.metric))
                same_kind = [each for each in self._trials.values() if bool(each.repeats) == bool(trial.repeats)]
                bar.update(sum(each.state != "running" and each.number not in left for each in same_kind), total)

            self._run(Queue(waiting, more, self._prepare, on_end), over)

    def _of_search(self) -> list[Trial]:
        return [trial for trial in self._trials.values() if not trial.repeats]

    def _new(self, choice: Choice, repeats: int = 0) -> Trial:
        trial = new_trial(self._output_dir, max(self._trials, default=0) + 1, choice, repeats)
        self._trials[trial.number] = trial
        return trial

    def _prepare(self, trial: Trial, *, use_ray: bool = False) -> TrainingData:
        """The trial's feature sets; a combination that cannot be trained is refused before any process starts.

        Args:
            use_ray: Make them by Ray Data, which has CPUs only as long as no trial runs; else in this process.
        Raises:
            RunError, SettingsError: Why.
        """
        run = trial_settings(self._settings, trial.choice, trial.folder)
        if "train_jsonl" in trial.choice:
            require_usable_row(run.train_jsonl)
        if "model_id" in trial.choice:
            refuse_other_family(run)
        return self._data_of(run, use_ray=use_ray)

    def _data_of(self, run: Any, *, use_ray: bool) -> TrainingData:
        """Feature sets of a trial, made once for all that need the same."""
        key = choice_key({name: getattr(run, name) for name in self._swept_features})
        if key not in self._data:
            run = run.model_copy(update={"storage_path": self._settings.storage_path})
            self._data[key] = training_data(run, self._output_dir, use_ray=use_ray)
        return self._data[key]


def refuse_missing_metric(metric: str, data: TrainingData) -> None:
    """
    Raises:
        SettingsError: Validating these rows never gives the metric.
    """
    codes = set(Features(data.validation).task.tolist())
    known = validation_metrics([name for name, code in TASK_CODES.items() if code in codes])
    if metric not in known:
        raise SettingsError(f"--metric {metric}: validation has {', '.join(known)}")


def trial_settings(settings: Any, choice: Choice, trial_dir: Path) -> TrainSettings:
    """Settings of the training run of one trial.

    Raises:
        SettingsError: The training job refuses the combination.
    """
    values = trial_values(settings, choice)
    if values.get("model_id"):  # a SALMONN that was put together is a folder by now
        values = {name: value for name, value in values.items() if name not in {*SALMONN_PARTS, "end_sym"}}
    own = {"output_dir": str(trial_dir), "storage_path": "", "overwrite": True}
    try:
        return with_absolute_inputs(settings.trains(**{**values, **own}))
    except ValidationError as error:
        reasons = dict.fromkeys(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise SettingsError("; ".join(reasons)) from None


def told(trial: Trial, metric: str) -> str:
    """A line on a trial that is over."""
    value = trial.value(metric)
    figure = f"no {metric}" if value is None else f"{metric} {value:.4f} at step {trial.metrics['step']}"
    ending = "" if trial.state == "done" else f"; {trial.fate}"
    return f"trial {trial.number}: {figure} with {described(trial.choice)}{ending}"
