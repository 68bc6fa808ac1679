"""Settings of jobs/evaluate.py and jobs/infer.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from voxray.config.flag_groups import (
    SALMONN_PARTS,
    CompiledFlags,
    EvaluationDataFlags,
    ModelFlags,
    OutputFlags,
    PlacementFlags,
    SalmonnPartsFlags,
    ScoreFlags,
    SharedFeatureFlags,
    TrimFlags,
    parse_range,
)
from voxray.config.parse import DEMO_ASSETS, Flag, Settings
from voxray.config.salmonn_yaml import evaluator_flags
from voxray.core.tasks import TASKS


def _known_mode(value: str) -> str:
    kind, _, task = value.partition("_")
    if value and (kind not in ("submission", "valid") or task not in TASKS):
        raise ValueError(f"must be submission_ or valid_ with one of {', '.join(TASKS)}, such as valid_asr")
    return value


def _models(value: Any) -> Any:
    message = "must be a whole number, or a range such as 1:4"
    if found := parse_range(value, message):
        return found
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError(message)
    return int(value)


class SearchFlags(Settings):
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1
    """Beginnings of an answer that are followed at a time; 1 takes the likeliest token at every step."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 takes the most likely token each time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With --temperature: draw among the likeliest tokens that have this probability together; 1 draws among all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of sampling."""

    @model_validator(mode="after")
    def _one_search(self) -> "SearchFlags":
        if self.num_beams > 1 and self.temperature:
            raise ValueError("--num_beams and --temperature: give one of them")
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"--top_p {self.top_p:g}: needs --temperature above 0")
        return self


class LoraDirFlags(ModelFlags):
    lora_dir: Annotated[str, Flag(("adapter_path",), path="model")] = ""
    """Adapter, checkpoint or run folder to load onto the base; without it the base is used as it is."""


class AdapterFlags(LoraDirFlags, TrimFlags):
    """An adapter, and prompts as it was trained on."""


class SalmonnBaseFlags(SalmonnPartsFlags, LoraDirFlags):
    """A SALMONN that is put together, with a checkpoint of its own trainer as one more part."""

    lora_dir: Annotated[str, Flag(("adapter_path", "ckpt"), path="model")] = ""
    """Adapter, checkpoint or run folder to load onto the base; without it the base is used as it is. For a base that is
    put together also a SALMONN checkpoint (.pth)."""

    @model_validator(mode="after")
    def _one_base(self) -> "SalmonnBaseFlags":
        given = [f"--{name}" for name in (*SALMONN_PARTS, "end_sym", "prompts") if name in self.model_fields_set]
        if given and self.missing_parts:
            raise ValueError(f"{given[0]}: needs {', '.join(self.missing_parts)} as well")
        if given and "model_id" in self.model_fields_set:
            raise ValueError(f"--model_id and {given[0]}: give the folder, or its parts")
        return self


class AskedSalmonnFlags(SalmonnBaseFlags, AdapterFlags):
    """The same, to be asked."""

    prompts: Annotated[str, Flag(("prompt_path", "test_prompt_path"), path="input")] = ""
    """YAML or JSON file of prompts by task, for a base that is put together; the first of each task is asked."""


