"""Records whether a model was trained without the audio tokens of padding; it must be used as it was trained.

An adapter folder stores this in ``voxray.json``, a model exported from such an adapter in its config.json.
``voxray.json`` also has the folder of the base, if PEFT's configuration names the base by its hub id.
"""

import json
from pathlib import Path
from typing import Any

from voxray.core.errors import RunError
from voxray.models.hf_files import read_config

RECORD, KEY, BASE_PATH = "voxray.json", "trim_audio_tokens", "base_path"


def trims_audio(model_id: str, flag: bool) -> bool:
    """Whether prompts for a base omit the audio tokens of padding: if ``flag`` is set or it was trained that way."""
    return flag or read_config(model_id).get(KEY) is True


def set_trim_audio(model: Any, trimmed: bool | None) -> None:
    """Store in a model's configuration how it is trained; None for training without audio."""
    setattr(model.config, KEY, trimmed)


def write_record(model: Any, folder: Path, base_path: str = "") -> None:
    """Write ``voxray.json`` into an adapter folder, if there is anything to record.

    Args:
        model: Its audio trimming is recorded if ``set_trim_audio`` was called for it.
        base_path: Folder of the base, if the adapter's configuration has another name for it.
    """
    record = {KEY: getattr(model.config, KEY)} if hasattr(model.config, KEY) else {}
    record |= {BASE_PATH: base_path} if base_path else {}
    if record:
        (folder / RECORD).write_text(json.dumps(record) + "\n")


def read_base_path(folder: Path) -> str:
    """Folder of the base that an adapter was trained on; "" if it is not recorded, or does not exist here."""
    try:
        path = json.loads((folder / RECORD).read_text()).get(BASE_PATH)
    except (OSError, ValueError, AttributeError):
        return ""
    return path if isinstance(path, str) and Path(path).is_dir() else ""


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
        record = json.loads(path.read_text())
        trimmed = record.get(KEY, False) if BASE_PATH in record else record[KEY]
        if trimmed is not None and not isinstance(trimmed, bool):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"{path}: cannot read how the adapter was trained") from None
    return trimmed
