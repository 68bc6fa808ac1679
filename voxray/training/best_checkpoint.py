"""Which validation was the best so far, and whether it is time to stop: the state of early stopping."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from voxray.metrics.names import higher_is_better


@dataclass
class Selection:
    """What a run's validations found; it goes into every checkpoint.

    Attributes:
        metric: Name of the metric that is watched, such as ``asr/cer_nospace``.
        patience: Stop after so many validations in a row without a better value; 0 never stops.
        threshold: How much better counts as better.
        best_step, best_value: Where the best value was; step 0 before the first validation.
        waited: Validations in a row without a better value.
        last_step, last: The last validation.
    """

    metric: str
    patience: int = 0
    threshold: float = 0.0
    best_step: int = 0
    best_value: float = math.nan
    waited: int = 0
    last_step: int = 0
    last: dict[str, float] = field(default_factory=dict)

    def take(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Note a validation.

        Returns:
            Whether it is the best so far. A value that is no number, or is missing, never is.
        """
        self.last_step, self.last = step, dict(metrics)
        if not metrics:
            return False
        value = metrics.get(self.metric, math.nan)
        gain = value - self.best_value if higher_is_better(self.metric) else self.best_value - value
        if math.isfinite(value) and (not self.best_step or gain > self.threshold):
            self.best_step, self.best_value, self.waited = step, value, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether early stopping ends the run here."""
        return 0 < self.patience <= self.waited

    def state(self) -> dict[str, Any]:
        """For the checkpoint; ``None`` stands for no value yet, which JSON cannot say otherwise."""
        found = {name: value for name, value in asdict(self).items() if name not in {"patience", "threshold"}}
        return {**found, "best_value": self.best_value if self.best_step else None}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; with another metric than its own the search for the best begins anew."""
        if not state:
            return
        self.last_step, self.last = int(state["last_step"]), dict(state["last"])
        if state["metric"] == self.metric and state["best_value"] is not None:
            self.best_step, self.best_value = int(state["best_step"]), float(state["best_value"])
            self.waited = int(state["waited"])
