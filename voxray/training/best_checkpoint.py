"""The best validation of a run, and early stopping."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from voxray.metrics.names import higher_is_better


@dataclass
class BestCheckpoint:
    """The best validation so far. Its state goes into every checkpoint.

    Attributes:
        metric: Name of the metric that decides, such as ``asr/cer_nospace``.
        patience: Number of consecutive validations without an improvement after which the run stops; 0 never stops.
        threshold: Smallest difference that counts as an improvement.
        best_step, best_value: Step and value of the best validation; step 0 before the first validation.
        num_bad_validations: Consecutive validations without an improvement.
        last_step, last: Step and metrics of the last validation.
        rows: Fingerprint of the validation rows and of how they are answered (see ``ValidationRows.fingerprint``).
            Values on other rows cannot be compared.
        first_step: Earlier validations were on other rows.
    """

    metric: str
    patience: int = 0
    threshold: float = 0.0
    best_step: int = 0
    best_value: float = math.nan
    num_bad_validations: int = 0
    last_step: int = 0
    last: dict[str, float] = field(default_factory=dict)
    rows: str = ""
    first_step: int = 0

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Record a validation.

        Returns:
            Whether it is the best so far. A validation whose value is missing or not finite never is.
        """
        self.last_step, self.last = step, dict(metrics)
        if not metrics:
            return False
        value = metrics.get(self.metric, math.nan)
        gain = value - self.best_value if higher_is_better(self.metric) else self.best_value - value
        if math.isfinite(value) and (not self.best_step or gain > self.threshold):
            self.best_step, self.best_value, self.num_bad_validations = step, value, 0
            return True
        self.num_bad_validations += 1
        return False

    @property
    def should_stop(self) -> bool:
        """Whether early stopping ends the run now."""
        return 0 < self.patience <= self.num_bad_validations

    def state(self) -> dict[str, Any]:
        """State for the checkpoint. ``best_value`` is None before the first validation, because JSON has no NaN."""
        return {
            "metric": self.metric,
            "best_step": self.best_step,
            "last_step": self.last_step,
            "last": dict(self.last),
            "best_value": self.best_value if self.best_step else None,
            "waited": self.num_bad_validations,
            "rows": self.rows,
            "first_step": self.first_step,
        }

    def load(self, state: Mapping[str, Any], step: int) -> bool:
        """Restore the state from a checkpoint. The best value is dropped if the checkpoint used another metric.

        Nothing is restored if the checkpoint's validations were on other rows. Checkpoints of earlier versions do not
        say which rows they used; theirs count as the same.

        Args:
            step: Step of the checkpoint.
        Returns:
            Whether validations were dropped, because they were on other rows.
        """
        if not state:
            return False
        if state.get("rows", self.rows) != self.rows:
            self.first_step = step
            return bool(state["last_step"])
        self.first_step = int(state.get("first_step", 0))
        self.last_step, self.last = int(state["last_step"]), dict(state["last"])
        if state["metric"] == self.metric and state["best_value"] is not None:
            self.best_step, self.best_value = int(state["best_step"]), float(state["best_value"])
            self.num_bad_validations = int(state["waited"])
        return False
