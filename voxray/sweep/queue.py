"""The queue of trials that a sweep still has to run."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from voxray.core.errors import RunError, SettingsError
from voxray.recipes.training_data import TrainingData
from voxray.sweep.trials import ERROR_FILE, RESULT_FILE, Trial, end_trial, write_trial


class Queue:
    """Trials to run. Every state change of a trial is written to disk before it takes effect.

    Args:
        pending: Existing trials to run first, in order.
        create: Creates the next trial after those; returns None when there is none.
        prepare: Returns a trial's training data; raises RunError or SettingsError if it cannot be trained.
        on_end: Called for every trial that has ended, including those that cannot be trained.
    """

    def __init__(
        self,
        pending: Iterable[Trial],
        create: Callable[[], Trial | None],
        prepare: Callable[[Trial], TrainingData],
        on_end: Callable[[Trial], Any],
    ) -> None:
        self._pending, self._create, self._prepare, self._on_end = iter(list(pending)), create, prepare, on_end
        self._running: dict[int, tuple[Trial, float]] = {}

    def next(self) -> tuple[Trial, TrainingData] | None:
        """Start the next trial; returns it with its training data, or None if there is none left."""
        while trial := next(self._pending, None) or self._create():
            trial = replace(trial, state="running", reason="")
            trial.folder.mkdir(parents=True, exist_ok=True)
            for name in (ERROR_FILE, RESULT_FILE):
                (trial.folder / name).unlink(missing_ok=True)
            write_trial(trial)
            try:
                data = self._prepare(trial)
            except (RunError, SettingsError) as error:
                self._finish(replace(trial, state="failed", reason=str(error)))
                continue
            self._running[trial.number] = (trial, time.monotonic())
            return trial, data
        return None

    def end(self, number: int, *, died: bool) -> None:
        """Record that a trial has ended; ``died`` is whether its process crashed."""
        trial, start = self._running.pop(number)
        self._finish(end_trial(trial, died=died, sec=time.monotonic() - start))

    def _finish(self, trial: Trial) -> None:
        write_trial(trial)
        self._on_end(trial)
