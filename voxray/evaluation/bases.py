"""The base of an evaluation that names the parts of a SALMONN in the place of a folder."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from voxray.config.evaluate import SalmonnBaseFlags
from voxray.models.salmonn.folder import write_folder
from voxray.models.salmonn.prompts import read_prompts
from voxray.terminal import console

Flags = TypeVar("Flags", bound=SalmonnBaseFlags)


def with_base(settings: Flags, folder: Path) -> Flags:
    """Put a SALMONN together below a folder, where the settings name its parts.

    Its own folder is named after all that it is made of, so that what was answered by another one is not gone on with.

    Returns:
        The settings with the base as their model; a checkpoint of SALMONN's trainer is a part of it then.
    Raises:
        RunError: A part cannot be read.
        SettingsError: The text that ends an answer is several tokens.
    """
    if not settings.whisper_path:
        return settings
    parts: dict[str, Any] = {name: getattr(settings, f"{name}_path") for name in ("whisper", "beats")}
    parts["llm"] = settings.llama_path
    made_of, changed = [], {}
    if prompts := getattr(settings, "prompts", ""):
        parts["prompts"] = prompts
        made_of.append(read_prompts(prompts).fingerprint)
    if Path(settings.lora_dir).is_file():
        parts["checkpoint"], changed["lora_dir"] = str(Path(settings.lora_dir).absolute()), ""
        made_of.append(hashlib.sha256(Path(settings.lora_dir).read_bytes()).hexdigest())
    elif not settings.lora_dir:
        console.print("warning: no --ckpt: what stands between the encoders and the language model is new, at random")
    if "end_sym" in settings.model_fields_set:
        parts["end_sym"] = settings.end_sym
    digest = hashlib.sha256(json.dumps([parts, made_of]).encode()).hexdigest()
    base = folder / f"model-{digest[:8]}"
    write_folder(base, **parts)
    return settings.model_copy(update={**changed, "model_id": str(base)})
