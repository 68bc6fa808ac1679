"""Settings of the training jobs."""

import os
from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from voxray.config.flag_groups import (
    BatchingFlags,
    EvaluationDataFlags,
    LoraFlags,
    MaskFlags,
    ModelFlags,
    OptimizerFlags,
    OutputFlags,
    SharedFeatureFlags,
    TaskBatchingFlags,
    TaskWeights,
    TrimFlags,
    VariantFlags,
    WorkerFlags,
)
from voxray.config.flags import Flag
from voxray.config.parse import CommaStrings, InputFiles
from voxray.config.recipes import recipes
from voxray.config.strategy_flags import StrategyFlags
from voxray.config.task_flags import ContextShareFlags, OwnTaskFlags
from voxray.core.languages import language_code
from voxray.core.tasks import with_own_tasks
from voxray.metrics.names import validation_metrics


def known_metric(value: str, tasks: Iterable[str] | None = None) -> str:
    """Check the name of a validation metric.

    Args:
        tasks: Tasks that the job validates with; None for all.
    Raises:
        ValueError: Validation on these tasks has no such metric.
    """
    if value in (known := validation_metrics(tasks)):
        return value
    close = [metric for metric in known if metric.rpartition("/")[2] == value.removeprefix("eval_")]
    hint = f"did you mean {close[0]}? It " if close else ""
    raise ValueError(f"{hint}must be one of {', '.join(known)}")


def _check_trackers(value: tuple[str, ...]) -> tuple[str, ...]:
    names = () if value == ("none",) else tuple(dict.fromkeys(value))
    if wrong := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"{', '.join(wrong)}: must be none, or some of {', '.join(TRACKERS)}")
    return names


TRACKERS = ("tensorboard", "wandb", "mlflow")
WHISPER = "openai/whisper-small"

