"""Settings of jobs/export.py."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from voxray.config.flags import Flag
from voxray.config.parse import CommaStrings, Settings


def _format(value: object) -> object:
    return "hf" if value == "transformers" else value  # its name in earlier versions


class ExportSettings(Settings):
    task_folders: ClassVar[tuple[str, ...]] = ("lora_dir", "evaluations")
    lora_dir: Annotated[str, Flag(("adapter_path", "lora_run"), path="model")] = ""
    """Adapter, checkpoint or run folder to export. Empty writes the base --model_id in another format."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output"), Field(min_length=1)] = "runs/export"
    """Folder to write the model to; it must be new or empty, unless --overwrite is set."""
    storage_path: str = ""
    """Absolute path of a folder that outlives the cluster, such as a shared mount; submitted jobs with relative output
    paths need it."""
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = ""
    """Base model: a folder on disk or a hub id; by default the one recorded in the adapter."""
    format: Annotated[Literal["hf", "mistral", "ct2", "official"], BeforeValidator(_format)] = "hf"
    """What to write: hf is a complete model that transformers, voxray and, for Whisper, vLLM load; mistral, for
    Voxtral, is Mistral's own format, which vLLM loads; ct2, for Whisper, is CTranslate2's format, which faster-whisper
    loads; official, for SALMONN, is a checkpoint of the trained weights for SALMONN's own code."""
    merge: Literal["all", "projector"] = "all"
    """What to merge into the base's weights: the whole adapter, or only its projector part. The rest is then written to
    the subfolder `adapter`, as an adapter for the new base."""
    scale: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Share of what the LoRA of the adapter adds to the weights; 0.75 keeps more of the base than 1, what was
    trained. `evaluate --lora_scale` measures which share is best."""
    dtype: Literal[
        "base", "float32", "bfloat16", "float16", "int8", "int8_float32", "int8_float16", "int8_bfloat16"
    ] = "base"
    """Data type of the written weights; base is the data type of the base model's files. Those with int8 are for
    --format ct2."""
    evaluations: Annotated[CommaStrings, Flag(path="model")] = ()
    """Folders of evaluations of the adapter or of its base, comma separated; their results go into the model card."""
    overwrite: bool = False
    """Replace a model that an earlier export wrote to --output_dir."""

    @model_validator(mode="after")
    def _has_input(self) -> "ExportSettings":
        if not (self.lora_dir or self.model_id):
            raise ValueError("--lora_dir: give an adapter, or a base with --model_id")
        return self
