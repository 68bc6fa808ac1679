"""Settings of jobs/evaluate.py and jobs/infer.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from voxray.config.engine_flags import REFUSED, EngineFlags
from voxray.config.flag_groups import (
    SALMONN_PARTS,
    CommaNumbers,
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
from voxray.config.flags import Flag
from voxray.config.parse import DEMO_ASSETS, Settings, convert
from voxray.config.salmonn_yaml import evaluator_flags
from voxray.config.task_flags import ContextFlags, RecordedTaskFlags
from voxray.core.languages import language_code
from voxray.core.tasks import TASKS


def _check_mode(value: str) -> str:
    kind, _, task = value.partition("_")
    if value and (kind not in ("submission", "valid") or task not in TASKS):
        raise ValueError(f"must be submission_ or valid_ with one of {', '.join(TASKS)}, such as valid_asr")
    return value


def _parse_num_models(value: Any) -> Any:
    message = "must be a whole number, or a range such as 1:4"
    if actor_range := parse_range(value, message):
        return actor_range
    if isinstance(value, bool) or not str(value).isdecimal():
        raise ValueError(message)
    return int(value)


MAX_LORA_SCALE = 2.0


class SamplingFlags(Settings):
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1
    """Beams of the beam search; 1 decodes greedily."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 always takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling, with --temperature: sample from the most likely tokens that together reach this probability; 1
    samples from all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of sampling."""

    @model_validator(mode="after")
    def _beams_or_temperature(self) -> "SamplingFlags":
        if self.num_beams > 1 and self.temperature:
            raise ValueError("--num_beams and --temperature: give one of them")
        if self.top_p < 1 and not self.temperature:
            raise ValueError(f"--top_p {self.top_p:g}: needs --temperature above 0")
        return self


class LoraDirFlags(ModelFlags):
    lora_dir: Annotated[str, Flag(("adapter_path",), path="model")] = ""
    """Adapter, checkpoint or run folder to load onto the base; empty uses the base alone."""


class AdapterFlags(LoraDirFlags, TrimFlags):
    """An adapter, and the prompt format it was trained with."""


class DecodeFlags(Settings):
    merge_adapter: bool = False
    """Add the LoRA of the adapter to the weights of the base before anything is answered. A token then takes as little
    computation as with the base alone. Answers may differ where two tokens are nearly equally likely."""
    static_cache: bool = False
    """Store keys and values in memory of fixed size, so that decoding a token is the same computation every time: one
    CUDA graph on a GPU, code compiled by torch.compile on a CPU, which takes a minute or more at the start. Answers may
    differ where two tokens are nearly equally likely. Whisper's long recordings and rows with times do not use it."""

    @model_validator(mode="after")
    def _can_decode(self) -> "DecodeFlags":
        searches = {"num_beams": 1, "temperature": 0.0}
        hint = {"num_beams": " (--mode searches with 4 beams)"} if getattr(self, "mode", "") else {}
        for flag, excluded in (("merge_adapter", {"compiled": ""}), ("static_cache", searches)):
            for name, value in {"quantize": "none", **excluded}.items():
                if getattr(self, flag) and getattr(self, name, value) != value:
                    raise ValueError(f"--{flag}: not with --{name}{hint.get(name, '')}")
        return self


class SalmonnBaseFlags(SalmonnPartsFlags, LoraDirFlags):
    """An assembled SALMONN base, which can also load a checkpoint of SALMONN's own trainer."""

    lora_dir: Annotated[str, Flag(("adapter_path", "ckpt"), path="model")] = ""
    """Adapter, checkpoint or run folder to load onto the base; empty uses the base alone. For an assembled base also a
    SALMONN checkpoint (.pth)."""

    @model_validator(mode="after")
    def _one_base(self) -> "SalmonnBaseFlags":
        part_flags = [f"--{name}" for name in (*SALMONN_PARTS, "end_sym", "prompts") if name in self.model_fields_set]
        if part_flags and self.missing_parts:
            raise ValueError(f"{part_flags[0]}: needs {', '.join(self.missing_parts)} as well")
        if part_flags and "model_id" in self.model_fields_set:
            raise ValueError(f"--model_id and {part_flags[0]}: give the folder, or its parts")
        return self


class SalmonnPromptFlags(SalmonnBaseFlags, AdapterFlags):
    """A SALMONN base with an adapter and prompts."""

    prompts: Annotated[str, Flag(("prompt_path", "test_prompt_path"), path="input")] = ""
    """YAML or JSON file of prompts by task, for an assembled base; the first prompt of each task is used."""