REPLAY_SHARE = 0.1
SHARED_ROWS = "also in --train_jsonl or --replay_jsonl; scores on rows of the training tell nothing about other rows"


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
    OwnTaskFlags,
    ContextShareFlags,
):
    """Flags of every training job."""

    url_flags: ClassVar[tuple[str, ...]] = ("output_dir", "storage_path", "features_dir")
    output_dir: Annotated[str, Flag(("out_dir",), path="output"), Field(min_length=1)]  # type: ignore[misc]
    """Folder of the run. A relative path is below --storage_path, or else the current directory."""
    train_jsonl: Annotated[InputFiles, Flag(path="input"), Field(min_length=1)]
    """Training manifests, comma separated. Rows of different tasks may be in one file."""
    allow_empty: bool = False
    """Also train on clips with an empty transcript, as silence. By default they are left out and listed in
    quarantine.jsonl, because a transcript is more often missing than empty."""
    init_adapter: Annotated[str, Flag(path="input")] = ""
    """Start from the LoRA weights of an earlier run or stage: a run, adapter or checkpoint folder with the same rank
    and alpha. LoRA weights that this job does not train stay unchanged and are saved with the result."""
    replay_jsonl: Annotated[InputFiles, Flag(path="input")] = ()
    """Manifests with rows of the kind that the base was trained on, comma separated. --replay_share of the rows are
    drawn from them, so that the model does not forget. Their clips get no variants."""
    replay_share: Annotated[float, Field(gt=0, lt=1)] = REPLAY_SHARE
    """Share of the rows that are drawn from --replay_jsonl. They are drawn in addition to those of --train_jsonl, so an
    epoch gets longer."""
    distill_weight: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight of a second loss that keeps the model close to its base on the answers: the Kullback-Leibler divergence of
    the base's distribution of each token from the model's. With --replay_jsonl it counts on the replayed rows only,
    where the base is right. The base is the model without its LoRA, so a step computes one more forward pass. 0 turns
    it off."""
    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between validations; 0 validates after each epoch."""
    eval_max_rows: Annotated[int, Field(ge=0)] = 200
    """Maximum validation rows per task during training, the first ones of the manifests; 0 uses all."""
    eval_max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Maximum length of an answer generated during validation, in tokens."""
    preview_rows: Annotated[int, Flag(("num_preview",)), Field(ge=0, le=10_000)] = 2
    """Validation rows per task whose generated answers are shown at each validation; 0 shows none. A new run writes the
    value to its previews.yaml, which you may edit while it trains."""
    save_steps: Annotated[int, Field(ge=1)] = 200
    """Optimizer steps between checkpoints. The last step of a run is always saved."""
    save_total_limit: Annotated[int, Field(ge=1)] = 3
    """Number of the newest checkpoints to keep. The best one (--metric_for_best_model) is kept in addition."""
    metric_for_best_model: str = "overall/macro"
    """Validation metric that decides which checkpoint is best, such as asr/cer_nospace, tqa/rouge_l or sqa/loss.
    overall/macro is the mean of the headline scores of all tasks."""
    load_best_model_at_end: bool = False
    """Publish the weights of the best checkpoint in adapter/, instead of those of the last step."""
    early_stopping_patience: Annotated[int, Field(ge=0)] = 0
    """Stop after this many consecutive validations without an improvement of --metric_for_best_model; 0 never stops."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change of --metric_for_best_model that counts as an improvement."""
    log_steps: Annotated[int, Flag(("logging_steps",)), Field(ge=1)] = 10
    """Optimizer steps between log lines; metrics.jsonl has every step."""
    report_to: Annotated[CommaStrings, AfterValidator(_check_trackers)] = ("tensorboard",)
    """Programs that show the records: tensorboard, wandb and mlflow, comma separated, or none. wandb and mlflow are
    extras of the package; they read their own environment variables, such as WANDB_MODE and MLFLOW_TRACKING_URI."""
    overwrite: bool = False
    """If --output_dir holds a run with other settings, delete that run and start anew."""
    deterministic: bool = False
    """Use only GPU kernels whose results are equal in every run, which is slower. Then a resumed run equals an
    uninterrupted one to the bit on the same GPUs, as it does on CPUs without this flag."""
    debug: bool = False
    """Quick trial run: at most 8 training rows and 4 validation rows per task, and 4 steps."""

    @field_validator("metric_for_best_model")
    @classmethod
    def _metric_of_the_tasks(cls, value: str) -> str:
        own = (with_own_tasks(each.tasks) for each in recipes().values() if issubclass(cls, each.settings_class))
        return known_metric(value, next(own, None))

    @model_validator(mode="after")
    def _best_model_needs_validation(self) -> "TrainSettings":
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, name) and not self.val_jsonl:
                raise ValueError(f"--{name}: needs validation rows, --val_jsonl")
        return self

    @model_validator(mode="after")
    def _a_base_to_distill_from(self) -> "TrainSettings":
        if self.distill_weight and self.tuning == "full":
            raise ValueError("--distill_weight: --tuning full leaves no base to compare with")
        return self

    @model_validator(mode="after")
    def _replayed_rows(self) -> "TrainSettings":
        if self.replay_share != REPLAY_SHARE and not self.replay_jsonl:
            raise ValueError("--replay_share: needs --replay_jsonl")
        if both := {*map(os.path.realpath, self.train_jsonl)} & {*map(os.path.realpath, self.replay_jsonl)}:
            raise ValueError(f"--replay_jsonl {min(both)}: also in --train_jsonl")
        return self

    @property
    def manifests(self) -> tuple[str, ...]:
        """All manifests: of training, of replay, of validation."""
        return (*self.train_jsonl, *self.replay_jsonl, *self.val_jsonl)

    @property
    def shared_manifests(self) -> tuple[str, ...]:
        """Validation manifests that are training manifests too."""
        training = set(map(os.path.realpath, (*self.train_jsonl, *self.replay_jsonl)))
        return tuple(path for path in self.val_jsonl if os.path.realpath(path) in training)

    @model_validator(mode="after")
    def _compile_limits(self) -> "TrainSettings":
        if self.compile and self.tuning == "dora":
            raise ValueError("--compile: cannot compile DoRA layers; leave it out, or use --tuning lora")
        if self.compile and self.zero_stage == 3:
            raise ValueError("--compile: layers whose weights --zero_stage 3 shards are not compiled; leave one out")
        return self


class TextSettings(TrainSettings):
    """Settings of jobs/train_text.py."""


