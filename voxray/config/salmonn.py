"""Settings of jobs/train_salmonn.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from voxray.config.flag_groups import SALMONN_PARTS, SalmonnPartsFlags, VariantFlags
from voxray.config.parse import Flag
from voxray.config.salmonn_yaml import trainer_flags
from voxray.config.train import TrainSettings


class SalmonnSettings(TrainSettings, SalmonnPartsFlags, VariantFlags):
    """Settings of jobs/train_salmonn.py; the defaults are those of SALMONN's own trainer."""

    family: ClassVar[str] = "salmonn"
    stage: Annotated[int, Field(ge=1, le=2)] = 1
    """1 starts from new weights between the encoders and the language model, 2 from those of a stage 1 (--ckpt); what
    trains is the same."""
    model_id: Annotated[str, Flag(("base_model", "model_name_or_path"), path="model")] = ""
    """Base model: a SALMONN folder. Without one it is put together from --whisper_path, --beats_path and
    --llama_path."""
    audio_prefix: Annotated[str, Flag(("prefix",), path="input")] = ""
    """Folder below which the audio of SALMONN's annotation files stands; without it they are read as they say."""
    init_adapter: Annotated[str, Flag(("ckpt",), path="input")] = ""
    """Start from what an earlier run or stage trained: its run, adapter or checkpoint folder, or a SALMONN checkpoint
    (.pth). Weights alone are taken; the schedule begins anew."""
    prompts: Annotated[str, Flag(("prompt_path",), path="input")] = ""
    """YAML or JSON file of prompts by task, one of which is drawn for every row and epoch; --max_len and packs reckon
    with the longest. Without it each task has the one that evaluation uses."""
    lora_r: Annotated[int, Flag(("lora_rank",)), Field(ge=1, le=1024)] = 8
    """LoRA rank."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """LoRA scale; updates are multiplied by alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on the input of every LoRA branch, as a probability."""
    lr: Annotated[float, Flag(("learning_rate", "init_lr")), Field(gt=0)] = 3e-5
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["cosine_from_start", "cosine", "linear", "constant"] = (  # type: ignore[assignment]
        "cosine_from_start"
    )
    """Shape of the learning rate after warm-up; cosine_from_start is a cosine over all steps, those of the warm-up
    included, that ends at --min_lr."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate at the end of --lr_schedule cosine_from_start."""
    warmup_start_lr: Annotated[float, Flag(("warmup_start",)), Field(ge=0)] = 1e-6
    """Learning rate of the first step with --lr_schedule cosine_from_start."""
    warmup_steps: Annotated[int, Field(ge=0)] = 3000
    """Optimizer steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    """AdamW's decoupled weight decay; biases, norms and other vectors have none."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    """Clip the norm of all gradients to this; 0 turns clipping off."""
    max_steps: Annotated[int, Field(ge=0)] = 90_000
    """Total optimizer steps, 30 times 3,000; 0, or --epochs alone, leaves it to --epochs."""
    eval_steps: Annotated[int, Field(ge=0)] = 3000
    """Validate every so many optimizer steps; 0 validates after each epoch."""
    save_steps: Annotated[int, Field(ge=1)] = 3000
    """Write a checkpoint every so many optimizer steps; one is also written at the end of the run."""
    per_device_bsz: Annotated[int, Flag(("per_device_train_batch_size", "batch_size_train")), Field(ge=1)] = 8
    """Rows per forward pass in one worker."""
    grad_accum: Annotated[int, Flag(("gradient_accumulation_steps", "accum_grad_iters")), Field(ge=1)] = 1
    """Forward passes per worker and optimizer step."""
    eval_max_new_tokens: Annotated[int, Field(ge=1)] = 200
    """Longest answer generated during validation, in tokens."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the data order, new weights, prompts and dropout."""
    debug: Annotated[bool, Flag(("dryrun",))] = False
    """A quick trial: at most 8 rows per task, 4 steps, 4 validation rows per task."""

    @classmethod
    def of_file(cls, loaded: dict[Any, Any], path: Path, given: Mapping[str, Any]) -> tuple[dict[Any, Any], list[str]]:
        """Keys and values of a YAML file, and what is wrong with it; the nested files of SALMONN's trainer too."""
        return trainer_flags(loaded, path)

    @model_validator(mode="before")
    @classmethod
    def _epochs_alone_count(cls, values: Any) -> Any:
        if isinstance(values, dict) and "epochs" in values and "max_steps" not in values:
            return {**values, "max_steps": 0}
        return values

    @model_validator(mode="after")
    def _a_base(self) -> "SalmonnSettings":
        if not self.model_id and self.missing_parts:
            raise ValueError(f"--model_id: give a SALMONN folder, or {', '.join(self.missing_parts)} as well")
        if self.model_id and (given := {*SALMONN_PARTS, "end_sym"} & self.model_fields_set):
            raise ValueError(f"--model_id and --{min(given)}: give the folder, or its parts")
        return self

    @model_validator(mode="after")
    def _stage_2_goes_on(self) -> "SalmonnSettings":
        if self.stage == 2 and not self.init_adapter:
            raise ValueError("--stage 2: needs --ckpt, what stage 1 trained")
        if self.init_adapter and self.tuning == "full":
            raise ValueError("--ckpt: holds LoRA, which --tuning full has none of")
        return self

    @model_validator(mode="after")
    def _rates_fit(self) -> "SalmonnSettings":
        of_schedule = {"min_lr", "warmup_start_lr"} & self.model_fields_set
        if self.lr_schedule != "cosine_from_start" and of_schedule:
            raise ValueError(f"--{min(of_schedule)}: is for --lr_schedule cosine_from_start")
        if self.lr_schedule == "cosine_from_start" and self.min_lr > self.lr:
            raise ValueError(f"--min_lr {self.min_lr:g} is over --lr {self.lr:g}")
        return self
