"""Every training recipe by the class of its settings."""

from collections.abc import Callable
from typing import Any

from voxray.config.salmonn import SalmonnSettings
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings, TrainSettings, WhisperSettings
from voxray.core.errors import SettingsError
from voxray.models.registry import get_family
from voxray.recipes import asr_adapter, multitask, salmonn, text, whisper

RECIPES: dict[type[TrainSettings], Callable[..., dict[str, Any]]] = {
    TextSettings: text.train,
    AsrAdapterSettings: asr_adapter.train,
    MultitaskSettings: multitask.train,
    WhisperSettings: whisper.train,
    SalmonnSettings: salmonn.train,
}
"""Every training job's recipe, by the class of its settings."""


def refuse_other_family(settings: TrainSettings) -> None:
    """Refuse a base that the job does not train.

    Raises:
        SettingsError: With the job that does.
    """
    found = get_family(settings.model_id)
    if found.name != settings.family:
        raise SettingsError(
            f"--model_id {settings.model_id}: a {found.name} model, and this job trains {settings.family}; "
            f"jobs/{found.job}.py trains it"
        )
