"""Settings of jobs/tune.py: the flags of one training job, and the values that the trials of the sweep give them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from voxray.config.flag_groups import TaskWeights
from voxray.config.flags import Flag, flag_metadata
from voxray.config.parse import Settings, convert
from voxray.config.recipes import Recipe, derive_settings, lookup, peek_values, recipes, with_default
from voxray.config.search_space import Choice, Domain, parse_space
from voxray.config.train import TrainSettings, known_metric
from voxray.core.tasks import TASKS, with_own_tasks
from voxray.metrics.names import higher_is_better, validation_metrics

CHOICE_FLAGS = ("task_weights", "lora_r")
"""Flags whose type holds several choices. Other numbers take them too (``--lr 1e-3,3e-3``), ``--space`` any flag."""
MAX_COMBINATIONS = 1000
"""Combinations of choices that are validated to find one that the training job accepts."""


def _choices(value: Any) -> Any:
    """Split ``a;b;c`` into choices. A YAML list holds choices; any other value is a single choice."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(";") if part.strip())
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _comma_choices(value: Any) -> Any:
    return _choices(value.replace(",", ";") if isinstance(value, str) else value)


Ranks = Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], convert(_comma_choices)]


class SweepFlags(Settings):
    """Flags of every sweep.

    Attributes:
        trains: Settings class of the training job whose runs are the trials.
        tasks: Tasks that the job validates with.
    """

    trains: ClassVar[type[TrainSettings]]
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)
    url_flags: ClassVar[tuple[str, ...]] = ("features_dir",)
    recipe: str = "multitask"
    """Training job whose runs are the trials; the sweep accepts its flags."""
    lora_r: Annotated[Ranks, Field(min_length=1)] = (8, 16)
    """Choices of the LoRA rank, such as 4,8,16. With --space, the default is the training job's own rank instead."""
    space: dict[str, Any] = {}  # noqa: RUF012  # pydantic copies it
    """Search space over any flags of the training job: {lr: {log: [1e-5, 1e-3]}, lora_dropout: {range: [0, 0.2]},
    lora_alpha: [16, 32]}. A mapping in YAML, or this text on the command line."""
    search: Literal["auto", "grid", "random", "optuna"] = "auto"
    """Search algorithm: grid runs every combination once, random samples --num_trials of them, optuna learns from
    earlier trials (TPE; needs the extra `optuna`). auto is random with --num_trials, else grid."""
    num_trials: Annotated[int, Field(ge=0)] = 0
    """Trials to sample; 0 runs every combination once."""
    metric: Annotated[str, AfterValidator(lambda value: known_metric(value))] = "asr/cer_nospace"
    """Validation metric by which trials are compared, as task/name, or overall/macro."""
    metric_mode: Literal["auto", "min", "max"] = "auto"
    """Whether lower (min) or higher (max) values of the metric are better; auto follows from the metric."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """How weak trials are stopped early: asha keeps the best quarter at --grace_steps, at 4 times that, and so on;
    median stops a trial whose best value is worse than the median of the other trials' means so far; none stops no
    trial."""
    grace_steps: Annotated[int, Field(ge=1)] = 20
    """Optimizer steps before a trial can be stopped early; trials are compared at validations (--eval_steps)."""
    max_concurrent_trials: Annotated[int, Field(ge=0)] = 0
    """Maximum trials at a time; 0 runs as many as the CPUs or GPUs have room for with all their processes, with one
    CPU left for Ray Data."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Train this many of the best choices again with other seeds, and compare their means; 0 trains none again."""
    seeds: Annotated[int, Field(ge=2, le=100)] = 3
    """Seeds for each of the --top_k choices. The run of the search is not one of them, because it was selected for its
    result, which is biased."""
    resume: bool = False
    """Resume the sweep in --output_dir: finished trials are kept, unfinished ones resume from their checkpoints, failed
    ones run again."""
    overwrite: bool = False
    """If --output_dir holds a sweep, delete its trials and start anew."""

    @field_validator("space", mode="before")
    @classmethod
    def _parse_space(cls, value: Any) -> Any:
        return {name: {domain.kind: list(domain.values)} for name, domain in parse_space(value, cls.trains).items()}

    @model_validator(mode="before")
    @classmethod
    def _first_choice(cls, values: Any) -> Any:
        """Set swept flags to the first choice that the training job accepts, for validators that see several flags."""
        if not isinstance(values, dict):
            return values
        values = _move_lists_to_space(cls.trains, values)
        try:
            space = parse_space(values.get("space") or {}, cls.trains)
        except ValueError:
            return values  # the validator of the field reports the error
        if duplicates := sorted(set(space) & set(values)):
            raise ValueError("\n".join(f"--{name}: given by itself and in --space" for name in duplicates))
        own_fields = set(cls.trains.model_fields) - {*CHOICE_FLAGS}
        fixed = {name: value for name, value in values.items() if name in own_fields}
        combinations = itertools.product(*(domain.samples() for domain in space.values()))
        choices = [dict(zip(space, each, strict=True)) for each in itertools.islice(combinations, MAX_COMBINATIONS)]
        accepted = (choice for choice in choices if _is_accepted(cls.trains, fixed | choice))
        choice = next(accepted, choices[0])
        return {**values, **{name: value for name, value in choice.items() if name not in CHOICE_FLAGS}}

    @model_validator(mode="after")
    def _check_search(self) -> "SweepFlags":
        continuous = [name for name, domain in self.domains.items() if domain.size == math.inf]
        faults = []
        if self.metric not in (known := validation_metrics(with_own_tasks(self.tasks))):
            faults.append(f"--metric {self.metric}: train_{self.recipe} validates {', '.join(known)}")
        if self.method == "grid" and self.num_trials:
            faults.append("--search grid: runs every combination; leave out --num_trials")
        if self.method == "grid" and continuous:
            names = ", ".join(continuous)
            faults.append(f"--space: {names} has infinitely many values; give --num_trials, or choices")
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
        """The values to search, by flag: the flags in ``CHOICE_FLAGS``, then those in ``--space``."""
        domains = {}
        for name in CHOICE_FLAGS:
            is_swept = name in self.model_fields_set or name != "lora_r" or not self.space
            if name not in self.space and is_swept and isinstance(choices := getattr(self, name, None), tuple):
                domains[name] = Domain(name, "choice", choices)
        return domains | parse_space(self.space, self.trains)

    @property
    def method(self) -> str:
        """Search algorithm: grid, random or optuna."""
        return self.search if self.search != "auto" else "random" if self.num_trials else "grid"

    @property
    def mode(self) -> str:
        """Whether lower or higher values of the metric are better: min or max."""
        if self.metric_mode != "auto":
            return self.metric_mode
        return "max" if higher_is_better(self.metric) else "min"


