"""The contents of the models and files that a run or a sweep started from.

A path alone does not identify them, since a base or an adapter may be changed in place.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voxray.core.content_hash import combined_hash, path_hash
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import write_json

INPUTS = "inputs.json"
INPUT_FLAGS = ("model_id", "init_adapter", "prompts")
"""Flags whose content must stay while a run is resumed. Feature sets carry a fingerprint of their own."""


def input_hashes(settings: Any, *flags: str) -> dict[str, str]:
    """Hash of the content behind each of ``INPUT_FLAGS`` and of ``flags``, as far as the settings have a value for it.

    Args:
        settings: Settings with absolute paths.
        flags: Names of further flags with a path or several.
    Raises:
        RunError: A file cannot be read.
    """
    # not at the top: they import torch, which jobs that only score do not need
    from voxray.models.adapters.lora import find_adapter
    from voxray.models.registry import get_family

    hashes = {}
    for name in (*INPUT_FLAGS, *flags):
        value = getattr(settings, name, "")
        try:
            if name == "model_id":
                hashes[name] = get_family(value).content_hash(value)
            elif isinstance(value, tuple):
                hashes[name] = combined_hash(path_hash(Path(path)) for path in value)
            elif value and "://" not in value:
                is_folder = name == "init_adapter" and Path(value).is_dir()
                hashes[name] = path_hash(find_adapter(value, f"--{name}") if is_folder else Path(value))
        except OSError as error:
            raise RunError(f"--{name}: cannot read {error.filename}: {error.strerror}") from None
    return hashes


def refuse_changed_inputs(folder: Path, hashes: Mapping[str, str], what: str) -> None:
    """Compare contents with those that a folder was started with.

    Args:
        hashes: Result of ``input_hashes``.
        what: What the folder holds, for the message.
    Raises:
        SettingsError: The content behind a flag differs. Flags that the folder has no hash of are not compared, as in
            folders of earlier versions.
    """
    try:
        before = json.loads((folder / INPUTS).read_text(encoding="utf-8"))
        changed = [f"--{name}" for name, value in hashes.items() if before.get(name, value) != value]
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError, AttributeError):
        raise SettingsError(f"{folder / INPUTS}: damaged; delete it if base and adapters are unchanged") from None
    if changed:
        raise SettingsError(
            f"{folder} holds {what} with other contents of {' and '.join(changed)}; use --overwrite or another "
            "--output_dir"
        )


def write_inputs(folder: Path, hashes: Mapping[str, str]) -> None:
    """Record the contents that a folder is started with."""
    write_json(folder / INPUTS, dict(hashes))
