"""Every model family by the `model_type` of its configuration."""

from collections.abc import Callable, Mapping

from voxray.core.errors import SettingsError
from voxray.models.hf_files import read_config
from voxray.models.interface import ModelFamily


def _voxtral() -> ModelFamily:
    from voxray.models.voxtral.family import Voxtral

    return Voxtral()


def _whisper() -> ModelFamily:
    from voxray.models.whisper.family import Whisper

    return Whisper()


def _salmonn() -> ModelFamily:
    from voxray.models.salmonn.family import Salmonn

    return Salmonn()


FAMILIES: Mapping[str, Callable[[], ModelFamily]] = {"voxtral": _voxtral, "whisper": _whisper, "salmonn": _salmonn}
"""Every family by its model type; none is imported before it is asked for, because processes start by the dozen."""


def get_family(model_id: str) -> ModelFamily:
    """Find the family of a base model from its configuration.

    Raises:
        RunError: The model's configuration cannot be had.
        SettingsError: The model is of no family that voxray knows.
    """
    kind = str(read_config(model_id).get("model_type"))
    if kind not in FAMILIES:
        raise SettingsError(f"--model_id {model_id}: model type {kind!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]()
