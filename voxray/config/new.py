"""Settings of jobs/new.py: those of prepare, with other defaults, and the model to train."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from voxray.config.flags import Flag
from voxray.config.parse import InputFiles, convert
from voxray.config.prepare import PrepareSettings


def _one_folder(value: Any) -> str:
    words = (value,) if isinstance(value, str) else tuple(value)
    if len(words) != 1 or not str(words[0]).strip():
        raise ValueError("takes one folder")
    return str(words[0]).strip()


class NewSettings(PrepareSettings):
    project: Annotated[str, Flag(path="output"), convert(_one_folder)]
    """Folder to make: the word after `voxray new`."""
    input: Annotated[InputFiles, Flag(("data",), path="input"), Field(min_length=1)]
    """Corpora to read: tables, manifests or folders, comma separated."""
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = "openai/whisper-small"
    """Base model to train: hub id or local folder."""
    memory_gib: Annotated[float, Field(ge=0)] = 0.0
    """Memory of the GPU that will train, in GiB; 0 uses the memory of this machine."""
    train_output: Annotated[str, Flag(("out_train",), path="output")] = ""
    """Manifest to write with the training rows; by default data/train.jsonl in the new folder."""
    val_output: Annotated[str, Flag(("out_val",), path="output")] = ""
    """Manifest to write with the validation rows; by default data/val.jsonl in the new folder. They are those of
    the corpus's own validation split, or, if it has none, --val_share of its training rows."""
    test_output: Annotated[str, Flag(("out_test",), path="output")] = ""
    """Manifest to write with the rows of the corpus's own test split, if it has one; by default data/test.jsonl in the
    new folder. They are never trained on."""
    min_sec: Annotated[float, Field(ge=0)] = 0.3
    """Minimum length of a clip, in seconds; shorter ones are dropped."""
    max_sec: Annotated[float, Field(gt=0)] = 30.0
    """Maximum length of a clip, in seconds; longer ones are dropped."""

    @model_validator(mode="before")
    @classmethod
    def _outputs(cls, values: dict[str, Any]) -> dict[str, Any]:
        try:
            folder = Path(_one_folder(values["project"]))
        except (KeyError, ValueError, TypeError):
            return values  # the field's own validator reports it
        defaults = {f"{name}_output": str(folder / f"data/{name}.jsonl") for name in ("train", "val", "test")}
        return {**defaults, **values}