class EvaluateSettings(
    OutputFlags,
    SalmonnPromptFlags,
    DecodeFlags,
    CompiledFlags,
    EvaluationDataFlags,
    SamplingFlags,
    ScoreFlags,
    SharedFeatureFlags,
    PlacementFlags,
    RecordedTaskFlags,
    ContextFlags,
    EngineFlags,
):
    url_flags: ClassVar[tuple[str, ...]] = ("output_dir", "storage_path", "features_dir")
    task_folders: ClassVar[tuple[str, ...]] = ("lora_dir", "score_only")
    score_only: Annotated[str, Flag(path="input"), Field(validate_default=True)] = ""
    """Score existing predictions without loading a model: an evaluation folder, or a JSONL file with id, task,
    reference or references, and prediction per row (optionally language, speaker and other metadata). Rows that name no
    language have that of --language."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output")] = "runs/evaluate"
    """Folder for the predictions and metrics.json."""
    per_device_bsz: Annotated[
        int, Flag(("batch_size", "per_device_eval_batch_size", "batch_size_eval")), Field(ge=1)
    ] = 4
    """Rows that one model generates together."""
    gen_max_new_tokens: Annotated[int, Flag(("max_new_tokens", "eval_max_new_tokens")), Field(ge=1)] = 256
    """Maximum length of an answer in tokens."""
    num_models: Annotated[int | str, Flag(("num_workers",)), convert(_parse_num_models)] = 0
    """Ray Data actors, each with its own model: a number, or a range lowest:highest such as 1:4; 0 uses one per GPU, or
    one per two CPUs."""
    gpus_per_model: Annotated[float, Field(ge=0)] = 0.0
    """GPUs per model, such as 0.5 to place two models on one GPU; 0 gives each model one GPU, or its share."""
    lora_scale: Annotated[CommaNumbers, Field(min_length=1)] = (1.0,)
    """Share of what the LoRA of the adapter adds to the weights: 0 gives the base, 1 what was trained. With several,
    such as 0,0.25,0.5,0.75,1, the rows are evaluated at each of them, and a table shows the headline metric of each
    manifest: what the adapter gains on new data and loses on old."""
    perplexity: Literal["none", "answers", "all"] = "answers"
    """Tasks whose reference answers get loss and perplexity: answers is all tasks but transcription, all is every task.
    It costs about as much per row as the prompt's forward pass."""
    check_batch_invariance: Annotated[int, Field(ge=0)] = 0
    """Answer this many rows again, one at a time, and report those whose text differs."""
    retry_failed: bool = False
    """When started again on the same folder, also retry the parts with failed rows. By default failed rows stay in
    quarantine.jsonl and only missing parts are answered."""
    audio_prefix: Annotated[str, Flag(("prefix",), path="input")] = ""
    """Folder to which audio paths in SALMONN's annotation files are relative; empty reads the paths unchanged."""
    mode: Annotated[str, AfterValidator(_check_mode)] = ""
    """Evaluate one task as SALMONN's evaluator does, by default with 4 beams and at most 200 new tokens: valid_asr,
    valid_aac and so on, or submission_asr, submission_aac and so on, which also accept annotation files without texts.
    The answers are also written to valid.csv or submission.csv, as testset_id and lower-case text, one line per id.
    Without --val_jsonl and without a model it answers the demo's held-out rows."""

    @classmethod
    def translate_yaml(
        cls, loaded: dict[Any, Any], path: Path, flags: Mapping[str, Any]
    ) -> tuple[dict[Any, Any], list[str]]:
        """Also read the nested YAML files of SALMONN's evaluator."""
        return evaluator_flags(loaded, path, str(flags.get("mode") or loaded.get("mode") or ""))

    @field_validator("score_only")
    @classmethod
    def _has_rows(cls, value: str, info: ValidationInfo) -> str:
        """A field validator, because model validators do not run when another field is invalid."""
        if not value and not info.data.get("val_jsonl", True):
            raise ValueError("give --val_jsonl, manifests to evaluate on, or predictions to score")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> "EvaluateSettings":
        if self.score_only and self.val_jsonl:
            raise ValueError("--val_jsonl and --score_only: give one of them")
        if self.score_only and (self.context or self.no_context):
            raise ValueError("--context, --no_context: they are for --val_jsonl; --score_only answers nothing")
        if self.compiled and self.store == "encoder":
            raise ValueError("--compiled and --store encoder: give one of them; stored outputs need no encoder")
        if self.gpus_per_model > 1 and self.gpus_per_model % 1:
            raise ValueError(f"--gpus_per_model {self.gpus_per_model:g}: a fraction of one GPU, or whole ones")
        if wrong := [scale for scale in self.lora_scale if not 0 <= scale <= MAX_LORA_SCALE]:
            raise ValueError(f"--lora_scale {wrong[0]:g}: must be between 0 and {MAX_LORA_SCALE:g}")
        if self.lora_scale != (1.0,) and not (self.lora_dir and self.val_jsonl):
            raise ValueError("--lora_scale: needs --lora_dir and --val_jsonl")
        if len(set(self.lora_scale)) < len(self.lora_scale) or (self.lora_scale[1:] and self.mode):
            raise ValueError("--lora_scale: takes each value once, and a single one with --mode")
        if self.check_batch_invariance and self.temperature:
            raise ValueError("--check_batch_invariance: answers that are drawn with --temperature always differ")
        return self

    @model_validator(mode="before")
    @classmethod
    def _mode_defaults_to_demo(cls, values: Any) -> Any:
        sources = {"val_jsonl", "score_only", *SALMONN_PARTS}
        if isinstance(values, dict) and values.get("mode") and not sources & set(values):
            held_out = [str(DEMO_ASSETS / "speech" / f"{task}.val.jsonl") for task in ("asr", "sqa", "tqa")]
            model = {} if values.get("server") else {"model_id": str(DEMO_ASSETS / "voxtral-tiny")}
            return {**model, **values, "val_jsonl": held_out}
        return values

    @model_validator(mode="before")
    @classmethod
    def _mode_defaults(cls, values: Any) -> Any:
        """SALMONN's evaluator searches with four beams, for at most 200 tokens. Engines without beams do not."""
        if not (isinstance(values, dict) and values.get("mode")):
            return values
        refused = REFUSED.get("server" if values.get("server") else str(values.get("engine")), ())
        beams = {} if values.get("temperature") or "num_beams" in refused else {"num_beams": 4}
        return {"gen_max_new_tokens": 200, **beams, **values}


