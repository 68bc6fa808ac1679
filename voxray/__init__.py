"""Jobs on Ray that fine-tune and evaluate audio language models."""

from voxray.api import EvaluationResult, Model, TrainingResult, evaluate, infer, load_model, train
from voxray.core.errors import BadRow, RunError, SettingsError, Stopped
from voxray.core.version import __version__

__all__ = [
    "BadRow",
    "EvaluationResult",
    "Model",
    "RunError",
    "SettingsError",
    "Stopped",
    "TrainingResult",
    "__version__",
    "evaluate",
    "infer",
    "load_model",
    "train",
]
