"""Skips steps whose loss or gradients are not finite, and scales the loss of float16 runs.

A skipped step changes neither weights nor optimizer state, and is counted. The decision follows from the summed losses
and gradients, so every worker makes the same one.

float16 has no values below 6e-8, where many gradients are. So the loss is multiplied by a scale before the backward
pass, and the summed gradients are divided by it. The scale is a power of two, so dividing costs no precision. It is
halved when gradients overflow and doubled after ``GROWTH_STEPS`` good steps, as in torch.amp.GradScaler.
"""

import math
from dataclasses import dataclass, field
from typing import Any

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
SAVED = ("scale", "good_steps", "skipped", "bad_steps")
"""Attributes that go into every checkpoint."""


@dataclass
class LossScaler:
    """Loss scale and counts of skipped steps.

    Attributes:
        scale: Factor of the loss in the backward pass; 1 unless the run computes in float16.
        good_steps: Good steps since the scale last changed.
        skipped: Steps skipped so far.
        bad_steps: Consecutive skipped steps, without overflows that a smaller scale may prevent.
        nonfinite_rows: Rows of this worker whose loss was not finite in the last skipped step. Not saved.
    """

    scale: float = 1.0
    good_steps: int = 0
    skipped: int = 0
    bad_steps: int = 0
    nonfinite_rows: list[int] = field(default_factory=list)

    @classmethod
    def for_dtype(cls, *, fp16: bool) -> "LossScaler":
        return cls(scale=FIRST_SCALE if fp16 else 1.0)

    def check_step(self, loss: float, norm: float, *, fp16: bool) -> bool:
        """Record a step and return whether the optimizer may apply it.

        Args:
            loss: Loss of the step, without the scale.
            norm: Norm of all gradients.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.good_steps, self.bad_steps = self.good_steps + 1, 0
            if fp16 and self.good_steps >= GROWTH_STEPS:
                self.scale, self.good_steps = self.scale * 2, 0
            return True
        self.skipped += 1
        self.good_steps = 0
        if math.isfinite(loss) and self.scale > 1:
            self.scale /= 2
        else:
            self.bad_steps += 1
        return False

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SAVED}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint. Values that an older checkpoint lacks keep their defaults."""
        for name in SAVED:
            setattr(self, name, state.get(name, getattr(self, name)))
