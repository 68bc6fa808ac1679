"""Runs a sweep: decides which trials to run, computes their features and reports each trial that ends.

The trials themselves are run by Ray Tune, or by a test, which takes them from a ``Queue``.
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
from voxray.config.search_space import Choice, choice_key, format_choice
from voxray.config.train import TrainSettings
from voxray.config.tune import trial_values
from voxray.core.console import console, progress_bar
from voxray.core.errors import RunError, SettingsError
from voxray.core.manifest import require_usable_row
from voxray.features.reader import Features
from voxray.features.shards import TASK_CODES
from voxray.metrics.names import validation_metrics
from voxray.models.parts.arithmetic import with_default_dtype
from voxray.recipes.build_model import check_lora_targets
from voxray.recipes.run_context import RunContext, require_family
from voxray.recipes.training_data import TrainingData, training_data
from voxray.sweep.queue import Queue
from voxray.sweep.results import ranked, top_trials
from voxray.sweep.search import Search
from voxray.sweep.trials import Trial, new_trial, read_trials, with_outcome

FEATURE_FLAGS = {
    *(*FeatureFlags.model_fields, *VariantFlags.model_fields, *TrimFlags.model_fields),
    *("model_id", "train_jsonl", "bf16"),
}
"""Flags that change the feature shards, so that trials with other values need other shards."""

RunTrials = Callable[[Queue, Sequence[Trial] | None], None]
"""Runs all trials of a queue. The second argument is earlier trials whose validations the scheduler also compares with;
None turns early stopping off."""


class Sweep:
    """A sweep and its trials.

    Args:
        settings: Settings of the sweep; for SALMONN with an assembled base.
        output_dir: Folder of the sweep; trials in it are resumed.
        run: Runs the trials of a queue.
        has_bfloat16: Whether the GPUs compute in bfloat16.
    Raises:
        RunError, SettingsError: The data cannot be used, or validation on it does not compute the metric.
    """

    def __init__(self, settings: Any, output_dir: Path, run: RunTrials, *, has_bfloat16: bool = False) -> None:
        self._settings, self._output_dir, self._run = settings, output_dir, run
        self._has_bfloat16 = has_bfloat16
        self._trials = {trial.number: trial for trial in read_trials(output_dir)}
        self._swept_features = sorted(FEATURE_FLAGS & set(settings.domains))
        self._data: dict[str, TrainingData] = {}
        self._make_features()

    def _make_features(self) -> None:
        """Compute the features of all choices of feature flags, before the trials occupy the CPUs.

        Features of flags that are sampled from ranges are computed later, as the values are not known yet. An invalid
        choice is skipped here; its trial fails later.
        """
        domains = [self._settings.domains[name] for name in self._swept_features]
        if not domains:
            settings = with_default_dtype(self._settings, self._settings.model_id, has_bfloat16=self._has_bfloat16)
            self._training_data(settings, use_ray=True)
        elif math.prod(domain.size for domain in domains) <= (self._settings.num_trials or math.inf):
            for values in itertools.product(*(domain.all() for domain in domains)):
                choice = dict(zip(self._swept_features, values, strict=True))
                with suppress(RunError, SettingsError):
                    self._prepare(new_trial(self._output_dir, 0, choice), use_ray=True)
        for data in self._data.values():
            refuse_missing_metric(self._settings.metric, data)

    def search(self) -> None:
        """Run all trials of the search that have not ended yet."""
        settings, trials = self._settings, self._search_trials()
        known = [(trial.choice, trial.value(settings.metric)) for trial in trials]
        search = Search(settings.domains, settings.method, seed=settings.seed, mode=settings.mode, known=known)
        size = math.prod(domain.size for domain in settings.domains.values())
        total = max(len(trials), int(min(settings.num_trials or math.inf, size)))

        def create() -> Trial | None:
            choice = search.ask() if len(self._search_trials()) < total else None
            return self._new_trial(choice) if choice is not None else None

        pending = [trial for trial in trials if trial.state in {"running", "failed"}]
        ended = [trial for trial in trials if trial not in pending]
        if trials:
            console.print(f"going on: {len(ended)} trial(s) are over, {len(pending)} go on or are tried again")
        self._run_trials(
            "trials",
            pending,
            create,
            ended,
            total,
            lambda trial: search.tell(trial.choice, trial.value(settings.metric)),
        )

    def repeat(self) -> None:
        """Train the best choices again with other seeds, without early stopping."""
        settings, repeats = self._settings, list[Trial]()
        ordered = ranked(self._search_trials(), settings.metric, settings.mode)
        known = {(trial.repeats, trial.choice["seed"]): trial for trial in self._trials.values() if trial.repeats}
        for seed in range(settings.seed + 1, settings.seed + settings.seeds + 1):
            for first in top_trials(ordered, settings.metric, settings.top_k):
                repeat = known.get((first.number, seed))
                repeats.append(repeat or self._new_trial({**first.choice, "seed": seed}, first.number))
        pending = [trial for trial in repeats if trial.state in {"running", "failed"}]
        self._run_trials("repeats", pending, lambda: None, None, len(repeats))

    def _run_trials(
        self,
        title: str,
        pending: list[Trial],
        create: Callable[[], Trial | None],
        ended: Sequence[Trial] | None,
        total: int,
        on_result: Callable[[Trial], Any] = lambda trial: None,
    ) -> None:
        """Run trials, with a progress bar over all trials of their kind and a line for each one that ends."""
        open_numbers = {trial.number for trial in pending}
        with progress_bar(title) as bar:

            def on_end(trial: Trial) -> None:
                trial = self._trials[trial.number] = with_outcome(trial)
                on_result(trial)
                open_numbers.discard(trial.number)
                bar.say(trial_line(trial, self._settings.metric))
                same_kind = [other for other in self._trials.values() if bool(other.repeats) == bool(trial.repeats)]
                num_ended = sum(other.state != "running" and other.number not in open_numbers for other in same_kind)
                bar.update(num_ended, total)

            self._run(Queue(pending, create, self._prepare, on_end), ended)

    def _search_trials(self) -> list[Trial]:
        return [trial for trial in self._trials.values() if not trial.repeats]

    def _new_trial(self, choice: Choice, repeats: int = 0) -> Trial:
        trial = new_trial(self._output_dir, max(self._trials, default=0) + 1, choice, repeats)
        self._trials[trial.number] = trial
        return trial

    def _prepare(self, trial: Trial, *, use_ray: bool = False) -> TrainingData:
        """Check that a trial can be trained, and compute its features, before any process starts.

        Args:
            use_ray: Compute with Ray Data, which has CPUs only while no trial runs; else in this process.
        Raises:
            RunError, SettingsError: The trial cannot be trained.
        """
        run = trial_settings(self._settings, trial.choice, trial.folder, has_bfloat16=self._has_bfloat16)
        if "train_jsonl" in trial.choice:
            require_usable_row(run.train_jsonl)
        if "model_id" in trial.choice:
            require_family(run)
        check_lora_targets(RunContext.create(run, run_dir=self._output_dir))
        return self._training_data(run, use_ray=use_ray)

    def _training_data(self, run: Any, *, use_ray: bool) -> TrainingData:
        """Training data of a trial's settings, computed once for all trials that need the same features."""
        key = choice_key({name: getattr(run, name) for name in (*self._swept_features, "bf16")})
        if key not in self._data:
            run = run.model_copy(update={"storage_path": self._settings.storage_path})
            self._data[key] = training_data(RunContext.create(run, run_dir=self._output_dir), use_ray=use_ray)
        return self._data[key]


