"""Settings of jobs/export.py."""

from typing import Annotated, Literal

from pydantic import Field

from voxray.config.flags import Flag
from voxray.config.parse import Settings


class ExportSettings(Settings):
    lora_dir: Annotated[str, Flag(("adapter_path", "lora_run"), path="model"), Field(min_length=1)]
    """Adapter, checkpoint or run folder to export."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output"), Field(min_length=1)] = "runs/export"
    """Folder to write the model to; it must be new or empty, unless --overwrite is set."""
    storage_path: str = ""
    """Absolute path of a folder that outlives the cluster, such as a shared mount; submitted jobs with relative output
    paths need it."""
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = ""
    """Base model: a folder on disk or a hub id; by default the one recorded in the adapter."""
    format: Literal["transformers", "mistral", "official"] = "transformers"
    """What to write: transformers is a complete model that transformers or voxray loads; mistral, for Voxtral, is
    Mistral's own format, which vLLM loads; official, for SALMONN, is a checkpoint of the trained weights for SALMONN's
    own code."""
    merge: Literal["all", "projector"] = "all"
    """What to merge into the base's weights: the whole adapter, or only its projector part. The rest is then written to
    the subfolder `adapter`, as an adapter for the new base."""
    scale: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Share of what the LoRA of the adapter adds to the weights; 0.75 keeps more of the base than 1, what was
    trained. `evaluate --lora_scale` measures which share is best."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """Data type of the written weights; base is the data type of the base model's files."""
    overwrite: bool = False
    """Replace a model that an earlier export wrote to --output_dir."""
