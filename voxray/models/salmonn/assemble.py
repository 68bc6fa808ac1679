"""Write a SALMONN folder that names its parts, under a name derived from them."""

from pathlib import Path
from typing import Any

from voxray.core.content_hash import combined_hash
from voxray.core.storage import checksum
from voxray.models.salmonn.folder import write_folder
from voxray.models.salmonn.prompts import read_prompts


def assemble_salmonn(folder: Path, *, checkpoint: str = "", prompts: str = "", end_sym: str = "", **parts: str) -> str:
    """Write a folder that names the parts (see ``folder.write_folder``), below another folder.

    Other parts, another checkpoint or other prompts give another folder name, so that adapters and answers of a base
    are never used with a different one.

    Args:
        folder: Folder in which the new folder is written.
        checkpoint: Official checkpoint (.pth), if any.
        prompts: File of prompts by task, if any.
        end_sym: Text that ends an answer, if not the default.
        parts: Paths of ``whisper``, ``beats`` and ``llm``.
    Returns:
        The folder, for ``--model_id``.
    Raises:
        RunError: A part cannot be read.
        SettingsError: ``end_sym`` is several tokens.
    """
    options: dict[str, Any] = dict(parts)
    contents = []
    if checkpoint:
        options["checkpoint"] = checkpoint
        contents.append(checksum(Path(checkpoint)))
    if prompts:
        options["prompts"] = prompts
        contents.append(read_prompts(prompts).fingerprint)
    if end_sym:
        options["end_sym"] = end_sym
    digest = combined_hash([options, contents])
    base = folder / f"model-{digest[:8]}"
    write_folder(base, **options)
    return str(base)
