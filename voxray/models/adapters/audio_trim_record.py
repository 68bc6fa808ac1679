"""Whether audio tokens that stand for padding are left out, and how it is remembered: a model must be asked as it was
trained.

An adapter's folder says it in ``voxray.json``, a model that was exported from such an adapter in its config.json.
"""

import json
from pathlib import Path
from typing import Any

from voxray.core.errors import RunError
from voxray.models.hf_files import read_config

RECORD, KEY = "voxray.json", "trim_audio_tokens"


def trims_audio(model_id: str, flag: bool) -> bool:
    """Whether prompts for a base leave those tokens out: if asked to, or if the base was trained that way."""
    return flag or read_config(model_id).get(KEY) is True


def note_trimming(model: Any, trimmed: bool | None) -> None:
    """Let what is saved of a model say how it was trained; None if its training had no audio."""
    setattr(model.config, KEY, trimmed)


def write_record(model: Any, folder: Path) -> None:
    """Write what ``note_trimming`` noted, if it did, beside an adapter."""
    if hasattr(model.config, KEY):
        (folder / RECORD).write_text(json.dumps({KEY: getattr(model.config, KEY)}) + "\n")


def read_record(folder: Path) -> bool | None:
    """How an adapter was trained; None if without audio. One without a record is older than the choice.

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
