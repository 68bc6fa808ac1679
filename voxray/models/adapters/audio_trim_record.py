"""Records whether a model was trained without the audio tokens of padding; it must be used as it was trained.

An adapter folder stores this in ``voxray.json``, a model exported from such an adapter in its config.json.
"""

import json
from pathlib import Path
from typing import Any

from voxray.core.errors import RunError
from voxray.models.hf_files import read_config

RECORD, KEY = "voxray.json", "trim_audio_tokens"


def trims_audio(model_id: str, flag: bool) -> bool:
    """Whether prompts for a base omit the audio tokens of padding: if ``flag`` is set or it was trained that way."""
    return flag or read_config(model_id).get(KEY) is True


def set_trim_audio(model: Any, trimmed: bool | None) -> None:
    """Store in a model's configuration how it is trained; None for training without audio."""
    setattr(model.config, KEY, trimmed)


def write_trim_record(model: Any, folder: Path) -> None:
    """Write ``voxray.json`` into an adapter folder, if ``set_trim_audio`` was called for the model."""
    if hasattr(model.config, KEY):
        (folder / RECORD).write_text(json.dumps({KEY: getattr(model.config, KEY)}) + "\n")


def read_trim_record(folder: Path) -> bool | None:
    """Read how an adapter was trained; None if without audio.

    An adapter without a record was trained by an older version, which never omitted audio tokens.

    Raises:
        RunError: The record cannot be read.
    """
    path = folder / RECORD
    if not path.exists():
        return False
    try:
        trimmed = json.loads(path.read_text())[KEY]
        if trimmed is not None and not isinstance(trimmed, bool):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{path}: cannot read how the adapter was trained") from None
    return trimmed
