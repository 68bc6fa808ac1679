"""A SALMONN out of its parts, in a folder that is named after them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from voxray.models.salmonn.folder import write_folder
from voxray.models.salmonn.prompts import read_prompts


def assemble_salmonn(folder: Path, *, checkpoint: str = "", prompts: str = "", end_sym: str = "", **parts: str) -> str:
    """Write a folder that names the parts (see ``folder.write_folder``) below another one.

    Other parts, another checkpoint or other prompts make another folder: what was trained on a base, or answered by it,
    never finds another one in its place.

    Args:
        parts: ``whisper``, ``beats`` and ``llm``.
    Returns:
        The folder, for ``--model_id``.
    Raises:
        RunError: A part cannot be read.
        SettingsError: The text that ends an answer is several tokens.
    """
    given: dict[str, Any] = dict(parts)
    read = []
    if checkpoint:
        given["checkpoint"] = checkpoint
        read.append(hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest())
    if prompts:
        given["prompts"] = prompts
        read.append(read_prompts(prompts).fingerprint)
    if end_sym:
        given["end_sym"] = end_sym
    digest = hashlib.sha256(json.dumps([given, read]).encode()).hexdigest()
    base = folder / f"model-{digest[:8]}"
    write_folder(base, **given)
    return str(base)
