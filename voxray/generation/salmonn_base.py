"""Assemble the base model of an evaluation from the parts of a SALMONN that the settings name."""

from pathlib import Path
from typing import Any, TypeVar

from voxray.config.evaluate import SalmonnBaseFlags
from voxray.core.console import console
from voxray.models.salmonn.assemble import assemble_salmonn

SalmonnFlagsT = TypeVar("SalmonnFlagsT", bound=SalmonnBaseFlags)


def assemble_base(settings: SalmonnFlagsT, folder: Path) -> SalmonnFlagsT:
    """Assemble a SALMONN below a folder if the settings name its parts.

    Returns:
        The settings with the assembled base as ``model_id``. A checkpoint of SALMONN's trainer becomes part of it.
    Raises:
        RunError, SettingsError: See ``assemble_salmonn``.
    """
    if not settings.whisper_path:
        return settings
    update: dict[str, Any] = {}
    checkpoint = ""
    if Path(settings.lora_dir).is_file():
        checkpoint, update["lora_dir"] = str(Path(settings.lora_dir).absolute()), ""
    elif not settings.lora_dir:
        console.print("warning: no --ckpt: the layers between the encoders and the language model are new and random")
    update["model_id"] = assemble_salmonn(
        folder,
        whisper=settings.whisper_path,
        beats=settings.beats_path,
        llm=settings.llama_path,
        checkpoint=checkpoint,
        prompts=getattr(settings, "prompts", ""),
        end_sym=settings.end_sym if "end_sym" in settings.model_fields_set else "",
    )
    return settings.model_copy(update=update)