class AsrAdapterSettings(TrainSettings, VariantFlags, MaskFlags, TrimFlags):
    """Settings of jobs/train_asr_adapter.py."""

    lora_r: Annotated[int, Field(ge=1, le=1024)] = 8
    """LoRA rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 16
    """LoRA alpha; updates are scaled by alpha / r."""
    lr: Annotated[float, Flag(("learning_rate",)), Field(gt=0)] = 1e-4
    """Peak learning rate of AdamW."""
    epochs: Annotated[int, Flag(("num_train_epochs",)), Field(ge=1)] = 2
    """Passes over the data."""
    per_device_bsz: Annotated[int, Flag(("per_device_train_batch_size",)), Field(ge=1)] = 8
    """Rows per forward pass in one worker."""
    grad_accum: Annotated[int, Flag(("gradient_accumulation_steps",)), Field(ge=1)] = 4
    """Forward passes per worker in each optimizer step."""

    @model_validator(mode="after")
    def _stored_encoder_outputs(self) -> "AsrAdapterSettings":
        refuse_masks_on_encoder_outputs(self.store, self)
        return self


class MultitaskSettings(TrainSettings, TaskBatchingFlags, VariantFlags, MaskFlags, TrimFlags):
    """Settings of jobs/train_multitask.py."""

    freeze_whisper: Annotated[bool, Flag(("freeze_encoder",))] = True
    """Keep the Whisper audio encoder frozen; --no_freeze_whisper also adds LoRA to its attention. With --tuning full,
    the flag freezes or trains the encoder's own weights."""
    task_weights: Annotated[TaskWeights | None, Flag(("task_sampling",))] = None
    """Relative sampling weights of the tasks: 1.0,1.5,1.2 in the order asr,sqa,tqa, or by name, such as asr=1,aac=1.5
    (other tasks are not sampled). By default every row is used once per epoch."""

    @model_validator(mode="after")
    def _stored_encoder_outputs(self) -> "MultitaskSettings":
        """Stored outputs are those of the base's encoder, for clips without masks."""
        if self.store == "encoder" and not self.freeze_whisper:
            raise ValueError("--store encoder: LoRA in the encoder (--no_freeze_whisper) changes its outputs")
        refuse_masks_on_encoder_outputs(self.store, self)
        return self


class WhisperSettings(TrainSettings, VariantFlags, MaskFlags):
    """Settings of jobs/train_whisper.py."""

    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = WHISPER
    """Base model: a folder on disk or a hub id."""
    language: Annotated[str, Flag(("language_abbr",)), AfterValidator(language_code)] = ""
    """Language of rows that name none, as a code such as ko or as an English name. Rows without a language are left
    out."""
    task: Annotated[Literal["transcribe"], Flag(no_effect="there is only one")] = "transcribe"
    """Task of the model: transcribe, in the spoken language."""
    freeze_encoder: Annotated[bool, Flag(("freeze_whisper",))] = False
    """Keep the encoder frozen, without LoRA. With --tuning full, the flag freezes the encoder's own weights."""
    lora_targets: Annotated[CommaStrings, Flag(("target_modules",)), Field(min_length=1)] = ("q_proj", "v_proj")
    """Names of the layers that LoRA adapts, in encoder and decoder, including cross attention. Whisper has k_proj,
    out_proj, fc1 and fc2 too; all-linear is all of them. A name that no layer has is refused."""
    pack_tokens: Annotated[int, Field(ge=16)] = 16_384
    """Maximum size of a pack with --batching packed: its tokens plus the encoder's positions for each clip, 1,500 of
    Whisper."""
    lora_r: Annotated[int, Field(ge=1, le=1024)] = 32
    """LoRA rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 64
    """LoRA alpha; updates are scaled by alpha / r."""
    lr: Annotated[float, Flag(("learning_rate",)), Field(gt=0)] = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Optimizer steps over which the learning rate rises linearly from 0."""
    per_device_bsz: Annotated[int, Flag(("per_device_train_batch_size",)), Field(ge=1)] = 8
    """Rows per forward pass in one worker."""
    max_len: Annotated[int, Flag(("max_length",)), Field(ge=1)] = 448
    """Maximum length of a row in tokens (prompt and transcript), at most what the decoder takes (Whisper: 448). Longer
    rows are left out and listed in quarantine.jsonl; they are never truncated."""
    eval_max_new_tokens: Annotated[int, Field(ge=1)] = 225
    """Maximum length of an answer generated during validation, in tokens."""

    @model_validator(mode="after")
    def _stored_encoder_outputs(self) -> "WhisperSettings":
        """Stored outputs are those of the base's encoder, for clips without masks."""
        if self.store == "encoder" and not self.freeze_encoder:
            raise ValueError("--store encoder: LoRA in the encoder changes its outputs; add --freeze_encoder")
        refuse_masks_on_encoder_outputs(self.store, self)
        return self


def refuse_masks_on_encoder_outputs(store: str, masks: MaskFlags) -> None:
    """Refuse SpecAugment with stored encoder outputs, because masks are applied to the encoder's log-mel input."""
    if store == "encoder" and (masks.freq_masks or masks.time_masks):
        raise ValueError("--store encoder: masks on features (--freq_masks, --time_masks) never reach the encoder")
