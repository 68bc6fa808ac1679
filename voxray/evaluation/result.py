"""What an evaluation returns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of an evaluation.

    Attributes:
        metrics: {task: {metric: {"value", "n"}}}; metrics.json has more details.
        output_dir: Folder of the predictions, metrics.json and report.html.
    """

    metrics: dict[str, dict[str, dict[str, Any]]]
    output_dir: Path
