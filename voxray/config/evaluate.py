"""Settings of jobs/evaluate.py and jobs/infer.py."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from voxray.config.groups import (
    EvaluationDataFlags,
    ModelFlags,
    OutputFlags,
    PlacementFlags,
    SharedFeatureFlags,
    TrimFlags,
)
from voxray.config.parse import DEMO_ASSETS, CommaStrings, Flag
from voxray.tasks import TASKS


def _known_mode(value: str) -> str:
    kind, _, task = value.partition("_")
    if value and (kind not in ("submission", "valid") or task not in TASKS):
        raise ValueError(f"must be submission_ or valid_ with one of {', '.join(TASKS)}, such as valid_asr")
    return value


class AdapterFlags(ModelFlags, TrimFlags):
    lora_dir: Annotated[str, Flag(("adapter_path",), path="model")] = ""
    """Adapter, checkpoint or run folder to load onto the base; without it the base is used as it is."""


class EvaluateSettings(OutputFlags, AdapterFlags, EvaluationDataFlags, SharedFeatureFlags, PlacementFlags):
    val_jsonl: Annotated[  # type: ignore[misc]
        CommaStrings, Flag(("jsonl", "test_jsonl"), path="input"), Field(min_length=1)
    ]
    """Manifests to evaluate on, comma separated."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output")] = "runs/evaluate"
    """Folder for predictions and metrics.json."""
    per_device_bsz: Annotated[
        int, Flag(("batch_size", "per_device_eval_batch_size", "batch_size_eval")), Field(ge=1)
    ] = 4
    """Rows generated together by one model."""
    gen_max_new_tokens: Annotated[int, Flag(("max_new_tokens", "eval_max_new_tokens")), Field(ge=1)] = 256
    """Longest answer in tokens."""
    num_models: Annotated[int, Flag(("num_workers",)), Field(ge=0)] = 0
    """Ray Data actors, each with a model; 0 takes one per GPU, or one per two CPUs."""
    mode: Annotated[str, AfterValidator(_known_mode)] = ""
    """Only one task: valid_asr, valid_aac and so on; submission_asr also writes submission.csv. Without --val_jsonl
    (the older evaluator read its manifests from a YAML file) it answers the demo's held-out rows with its model."""

    @model_validator(mode="before")
    @classmethod
    def _mode_alone(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mode") and "val_jsonl" not in values:
            held_out = [str(DEMO_ASSETS / "speech" / f"{task}.val.jsonl") for task in ("asr", "sqa", "tqa")]
            return {"model_id": str(DEMO_ASSETS / "voxtral-tiny"), **values, "val_jsonl": held_out}
        return values


class InferSettings(AdapterFlags):
    audio_path: Annotated[str, Flag(path="input")] = ""
    """One audio file to transcribe, or to answer --question about."""
    question: str = ""
    """What to ask about the audio; without it the audio is transcribed."""
    language: str = ""
    """Language of the audio as a two-letter code; empty lets the model find out."""
    jsonl: Annotated[str, Flag(("test_jsonl", "val_jsonl"), path="input")] = ""
    """Manifest of rows to answer."""
    output_path: Annotated[str, Flag(path="output")] = ""
    """JSONL file for the answers of --jsonl; they are printed in any case."""
    output_dir: Annotated[str, Flag(("lora_run",), path="model")] = ""
    """Run folder of a training job: its final adapter, else its newest checkpoint, is used."""
    max_new_tokens: Annotated[int, Flag(("gen_max_new_tokens",)), Field(ge=1)] = 256
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 takes the most likely token each time."""
    batch_size: Annotated[int, Flag(("per_device_bsz", "ppl_batch")), Field(ge=1)] = 8
    """Rows generated together."""
    preview_rows: Annotated[int, Flag(("num_preview",)), Field(ge=0)] = 0
    """Answer only the first so many rows of --jsonl; 0 answers all."""
    max_len: Annotated[int, Field(ge=1)] = 1280
    """Longest row in tokens; longer rows are reported and skipped, never cut."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of sampling."""

    @model_validator(mode="after")
    def _one_input(self) -> "InferSettings":
        if self.audio_path and self.jsonl:
            raise ValueError("--audio_path and --jsonl: give one of them")
        return self
