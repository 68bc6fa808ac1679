"""Settings of jobs/train_salmonn.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from voxray.config.flag_groups import SALMONN_PARTS, SalmonnPartsFlags, VariantFlags
from voxray.config.flags import Flag
from voxray.config.salmonn_yaml import trainer_flags
from voxray.config.train import TrainSettings


class SalmonnSettings(TrainSettings, SalmonnPartsFlags, VariantFlags):
    """Settings of jobs/train_salmonn.py; the defaults are those of SALMONN's own trainer."""

    stage: Annotated[int, Field(ge=1, le=2)] = 1
    """1 starts with new weights between the encoders and the language model, 2 with those that a stage 1 trained
    (--ckpt). Both stages train the same weights."""
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = ""
    """Base model: a SALMONN folder. Without one the base is assembled from --whisper_path, --beats_path and
    --llama_path."""
    audio_prefix: Annotated[str, Flag(("prefix",), path="input")] = ""
    """Folder to which audio paths in SALMONN's annotation files are relative; empty reads the paths unchanged."""
    init_adapter: Annotated[str, Flag(("ckpt",), path="input")] = ""
    """Adapter to start from: the run, adapter or checkpoint folder of an earlier run or stage, or a SALMONN checkpoint
    (.pth). Only weights are loaded; the learning rate schedule starts anew."""
    prompts: Annotated[str, Flag(("prompt_path",), path="input")] = ""
    """YAML or JSON file of prompts by task; one is drawn for every row in every epoch. --max_len and packing assume the
    longest one. Without it each task has the single prompt that evaluation uses."""
    lora_r: Annotated[int, Flag(("lora_rank",)), Field(ge=1, le=1024)] = 8
    """LoRA rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA alpha; updates are scaled by alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout probability on the input of every LoRA branch."""
    lr: Annotated[float, Flag(("learning_rate", "init_lr")), Field(gt=0)] = 3e-5
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["cosine_from_start", "cosine", "linear", "constant"] = (  # type: ignore[assignment]
        "cosine_from_start"
    )
    """Learning rate schedule after warm-up; cosine_from_start is a cosine over all steps, warm-up included, that ends
    at --min_lr."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate at the end of --lr_schedule cosine_from_start."""
    warmup_start_lr: Annotated[float, Flag(("warmup_start",)), Field(ge=0)] = 1e-6
    """Learning rate of the first step with --lr_schedule cosine_from_start."""
    warmup_steps: Annotated[int, Field(ge=0)] = 3000
    """Optimizer steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """AdamW's decoupled weight decay; not applied to biases, norms and other vectors."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    """Clip the total gradient norm to this value; 0 turns clipping off."""
    max_steps: Annotated[int, Field(ge=0)] = 90_000
    """Total optimizer steps (the default is 30 times 3,000); 0, or --epochs without --max_steps, uses --epochs."""
    eval_steps: Annotated[int, Field(ge=0)] = 3000
    """Validate every this many optimizer steps; 0 validates after each epoch."""
    save_steps: Annotated[int, Field(ge=1)] = 3000
    """Write a checkpoint every this many optimizer steps, and at the end of the run."""
    per_device_bsz: Annotated[int, Flag(("per_device_train_batch_size", "batch_size_train")), Field(ge=1)] = 8
    """Rows per forward pass in one worker."""
    grad_accum: Annotated[int, Flag(("gradient_accumulation_steps", "accum_grad_iters")), Field(ge=1)] = 1
    """Forward passes per worker in each optimizer step."""
    eval_max_new_tokens: Annotated[int, Field(ge=1)] = 200
    """Maximum length of an answer during validation, in tokens."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the data order, new weights, prompts and dropout."""
    debug: Annotated[bool, Flag(("dryrun",))] = False
    """A quick trial: at most 8 rows per task, 4 steps, 4 validation rows per task."""

    @classmethod
    def translate_yaml(
        cls, loaded: dict[Any, Any], path: Path, flags: Mapping[str, Any]
    ) -> tuple[dict[Any, Any], list[str]]:
        """Also read the nested YAML files of SALMONN's trainer."""
        return trainer_flags(loaded, path)

    @model_validator(mode="before")
    @classmethod
    def _epochs_override_max_steps(cls, values: Any) -> Any:
        if isinstance(values, dict) and "epochs" in values and "max_steps" not in values:
            return {**values, "max_steps": 0}
        return values

    @model_validator(mode="after")
    def _one_base(self) -> "SalmonnSettings":
        if not self.model_id and self.missing_parts:
            raise ValueError(f"--model_id: give a SALMONN folder, or {', '.join(self.missing_parts)} as well")
        if self.model_id and (parts := {*SALMONN_PARTS, "end_sym"} & self.model_fields_set):
            raise ValueError(f"--model_id and --{min(parts)}: give the folder, or its parts")
        return self

    @model_validator(mode="after")
    def _stage_2_needs_adapter(self) -> "SalmonnSettings":
        if self.stage == 2 and not self.init_adapter:
            raise ValueError("--stage 2: needs --ckpt, what stage 1 trained")
        if self.init_adapter and self.tuning == "full":
            raise ValueError("--ckpt: holds LoRA, which --tuning full has none of")
        return self

    @model_validator(mode="after")
    def _rates_match_schedule(self) -> "SalmonnSettings":
        schedule_flags = {"min_lr", "warmup_start_lr"} & self.model_fields_set
        if self.lr_schedule != "cosine_from_start" and schedule_flags:
            raise ValueError(f"--{min(schedule_flags)}: is for --lr_schedule cosine_from_start")
        if self.lr_schedule == "cosine_from_start" and self.min_lr > self.lr:
            raise ValueError(f"--min_lr {self.min_lr:g} is over --lr {self.lr:g}")
        return self