def _move_lists_to_space(trains: type[TrainSettings], values: dict[str, Any]) -> dict[str, Any]:
    """Move ``--lr 1e-3,3e-3``, several values for a flag of one number, to the search space."""
    lists = {}
    for name, field in trains.model_fields.items():
        value = values.get(name)
        if name in CHOICE_FLAGS or field.annotation not in (int, float):
            continue
        if isinstance(value, str) and ("," in value or ";" in value):
            lists[name] = [part.strip() for part in value.replace(";", ",").split(",") if part.strip()]
        elif isinstance(value, list | tuple):
            lists[name] = list(value)
    if not lists:
        return values
    try:
        space = parse_space(values.get("space") or {}, trains)
    except ValueError:
        return values  # the validator of the field reports the error
    if duplicates := sorted(set(space) & set(lists)):
        raise ValueError("\n".join(f"--{name}: given by itself and in --space" for name in duplicates))
    written = {name: {domain.kind: list(domain.values)} for name, domain in space.items()}
    return {name: value for name, value in values.items() if name not in lists} | {"space": written | lists}


def _is_accepted(trains: type[TrainSettings], values: Mapping[str, Any]) -> bool:
    try:
        trains.model_validate(values)
    except ValidationError:
        return False
    return True


def trial_values(settings: Any, choice: Choice) -> dict[str, Any]:
    """Values of the training job's flags in a trial: those that the user set, and the trial's choice."""
    user_set = settings.model_fields_set - {*CHOICE_FLAGS, *settings.domains, "overwrite"}
    return {name: getattr(settings, name) for name in settings.trains.model_fields if name in user_set} | choice


class TaskWeightChoices(Settings):
    """Choices of task weights, for training jobs with that flag."""

    task_weights: Annotated[
        tuple[TaskWeights, ...], Flag(("task_sampling",)), convert(_choices), Field(min_length=1)
    ] = ({"asr": 1.0, "sqa": 1.0, "tqa": 1.0},)
    """Choices of task weights, separated by semicolons: "1,1,1;2,1,1"."""


@cache
def derive_sweep(recipe: Recipe) -> type[Any]:
    """Create the settings class of a sweep over a recipe."""
    job_fields = recipe.settings_class.model_fields
    metric = SweepFlags.model_fields["metric"]
    lora_r = with_default(SweepFlags.model_fields["lora_r"], recipe.sweep_lora_r)
    lora_r.metadata = [*lora_r.metadata, flag_metadata(job_fields["lora_r"])]  # its aliases
    fields = {
        "metric": (metric.annotation, with_default(metric, recipe.sweep_metric)),
        "lora_r": (lora_r.annotation, lora_r),
    }
    bases = (TaskWeightChoices, SweepFlags) if "task_weights" in job_fields else (SweepFlags,)
    return derive_settings("Tune", bases, recipe, __name__, **fields)


def __getattr__(name: str) -> type[Any]:
    return lookup(derive_sweep, name)


def sweep_settings(argv: Sequence[str]) -> type[Any]:
    """The settings class of the recipe in the flags or in the file of ``--config``; ``parse`` reports errors."""
    recipe = str(peek_values(argv).get("recipe", ""))
    return derive_sweep(recipes().get(recipe, recipes()["multitask"]))