class InferSettings(AdapterFlags, DecodeFlags, SamplingFlags, RecordedTaskFlags, ContextFlags, EngineFlags):
    task_folders: ClassVar[tuple[str, ...]] = ("lora_dir", "output_dir")
    audio_path: Annotated[str, Flag(path="input")] = ""
    """An audio file, or a folder of them, to transcribe or to answer --question about."""
    question: str = ""
    """Question about the audio; without it the audio is transcribed. Without audio it is a text question."""
    language: Annotated[str, Flag(("language_abbr",)), AfterValidator(language_code)] = ""
    """Language of the audio, as a code such as ko or as an English name; empty lets the model detect it, if it can.
    Rows of a manifest that name a language keep it."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """What to do with the audio of --audio_path if there is no --question."""
    target_language: Annotated[str, AfterValidator(language_code)] = "en"
    """Language to translate into, with --task translate, as a code or as an English name. Whisper translates into
    English only."""
    initial_prompt: str = ""
    """Text before all transcripts, such as names or the previous sentence, where the prompt of the model has a place
    for it."""
    jsonl: Annotated[str, Flag(("test_jsonl", "val_jsonl"), path="input")] = ""
    """Manifest of rows to answer."""
    output_path: Annotated[str, Flag(path="output")] = ""
    """JSONL file to also write the answers to; they are always printed."""
    pseudo_labels: Annotated[str, Flag(path="output")] = ""
    """Manifest to write with the answered rows and the answers as their labels, for training, such as with
    --replay_jsonl. Empty answers and those that are cut off are left out."""
    json_lines: Annotated[bool, Flag(("json",))] = False
    """Print the answers as JSON lines instead of text."""
    output_dir: Annotated[str, Flag(("lora_run",), path="model")] = ""
    """Run folder of a training job; its final adapter is loaded, or its newest checkpoint if there is none."""
    max_new_tokens: Annotated[int, Flag(("gen_max_new_tokens",)), Field(ge=1)] = 256
    """Maximum length of an answer in tokens."""
    lora_scale: Annotated[float, Field(ge=0, le=MAX_LORA_SCALE)] = 1.0
    """Share of what the LoRA of the adapter adds to the weights: 0 gives the base, 1 what was trained."""
    batch_size: Annotated[int, Flag(("per_device_bsz", "ppl_batch")), Field(ge=1)] = 8
    """Rows generated together."""
    preview_rows: Annotated[int, Flag(("num_preview",)), Field(ge=0)] = 0
    """Answer only the first this many rows of --jsonl; 0 answers all."""
    max_len: Annotated[int, Field(ge=1)] = 1280
    """Maximum length of a row in tokens; longer rows are reported and skipped, never truncated."""

    @model_validator(mode="after")
    def _one_input(self) -> "InferSettings":
        if self.audio_path and self.jsonl:
            raise ValueError("--audio_path and --jsonl: give one of them")
        if self.question and self.jsonl:
            raise ValueError("--question and --jsonl: give one of them; the rows of a manifest hold their questions")
        if self.initial_prompt and (self.context or self.no_context):
            raise ValueError("--initial_prompt: not with --context or --no_context")
        if self.task == "translate" and (self.jsonl or self.question or not self.audio_path or self.server):
            raise ValueError("--task translate: is for --audio_path, without --question and --server")
        if "target_language" in self.model_fields_set and self.task != "translate":
            raise ValueError("--target_language: needs --task translate")
        if self.server and self.output_dir:
            raise ValueError("--server: not with --output_dir, because the server loads its model by itself")
        return self
