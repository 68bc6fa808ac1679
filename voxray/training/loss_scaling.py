"""What a run does about losses and gradients that are not finite numbers, and the loss scale of float16.

Such a step is skipped: weights and moments stay as they are, and the step is counted. The decision follows from the
summed gradients and losses, which are the same on every worker.

float16 holds nothing under 6e-8, where many gradients are, so its loss is multiplied before the backward pass and the
summed gradients are divided again. The factor is a power of two, so dividing costs no precision; it is halved when
gradients overflow and doubled after ``GROWTH_STEPS`` good steps, as in torch.amp.GradScaler.
"""

import math
from dataclasses import dataclass, field
from typing import Any

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000
SAVED = ("scale", "good_steps", "skipped", "bad_steps")


@dataclass
class LossScaler:
    """State that goes into every checkpoint.

    Attributes:
        scale: What the loss is multiplied with before the backward pass; 1 unless float16 computes.
        good_steps: Good steps since the scale last changed.
        skipped: Steps skipped so far.
        bad_steps: Steps skipped in a row up to now, overflows that a smaller scale may mend not counted.
        nonfinite_rows: Rows of this worker whose loss was not finite in the last skipped step; not part of the state.
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
        """Whether the optimizer may step; takes note of it either way.

        Args:
            loss: The step's loss, without the scale.
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
        """Go on from a checkpoint; what an older one does not have keeps its first value."""
        for name in SAVED:
            setattr(self, name, state.get(name, getattr(self, name)))