class EvaluateSettings(
    OutputFlags,
    AskedSalmonnFlags,
    CompiledFlags,
    EvaluationDataFlags,
    SearchFlags,
    ScoreFlags,
    SharedFeatureFlags,
    PlacementFlags,
):
    score_only: Annotated[str, Flag(path="input"), Field(validate_default=True)] = ""
    """Score what is there, without a model: the folder of an evaluation, or a JSONL file of {id, task, reference or
    references, prediction}, and language, speaker and so on where they are known."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output")] = "runs/evaluate"
    """Folder for predictions and metrics.json."""
    per_device_bsz: Annotated[
        int, Flag(("batch_size", "per_device_eval_batch_size", "batch_size_eval")), Field(ge=1)
    ] = 4
    """Rows generated together by one model."""
    gen_max_new_tokens: Annotated[int, Flag(("max_new_tokens", "eval_max_new_tokens")), Field(ge=1)] = 256
    """Longest answer in tokens."""
    num_models: Annotated[int | str, Flag(("num_workers",)), BeforeValidator(_models)] = 0
    """Ray Data actors, each with a model, or fewest:most of them, such as 1:4; 0 takes one per GPU, or one per two
    CPUs."""
    gpus_per_model: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that each of them takes, such as 0.5 for two on one GPU; 0 gives each one, or its share."""
    perplexity: Literal["none", "answers", "all"] = "answers"
    """Whose reference answers the model weighs, for loss and perplexity: of all tasks but transcription, of all, or of
    none. Each costs about as much as reading its prompt."""
    check_batch_invariance: Annotated[int, Field(ge=0)] = 0
    """Answer so many rows once more, each by itself, and report those whose text differs."""
    retry_failed: bool = False
    """Started again on the same folder: answer parts with rows that could not be answered once more. Without it these
    rows stay in quarantine.jsonl, and only what is missing is answered."""
    audio_prefix: Annotated[str, Flag(("prefix",), path="input")] = ""
    """Folder below which the audio of SALMONN's annotation files stands; without it they are read as they say."""
    mode: Annotated[str, AfterValidator(_known_mode)] = ""
    """Only one task, with 4 beams and 200 tokens at most unless told otherwise: valid_asr, valid_aac and so on, or
    submission_asr, submission_aac and so on, for annotation files without texts too. The answers also stand in
    valid.csv or submission.csv, as testset_id and lower-case text, each id once. Without --val_jsonl and without a
    model it answers the demo's held-out rows."""

    @classmethod
    def of_file(cls, loaded: dict[Any, Any], path: Path, given: Mapping[str, Any]) -> tuple[dict[Any, Any], list[str]]:
        """Keys and values of a YAML file, and what is wrong with it; the nested files of SALMONN's evaluator too."""
        return evaluator_flags(loaded, path, str(given.get("mode") or loaded.get("mode") or ""))

    @field_validator("score_only")
    @classmethod
    def _something_to_score(cls, value: str, info: ValidationInfo) -> str:
        """Of the field, not of the whole: so it is said beside all other faults."""
        if not value and not info.data.get("val_jsonl", True):
            raise ValueError("give --val_jsonl, manifests to evaluate on, or predictions to score")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "EvaluateSettings":
        if self.score_only and self.val_jsonl:
            raise ValueError("--val_jsonl and --score_only: give one of them")
        if self.compiled and self.store == "encoder":
            raise ValueError("--compiled and --store encoder: give one of them; stored outputs are heard by nothing")
        if self.gpus_per_model > 1 and self.gpus_per_model % 1:
            raise ValueError(f"--gpus_per_model {self.gpus_per_model:g}: a fraction of one GPU, or whole ones")
        if self.check_batch_invariance and self.temperature:
            raise ValueError("--check_batch_invariance: answers that are drawn with --temperature always differ")
        return self

    @model_validator(mode="before")
    @classmethod
    def _mode_alone(cls, values: Any) -> Any:
        elsewhere = {"val_jsonl", "score_only", *SALMONN_PARTS}
        if isinstance(values, dict) and values.get("mode") and not elsewhere & set(values):
            held_out = [str(DEMO_ASSETS / "speech" / f"{task}.val.jsonl") for task in ("asr", "sqa", "tqa")]
            return {"model_id": str(DEMO_ASSETS / "voxtral-tiny"), **values, "val_jsonl": held_out}
        return values

    @model_validator(mode="before")
    @classmethod
    def _modes_search_as_before(cls, values: Any) -> Any:
        """SALMONN's evaluator looks for answers with four beams, 200 tokens at most."""
        if not (isinstance(values, dict) and values.get("mode")):
            return values
        beams = {} if values.get("temperature") else {"num_beams": 4}
        return {"gen_max_new_tokens": 200, **beams, **values}


class InferSettings(AdapterFlags, SearchFlags):
    audio_path: Annotated[str, Flag(path="input")] = ""
    """An audio file, or a folder of them, to transcribe, or to answer --question about."""
    question: str = ""
    """What to ask about the audio; without it the audio is transcribed. Alone it is a question in text."""
    language: Annotated[str, Flag(("language_abbr",))] = ""
    """Language of the audio as a two-letter code; empty lets the model find out."""
    jsonl: Annotated[str, Flag(("test_jsonl", "val_jsonl"), path="input")] = ""
    """Manifest of rows to answer."""
    output_path: Annotated[str, Flag(path="output")] = ""
    """JSONL file for the answers; they are printed in any case."""
    json_lines: Annotated[bool, Flag(("json",))] = False
    """Print answers as JSON lines instead of text."""
    output_dir: Annotated[str, Flag(("lora_run",), path="model")] = ""
    """Run folder of a training job: its final adapter, else its newest checkpoint, is used."""
    max_new_tokens: Annotated[int, Flag(("gen_max_new_tokens",)), Field(ge=1)] = 256
    """Longest answer in tokens."""
    batch_size: Annotated[int, Flag(("per_device_bsz", "ppl_batch")), Field(ge=1)] = 8
    """Rows generated together."""
    preview_rows: Annotated[int, Flag(("num_preview",)), Field(ge=0)] = 0
    """Answer only the first so many rows of --jsonl; 0 answers all."""
    max_len: Annotated[int, Field(ge=1)] = 1280
    """Longest row in tokens; longer rows are reported and skipped, never cut."""

    @model_validator(mode="after")
    def _one_input(self) -> "InferSettings":
        if self.audio_path and self.jsonl:
            raise ValueError("--audio_path and --jsonl: give one of them")
        if self.question and self.jsonl:
            raise ValueError("--question and --jsonl: give one of them; the rows of a manifest hold their questions")
        return self
