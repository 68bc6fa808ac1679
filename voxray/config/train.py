"""Settings of the training jobs."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from voxray.config.flag_groups import (
    BatchingFlags,
    EvaluationDataFlags,
    LoraFlags,
    MaskFlags,
    ModelFlags,
    OptimizerFlags,
    OutputFlags,
    SharedFeatureFlags,
    StrategyFlags,
    TaskBatchingFlags,
    TaskWeights,
    TrimFlags,
    VariantFlags,
    WorkerFlags,
)
from voxray.config.parse import CommaStrings, Flag
from voxray.core.manifest import language_code
from voxray.metrics.names import validation_metrics


def known_metric(value: str) -> str:
    if value not in (known := validation_metrics()):
        raise ValueError(f"must be one of {', '.join(known)}")
    return value


WHISPER = "openai/whisper-small"


class TrainSettings(
    OutputFlags,
    ModelFlags,
    EvaluationDataFlags,
    LoraFlags,
    OptimizerFlags,
    BatchingFlags,
    WorkerFlags,
    StrategyFlags,
    SharedFeatureFlags,
):
    """What every training job takes."""

    family: ClassVar[str] = "voxtral"
    """Name of the model family that the job trains."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output"), Field(min_length=1)]  # type: ignore[misc]
    """Folder of the run; a relative one stands under --storage_path, or the current directory."""
    train_jsonl: Annotated[CommaStrings, Flag(path="input"), Field(min_length=1)]
    """Manifests to train on, comma separated; tasks may be mixed within and across files."""
    init_adapter: Annotated[str, Flag(path="input")] = ""
    """Start from the LoRA of an earlier run or stage: a run, adapter or checkpoint folder of the same rank and alpha.
    Parts that this job does not train stay as they are and are saved with the result."""
    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Validate every so many optimizer steps; 0 validates after each epoch."""
    eval_max_rows: Annotated[int, Field(ge=0)] = 200
    """Validation rows per task during training, the first ones of the files; 0 takes all."""
    eval_max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer generated during validation, in tokens."""
    preview_rows: Annotated[int, Flag(("num_preview",)), Field(ge=0, le=10_000)] = 2
    """Validation rows per task whose generated answers are shown at each validation; 0 shows none. Goes into
    previews.yaml of a new run, which may be edited while it trains."""
    save_steps: Annotated[int, Field(ge=1)] = 200
    """Write a checkpoint every so many optimizer steps; one is also written at the end of the run."""
    save_total_limit: Annotated[int, Field(ge=1)] = 3
    """How many of the newest checkpoints are kept; the best one (--metric_for_best_model) is kept besides."""
    metric_for_best_model: Annotated[str, AfterValidator(known_metric)] = "overall/macro"
    """Validation metric that says which checkpoint is best, such as asr/cer_nospace, tqa/rouge_l or sqa/loss;
    overall/macro is the mean of all tasks' headline scores."""
    load_best_model_at_end: bool = False
    """Make adapter/ the best checkpoint's weights instead of the last step's."""
    early_stopping_patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many validations in a row without a better value of --metric_for_best_model; 0 never stops."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """How much better a value has to be to count as better."""
    log_steps: Annotated[int, Flag(("logging_steps",)), Field(ge=1)] = 10
    """Print progress every so many steps; metrics.jsonl has every step."""
    overwrite: bool = False
    """Start afresh in an --output_dir that holds a run with other settings, deleting that run."""
    debug: bool = False
    """A quick trial: at most 8 rows per task, 4 steps, 4 validation rows per task."""

    @model_validator(mode="after")
    def _choosing_needs_validation(self) -> "TrainSettings":
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, name) and not self.val_jsonl:
                raise ValueError(f"--{name}: needs validation rows, --val_jsonl")
        return self

    @model_validator(mode="after")
    def _what_does_not_compile(self) -> "TrainSettings":
        if self.compile and self.tuning == "dora":
            raise ValueError("--compile: DoRA's layers fall into too many pieces; leave it out, or take --tuning lora")
        if self.compile and self.zero_stage == 3:
            raise ValueError("--compile: layers whose weights --zero_stage 3 divides are not compiled; leave one out")
        return self


class TextSettings(TrainSettings):
    """Settings of jobs/train_text.py."""


class AsrAdapterSettings(TrainSettings, VariantFlags, MaskFlags, TrimFlags):
    """Settings of jobs/train_asr_adapter.py."""

    lora_r: Annotated[int, Field(ge=1, le=1024)] = 8
    """LoRA rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    """LoRA scale; updates are multiplied by alpha / r."""
    lr: Annotated[float, Flag(("learning_rate",)), Field(gt=0)] = 1e-4
    """Peak learning rate of AdamW."""
    epochs: Annotated[int, Flag(("num_train_epochs",)), Field(ge=1)] = 2
    """Passes over the data."""
    per_device_bsz: Annotated[int, Flag(("per_device_train_batch_size",)), Field(ge=1)] = 8
    """Rows per forward pass in one worker."""
    grad_accum: Annotated[int, Flag(("gradient_accumulation_steps",)), Field(ge=1)] = 4
    """Forward passes per worker and optimizer step."""

    @model_validator(mode="after")
    def _masks_need_mel(self) -> "AsrAdapterSettings":
        refuse_masks_on_encoder_outputs(self.store, self)
        return self


