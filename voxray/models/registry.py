"""Model families by the ``model_type`` in config.json.

An installed package adds families with the entry point group ``voxray.families``: the name is the model type, and the
value a class or function without arguments that returns a ``ModelFamily``. The package has to be installed on every
machine of the cluster.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import entry_points
from typing import Any

from voxray.config.recipes import load_object
from voxray.core.errors import BadRow, SettingsError
from voxray.core.languages import check_language
from voxray.models.audio_lm.facts import FACTS
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import read_config
from voxray.models.interface import ModelFamily
from voxray.models.library_log import log_library_messages

ENTRY_POINTS = "voxray.families"
FAMILIES = {
    "voxtral": "voxray.models.voxtral.family:Voxtral",
    "whisper": "voxray.models.whisper.family:Whisper",
    "salmonn": "voxray.models.salmonn.family:Salmonn",
}
"""{model type: ``package.module:name``}. A family is imported on first use, because Ray starts many processes.

The other model types of ``audio_lm.facts.FACTS`` share the class ``audio_lm.family.AudioLm``.
"""


@cache
def families() -> Mapping[str, Callable[[], Any]]:
    """Loaders of the family classes, by model type. Installed packages cannot replace voxray's own families."""
    installed = {point.name: point.load for point in entry_points(group=ENTRY_POINTS)}
    own: dict[str, Callable[[], Any]] = {name: partial(load_object, path) for name, path in FAMILIES.items()}
    others = {name: partial(_load_audio_lm, name) for name in FACTS if name not in own}
    return installed | own | others


def _load_audio_lm(model_type: str) -> Callable[[], Any]:
    """A function that returns the family of a model type of ``audio_lm.facts.FACTS`` without a class of its own."""
    from voxray.models.audio_lm.family import AudioLm

    return partial(AudioLm, model_type)


def get_family(model_id: str) -> ModelFamily:
    """Find the family of a base model by its configuration.

    Raises:
        RunError: The model has no readable configuration.
        SettingsError: No family is registered for its model type.
    """
    log_library_messages()
    model_type = str(read_config(model_id).get("model_type"))
    if model_type not in families():
        raise SettingsError(f"--model_id {model_id}: model type {model_type!r} is not one of {', '.join(families())}")
    return families()[model_type]()()


def require_language(front_end: FrontEnd, language: str, model_id: str) -> None:
    """Check ``--language`` against the languages of a base.

    Raises:
        SettingsError: The base does not have it. The message lists those that it has.
    """
    try:
        check_language(language, front_end.languages, model_id)
    except BadRow as error:
        raise SettingsError(f"--language: {error}") from None
