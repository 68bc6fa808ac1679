"""Settings of jobs/tune.py: those of train_multitask, where the swept flags take several choices."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from voxray.config.groups import TaskWeights
from voxray.config.parse import Flag
from voxray.config.train import MultitaskSettings


def _choices(value: Any) -> Any:
    """``a;b;c`` or a YAML list of choices; one value is one choice."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(";") if part.strip())
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _comma_choices(value: Any) -> Any:
    return _choices(value.replace(",", ";") if isinstance(value, str) else value)


class TuneSettings(MultitaskSettings):
    task_weights: Annotated[  # type: ignore[assignment]
        tuple[TaskWeights, ...], Flag(("task_sampling",)), BeforeValidator(_choices), Field(min_length=1)
    ] = ({"asr": 1.0, "sqa": 1.0, "tqa": 1.0},)
    """Choices of task shares, separated by semicolons: "1,1,1;2,1,1"."""
    lora_r: Annotated[  # type: ignore[assignment]
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