def refuse_missing_metric(metric: str, data: TrainingData) -> None:
    """Check that validation computes a metric.

    Raises:
        SettingsError: It does not, as the rows have other tasks.
    """
    codes = set(Features(data.validation).task.tolist())
    metrics = validation_metrics([name for name, code in TASK_CODES.items() if code in codes])
    if metric not in metrics:
        raise SettingsError(f"--metric {metric}: validation has {', '.join(metrics)}")


def trial_settings(settings: Any, choice: Choice, trial_dir: Path, *, has_bfloat16: bool = False) -> TrainSettings:
    """Settings of the training run of one trial.

    Args:
        has_bfloat16: Whether the GPUs compute in bfloat16.
    Raises:
        SettingsError: The training job does not accept the combination.
    """
    values = trial_values(settings, choice)
    if values.get("model_id"):  # an assembled SALMONN base is a folder by now
        values = {name: value for name, value in values.items() if name not in {*SALMONN_PARTS, "end_sym"}}
    own = {"output_dir": str(trial_dir), "storage_path": "", "overwrite": True}
    try:
        run = with_absolute_inputs(settings.trains(**{**values, **own}))
    except ValidationError as error:
        reasons = dict.fromkeys(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise SettingsError("; ".join(reasons)) from None
    return with_default_dtype(run, run.model_id, has_bfloat16=has_bfloat16)


def trial_line(trial: Trial, metric: str) -> str:
    """The line that is printed when a trial ends."""
    value = trial.value(metric)
    result = f"no {metric}" if value is None else f"{metric} {value:.4f} at step {trial.metrics['step']}"
    status = "" if trial.state == "done" else f"; {trial.status}"
    return f"trial {trial.number}: {result} with {format_choice(trial.choice)}{status}"
