"""Settings of jobs/export.py."""

from typing import Annotated, Literal

from pydantic import Field

from voxray.config.parse import Flag, Settings


class ExportSettings(Settings):
    lora_dir: Annotated[str, Flag(("adapter_path", "lora_run"), path="model"), Field(min_length=1)]
    """Adapter, checkpoint or run folder to export."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output"), Field(min_length=1)] = "runs/export"
    """Folder to write the model to; it must be new or empty, unless --overwrite is given."""
    storage_path: str = ""
    """Absolute folder that outlives the cluster, a shared mount; relative outputs of submitted jobs need it."""
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = ""
    """Base model: a folder on disk or a hub id; by default the one that the adapter names."""
    format: Literal["transformers", "official"] = "transformers"
    """What is written: a whole model that transformers or voxray loads, or, of SALMONN, what was trained, as a
    checkpoint for SALMONN's own code."""
    merge: Literal["all", "projector"] = "all"
    """What is added into the base's weights: all of the adapter, or only its part in the projector; the rest is then
    written beside it, as an adapter on the new base in `adapter`."""
    dtype: Literal["base", "float32", "bfloat16", "float16"] = "base"
    """Type of the weights written; base is that of the base model's files."""
    overwrite: bool = False
    """Replace a model that an earlier export wrote to --output_dir."""
