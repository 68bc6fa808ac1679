"""What an engine is, and the engine that runs models of transformers in this process."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from voxray.features.reader import FeatureRow
from voxray.generation.generate import Completion, generate
from voxray.generation.likelihood import reference_losses
from voxray.generation.model import InferenceConfig
from voxray.models.front_end import FrontEnd
from voxray.models.registry import get_family


class InferenceEngine(Protocol):
    """Answers rows. Prompts and features come from the front end, whatever the engine."""

    def generate(self, rows: Sequence[FeatureRow], batch_size: int) -> Iterator[tuple[int, Completion | Exception]]:
        """Yield (index of the row, answer, or why it has none), in any order.

        Raises:
            RunError: The engine cannot answer any row.
            Exception: It cannot answer these rows; some of them alone may have answers (see ``bisect_failures``).
        """
        ...


class TransformersEngine:
    """A model of transformers."""

    def __init__(self, model: Any, front_end: FrontEnd, config: InferenceConfig) -> None:
        self.model, self.front_end, self.config = model, front_end, config
        self.family = get_family(config.model_id)

    def generate(self, rows: Sequence[FeatureRow], batch_size: int) -> Iterator[tuple[int, Completion]]:
        options = {"sampling": self.config.sampling, "static_cache": self.config.static_cache}
        return generate(self.model, self.family, self.front_end, rows, batch_size=batch_size, **options)

    def reference_losses(self, rows: Sequence[FeatureRow]) -> list[float]:
        """-ln p of every row's reference answer (see ``likelihood``).

        Args:
            rows: One batch.
        """
        return reference_losses(self.model, self.family, self.front_end, rows)
