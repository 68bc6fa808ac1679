"""Which validation was the best so far, and whether it is time to stop: the state of early stopping."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from voxray.metrics.names import higher_is_better


@dataclass
class BestCheckpoint:
    """What a run's validations found; it goes into every checkpoint.

    Attributes:
        metric: Name of the metric that is watched, such as ``asr/cer_nospace``.
        patience: Stop after so many validations in a row without a better value; 0 never stops.
        threshold: How much better counts as better.
        best_step, best_value: Where the best value was; step 0 before the first validation.
        num_bad_validations: Validations in a row without a better value.
        last_step, last: The last validation.
    """

    metric: str
    patience: int = 0
    threshold: float = 0.0
    best_step: int = 0
    best_value: float = math.nan
    num_bad_validations: int = 0
    last_step: int = 0
    last: dict[str, float] = field(default_factory=dict)

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
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
            self.best_step, self.best_value, self.num_bad_validations = step, value, 0
            return True
        self.num_bad_validations += 1
        return False

    @property
    def should_stop(self) -> bool:
        """Whether early stopping ends the run here."""
        return 0 < self.patience <= self.num_bad_validations

    def state(self) -> dict[str, Any]:
        """For the checkpoint; ``None`` stands for no value yet, which JSON cannot say otherwise."""
        values = asdict(self)
        state = {name: values[name] for name in ("metric", "best_step", "last_step", "last")}
        best_value = self.best_value if self.best_step else None
        return {**state, "best_value": best_value, "waited": self.num_bad_validations}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; with another metric than its own the search for the best begins anew."""
        if not state:
            return
        self.last_step, self.last = int(state["last_step"]), dict(state["last"])
        if state["metric"] == self.metric and state["best_value"] is not None:
            self.best_step, self.best_value = int(state["best_step"]), float(state["best_value"])
            self.num_bad_validations = int(state["waited"])
