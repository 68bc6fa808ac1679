"""The base of an evaluation that names the parts of a SALMONN in the place of a folder."""

from pathlib import Path
from typing import Any, TypeVar

from voxray.config.evaluate import SalmonnBaseFlags
from voxray.core.console import console
from voxray.models.salmonn.assemble import assemble_salmonn

SalmonnFlagsT = TypeVar("SalmonnFlagsT", bound=SalmonnBaseFlags)


def assemble_base(settings: SalmonnFlagsT, folder: Path) -> SalmonnFlagsT:
    """Put a SALMONN together below a folder, where the settings name its parts.

    Returns:
        The settings with the base as their model; a checkpoint of SALMONN's trainer is a part of it then.
    Raises:
        RunError, SettingsError: See ``assemble_salmonn``.
    """
    if not settings.whisper_path:
        return settings
    changed: dict[str, Any] = {}
    checkpoint = ""
    if Path(settings.lora_dir).is_file():
        checkpoint, changed["lora_dir"] = str(Path(settings.lora_dir).absolute()), ""
    elif not settings.lora_dir:
        console.print("warning: no --ckpt: what stands between the encoders and the language model is new, at random")
    changed["model_id"] = assemble_salmonn(
        folder,
        whisper=settings.whisper_path,
        beats=settings.beats_path,
        llm=settings.llama_path,
        checkpoint=checkpoint,
        prompts=getattr(settings, "prompts", ""),
        end_sym=settings.end_sym if "end_sym" in settings.model_fields_set else "",
    )
    return settings.model_copy(update=changed)
