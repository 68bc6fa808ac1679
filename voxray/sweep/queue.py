"""The trials that are still to run, one after the other, and what is noted when one ends."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from voxray.core.errors import RunError, SettingsError
from voxray.recipes.training_data import TrainingData
from voxray.sweep.trials import ERROR_FILE, RESULT_FILE, Trial, ended, write_trial


class Queue:
    """Trials to run; every change of one is on disk before anybody acts on it.

    Args:
        pending: Those that are known already, in their order.
        more: Makes the next one when those are used up; None ends it.
        prepare: Gives a trial's feature sets, or refuses it with a RunError or SettingsError.
        on_end: Is told of every trial that is over, refused ones too.
    """

    def __init__(
        self,
        pending: Iterable[Trial],
        more: Callable[[], Trial | None],
        prepare: Callable[[Trial], TrainingData],
        on_end: Callable[[Trial], Any],
    ) -> None:
        self._pending, self._more, self._prepare, self._on_end = iter(list(pending)), more, prepare, on_end
        self._running: dict[int, tuple[Trial, float]] = {}

    def next(self) -> tuple[Trial, TrainingData] | None:
        """The next trial, now running, and its feature sets; None when there is no other."""
        while trial := next(self._pending, None) or self._more():
            trial = replace(trial, state="running", reason="")
            trial.folder.mkdir(parents=True, exist_ok=True)
            for name in (ERROR_FILE, RESULT_FILE):
                (trial.folder / name).unlink(missing_ok=True)
            write_trial(trial)
            try:
                data = self._prepare(trial)
            except (RunError, SettingsError) as error:
                self._over(replace(trial, state="failed", reason=str(error)))
                continue
            self._running[trial.number] = (trial, time.monotonic())
            return trial, data
        return None

    def end(self, number: int, *, died: bool) -> None:
        """A trial is over, in whichever way; ``died`` if its process broke off."""
        trial, began = self._running.pop(number)
        self._over(ended(trial, died=died, sec=time.monotonic() - began))

    def _over(self, trial: Trial) -> None:
        write_trial(trial)
        self._on_end(trial)