class MultitaskSettings(TrainSettings, TaskBatchingFlags, VariantFlags, MaskFlags, TrimFlags):
    """Settings of jobs/train_multitask.py."""

    freeze_whisper: Annotated[bool, Flag(("freeze_encoder",))] = True
    """Keep LoRA out of the Whisper audio encoder; --no_freeze_whisper adds LoRA to its attention as well. With --tuning
    full it is the encoder's own weights that stay or train."""
    task_weights: Annotated[TaskWeights | None, Flag(("task_sampling",))] = None
    """Relative shares of the samples drawn: 1.0,1.5,1.2 in the order asr,sqa,tqa, or by name, asr=1,aac=1.5 (tasks not
    named are not drawn). Without it every row is seen once per epoch."""

    @model_validator(mode="after")
    def _encoder_outputs_are_fixed(self) -> "MultitaskSettings":
        """Stored outputs are those of the encoder as it is, for clips as they are."""
        if self.store == "encoder" and not self.freeze_whisper:
            raise ValueError("--store encoder: LoRA in the encoder (--no_freeze_whisper) changes its outputs")
        refuse_masks_on_encoder_outputs(self.store, self)
        return self


class WhisperSettings(TrainSettings, VariantFlags, MaskFlags):
    """Settings of jobs/train_whisper.py."""

    family: ClassVar[str] = "whisper"
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = WHISPER
    """Base model: a folder on disk or a hub id."""
    language: Annotated[str, Flag(("language_abbr",)), AfterValidator(language_code)] = ""
    """Language of the rows that name none, as a two-letter code; without one a row is not trained on."""
    task: Annotated[Literal["transcribe"], Flag(no_effect="there is only one")] = "transcribe"
    """What Whisper is asked to do: transcribe, in the language that is spoken."""
    freeze_encoder: Annotated[bool, Flag(("freeze_whisper",))] = False
    """Train the decoder alone: keep LoRA out of the encoder. With --tuning full the encoder's own weights stay."""
    lora_targets: Annotated[CommaStrings, Flag(("target_modules",)), Field(min_length=1)] = ("q_proj", "v_proj")
    """Names of the layers that LoRA adapts, wherever they stand in encoder and decoder, cross attention too; others are
    k_proj, out_proj, fc1 and fc2."""
    pack_tokens: Annotated[int, Field(ge=16)] = 16_384
    """Size of a pack with --batching packed: tokens, and the 1,500 positions that the encoder has for each clip."""
    lora_r: Annotated[int, Field(ge=1, le=1024)] = 32
    """LoRA rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 64
    """LoRA scale; updates are multiplied by alpha / r."""
    lr: Annotated[float, Flag(("learning_rate",)), Field(gt=0)] = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Optimizer steps over which the learning rate rises from 0."""
    per_device_bsz: Annotated[int, Flag(("per_device_train_batch_size",)), Field(ge=1)] = 8
    """Rows per forward pass in one worker."""
    max_len: Annotated[int, Flag(("max_length",)), Field(ge=1)] = 448
    """Longest row in tokens (prompt and transcript), 448 at most; longer rows are listed in quarantine.jsonl, never
    cut."""
    eval_max_new_tokens: Annotated[int, Field(ge=1)] = 225
    """Longest answer generated during validation, in tokens."""

    @model_validator(mode="after")
    def _encoder_outputs_are_fixed(self) -> "WhisperSettings":
        """Stored outputs are those of the encoder as it is, for clips as they are."""
        if self.store == "encoder" and not self.freeze_encoder:
            raise ValueError("--store encoder: LoRA in the encoder changes its outputs; add --freeze_encoder")
        refuse_masks_on_encoder_outputs(self.store, self)
        return self


def refuse_masks_on_encoder_outputs(store: str, masks: MaskFlags) -> None:
    """Masks are put on log-mel, which is not there where the encoder's outputs are stored."""
    if store == "encoder" and (masks.freq_masks or masks.time_masks):
        raise ValueError("--store encoder: masks on features (--freq_masks, --time_masks) never reach the encoder")
