"""Settings of jobs/tune.py: those of one training job, and which values its flags take in the trials of the sweep."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator

from voxray.config.flag_groups import TaskWeights
from voxray.config.parse import Flag, Settings, read_yaml
from voxray.config.salmonn import SalmonnSettings
from voxray.config.search_space import Choice, Domain, parse_space
from voxray.config.train import (
    AsrAdapterSettings,
    MultitaskSettings,
    TextSettings,
    TrainSettings,
    WhisperSettings,
    known_metric,
)
from voxray.core.tasks import TASKS
from voxray.metrics.names import higher_is_better, validation_metrics

CHOICE_FLAGS = ("task_weights", "lora_r")
"""Flags that take several choices on the command line; ``--space`` takes those of any flag."""
COMBINATIONS_TRIED = 1000


def _choices(value: Any) -> Any:
    """``a;b;c`` or a YAML list of choices; one value is one choice."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(";") if part.strip())
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _comma_choices(value: Any) -> Any:
    return _choices(value.replace(",", ";") if isinstance(value, str) else value)


Ranks = Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], BeforeValidator(_comma_choices)]


class SweepFlags(Settings):
    """What every sweep takes.

    Attributes:
        trains: Settings of the job whose runs are the trials.
        tasks: Tasks that it validates with.
    """

    trains: ClassVar[type[TrainSettings]]
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)
    recipe: Literal["multitask", "text", "asr_adapter", "whisper", "salmonn"] = "multitask"
    """Training job whose runs are the trials; its flags are the sweep's."""
    lora_r: Annotated[Ranks, Field(min_length=1)] = (8, 16)
    """Choices of the LoRA rank: 4,8,16. With --space the training job's own rank is kept unless one is given."""
    space: dict[str, Any] = {}  # noqa: RUF012  # pydantic copies it
    """Values that trials give to any flag of the training job: {lr: {log: [1e-5, 1e-3]}, lora_dropout: {range: [0,
    0.2]}, lora_alpha: [16, 32]}, as a mapping in YAML or as such text."""
    search: Literal["auto", "grid", "random", "optuna"] = "auto"
    """How trials are chosen: grid runs every combination once, random draws --num_trials of them, optuna lets earlier
    trials lead (its TPE; needs the extra `optuna`). auto is random with --num_trials, else grid."""
    num_trials: Annotated[int, Field(ge=0)] = 0
    """Trials to draw; 0 runs every combination once."""
    metric: Annotated[str, AfterValidator(known_metric)] = "asr/cer_nospace"
    """Validation metric that decides, as task/name, or overall/macro."""
    metric_mode: Literal["auto", "min", "max"] = "auto"
    """Whether the metric should be small or large; auto knows which of the two is better."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """What stops weak trials early: asha keeps the best quarter at --grace_steps, 4 times that, and so on; median stops
    a trial whose best value is worse than the median of the others' means so far; none lets all run."""
    grace_steps: Annotated[int, Field(ge=1)] = 20
    """Steps that every trial may run before weak ones are stopped; they are judged at validations (--eval_steps)."""
    max_concurrent_trials: Annotated[int, Field(ge=0)] = 0
    """Trials at a time; 0 takes as many as the CPUs or GPUs hold with all their processes, one CPU kept for Ray
    Data."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Train the best so many choices again with other seeds, and let their means decide; 0 trains none again."""
    seeds: Annotated[int, Field(ge=2, le=100)] = 3
    """Seeds of each of them; the run that won the search does not count among them, as it was picked for its luck
    too."""
    resume: bool = False
    """Go on with the sweep in --output_dir: finished trials stay, unfinished ones go on from their checkpoints, failed
    ones are tried again."""
    overwrite: bool = False
    """Start afresh in an --output_dir that holds a sweep, deleting its trials."""

    @field_validator("space", mode="before")
    @classmethod
    def _known_values(cls, value: Any) -> Any:
        return {name: {domain.kind: list(domain.values)} for name, domain in parse_space(value, cls.trains).items()}

    @model_validator(mode="before")
    @classmethod
    def _first_choice(cls, values: Any) -> Any:
        """Checks that look at several flags see a choice of the swept ones, the first that the training job takes."""
        if not isinstance(values, dict):
            return values
        try:
            space = parse_space(values.get("space") or {}, cls.trains)
        except ValueError:
            return values  # the field's own check names what is wrong
        if twice := sorted(set(space) & set(values)):
            raise ValueError("\n".join(f"--{name}: given by itself and in --space" for name in twice))
        given = {
            name: value
            for name, value in values.items()
            if name in cls.trains.model_fields and name not in CHOICE_FLAGS
        }
        combinations = itertools.product(*(domain.samples() for domain in space.values()))
        choices = [dict(zip(space, each, strict=True)) for each in itertools.islice(combinations, COMBINATIONS_TRIED)]
        fits = (choice for choice in choices if _accepted(cls.trains, {**given, **choice}))
        chosen = next(fits, choices[0])
        return {**values, **{name: value for name, value in chosen.items() if name not in CHOICE_FLAGS}}

    @model_validator(mode="after")
    def _search_fits(self) -> "SweepFlags":
        ranges = [name for name, domain in self.domains.items() if domain.size == math.inf]
        faults = []
        if self.metric not in (known := validation_metrics(self.tasks)):
            faults.append(f"--metric {self.metric}: train_{self.recipe} validates {', '.join(known)}")
        if self.method == "grid" and self.num_trials:
            faults.append("--search grid: runs every combination; leave out --num_trials")
        if self.method == "grid" and ranges:
            faults.append(f"--space: {', '.join(ranges)} has no end of values to try; give --num_trials, or choices")
        if self.method != "grid" and not self.num_trials:
            faults.append(f"--search {self.search}: needs --num_trials")
        if self.top_k and "seed" in self.domains:
            faults.append("--top_k: trains choices again with other seeds, so seed cannot be in --space")
        if self.resume and self.overwrite:
            faults.append("--resume and --overwrite: give one of them")
        if "lora_r" in self.domains and getattr(self, "tuning", "") == "full":
            faults.append(
                "--tuning full: a sweep over LoRA ranks, which full tuning does not have; sweep others (--space)"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def domains(self) -> dict[str, Domain]:
        """What is swept: the flags that take several choices, then those of the space."""
        found = {}
        for name in CHOICE_FLAGS:
            is_meant = name in self.model_fields_set or name != "lora_r" or not self.space
            if name not in self.space and is_meant and isinstance(choices := getattr(self, name, None), tuple):
                found[name] = Domain(name, "choice", choices)
        return found | parse_space(self.space, self.trains)

    @property
    def method(self) -> str:
        """How trials are chosen: grid, random or optuna."""
        return self.search if self.search != "auto" else "random" if self.num_trials else "grid"

    @property
    def mode(self) -> str:
        """Whether a small or a large metric is better: min or max."""
        if self.metric_mode != "auto":
            return self.metric_mode
        return "max" if higher_is_better(self.metric) else "min"


def _accepted(trains: type[TrainSettings], values: Mapping[str, Any]) -> bool:
    try:
        trains.model_validate(values)
    except ValidationError:
        return False
    return True


def trial_values(settings: Any, choice: Choice) -> dict[str, Any]:
    """What the user set of the training job's flags, and what a trial chooses."""
    given = settings.model_fields_set - {*CHOICE_FLAGS, *settings.domains, "overwrite"}
    return {name: getattr(settings, name) for name in settings.trains.model_fields if name in given} | choice


class TuneSettings(SweepFlags, MultitaskSettings):  # type: ignore[misc]  # choices in the place of one value
    trains = MultitaskSettings
    task_weights: Annotated[  # type: ignore[assignment]
        tuple[TaskWeights, ...], Flag(("task_sampling",)), BeforeValidator(_choices), Field(min_length=1)
    ] = ({"asr": 1.0, "sqa": 1.0, "tqa": 1.0},)
    """Choices of task shares, separated by semicolons: "1,1,1;2,1,1"."""


class TuneTextSettings(SweepFlags, TextSettings):  # type: ignore[misc]
    trains = TextSettings
    tasks = ("tqa",)
    metric: Annotated[str, AfterValidator(known_metric)] = "tqa/rouge_l"
    """Validation metric that decides, as task/name, or overall/macro."""


class TuneAsrAdapterSettings(SweepFlags, AsrAdapterSettings):  # type: ignore[misc]
    trains = AsrAdapterSettings
    tasks = ("asr",)


class TuneWhisperSettings(SweepFlags, WhisperSettings):  # type: ignore[misc]
    trains = WhisperSettings
    tasks = ("asr",)
    lora_r: Annotated[Ranks, Field(min_length=1)] = (16, 32)  # type: ignore[assignment]
    """Choices of the LoRA rank: 8,16,32. With --space the training job's own rank is kept unless one is given."""


class TuneSalmonnSettings(SweepFlags, SalmonnSettings):  # type: ignore[misc]
    trains = SalmonnSettings
    lora_r: Annotated[Ranks, Flag(("lora_rank",)), Field(min_length=1)] = (8, 16)  # type: ignore[assignment]
    """Choices of the LoRA rank: 4,8,16. With --space the training job's own rank is kept unless one is given."""
    metric: Annotated[str, AfterValidator(known_metric)] = "overall/macro"
    """Validation metric that decides, as task/name, or overall/macro."""


RECIPES: dict[str, type[SweepFlags]] = {
    "multitask": TuneSettings,
    "text": TuneTextSettings,
    "asr_adapter": TuneAsrAdapterSettings,
    "whisper": TuneWhisperSettings,
    "salmonn": TuneSalmonnSettings,
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
