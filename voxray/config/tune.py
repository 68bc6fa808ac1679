"""Settings of jobs/tune.py: those of one training job, where the swept flags take several choices."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from voxray.config.groups import TaskWeights
from voxray.config.parse import Flag, Settings, read_yaml
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings, TrainSettings, WhisperSettings


def _choices(value: Any) -> Any:
    """``a;b;c`` or a YAML list of choices; one value is one choice."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(";") if part.strip())
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _comma_choices(value: Any) -> Any:
    return _choices(value.replace(",", ";") if isinstance(value, str) else value)


class SweepFlags(Settings):
    """What every sweep takes.

    Attributes:
        trains: Settings of the job whose runs are the trials.
    """

    trains: ClassVar[type[TrainSettings]]
    recipe: Literal["multitask", "text", "asr_adapter", "whisper"] = "multitask"
    """Training job whose runs are the trials; its flags are the sweep's."""
    lora_r: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1024)], ...], BeforeValidator(_comma_choices), Field(min_length=1)
    ] = (8, 16)
    """Choices of the LoRA rank: 4,8,16."""
    overwrite: Annotated[bool, Flag(no_effect="every trial has a folder of its own")] = False
    """Start afresh."""
    num_trials: Annotated[int, Field(ge=0)] = 0
    """Trials drawn at random from the choices; 0 runs every combination once."""
    metric: str = "asr/cer_nospace"
    """Validation metric that decides, as task/name."""
    metric_mode: Annotated[str, Field(pattern="^(min|max)$")] = "min"
    """Whether the metric should be small or large."""
    grace_steps: Annotated[int, Field(ge=1)] = 20
    """Steps that ASHA lets every trial run before it stops the weak ones."""
    max_concurrent_trials: Annotated[int, Field(ge=0)] = 0
    """Trials at a time; 0 takes as many as the CPUs or GPUs hold."""


class TuneSettings(SweepFlags, MultitaskSettings):  # type: ignore[misc]  # choices in the place of one value
    trains = MultitaskSettings
    task_weights: Annotated[  # type: ignore[assignment]
        tuple[TaskWeights, ...], Flag(("task_sampling",)), BeforeValidator(_choices), Field(min_length=1)
    ] = ({"asr": 1.0, "sqa": 1.0, "tqa": 1.0},)
    """Choices of task shares, separated by semicolons: "1,1,1;2,1,1"."""


class TuneTextSettings(SweepFlags, TextSettings):  # type: ignore[misc]
    trains = TextSettings
    metric: str = "tqa/rouge_l"
    """Validation metric that decides, as task/name."""
    metric_mode: Annotated[str, Field(pattern="^(min|max)$")] = "max"
    """Whether the metric should be small or large."""


class TuneAsrAdapterSettings(SweepFlags, AsrAdapterSettings):  # type: ignore[misc]
    trains = AsrAdapterSettings


class TuneWhisperSettings(SweepFlags, WhisperSettings):  # type: ignore[misc]
    trains = WhisperSettings
    lora_r: Annotated[  # type: ignore[assignment]
        tuple[Annotated[int, Field(ge=1, le=1024)], ...], BeforeValidator(_comma_choices), Field(min_length=1)
    ] = (16, 32)
    """Choices of the LoRA rank: 8,16,32."""


RECIPES: dict[str, type[SweepFlags]] = {
    "multitask": TuneSettings,
    "text": TuneTextSettings,
    "asr_adapter": TuneAsrAdapterSettings,
    "whisper": TuneWhisperSettings,
}


def sweep_settings(argv: Sequence[str]) -> type[Any]:
    """The settings class of the recipe that flags or the file of ``--config`` name; faults are left to ``parse``."""
    following = itertools.pairwise([*argv, ""])
    named = {token.partition("=")[0]: token.partition("=")[2] or value for token, value in following}
    recipe = named.get("--recipe", "")
    if not recipe and "--config" in named:
        try:
            recipe = str(read_yaml(Path(named["--config"])).get("recipe", ""))
        except ValueError:
            recipe = ""
    return RECIPES.get(recipe, TuneSettings)
