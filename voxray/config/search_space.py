"""The search space of a sweep: the values that its trials try for each flag, written in YAML.

::

    space:
      lora_r: [4, 8, 16]              # choices; task_weights: ["1,1,1", "asr=2,tqa=1"] too
      lr: {log: [1e-5, 1e-3]}         # a number between the two, log-uniform
      lora_dropout: {range: [0, 0.2]} # a number between the two, uniform; an integer for integer flags
"""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from voxray.config.flags import flag_metadata
from voxray.config.parse import Settings, field_adapter, flag_names
from voxray.core.yaml_file import yaml_value

DIGITS = 4
"""Significant digits of sampled numbers, so that people can read and retype them."""
SYNTAX = "write a list of choices, {range: [lowest, highest]} or {log: [lowest, highest]}"
SAME_ROWS = "trials are compared on the same validation rows"
ONE_BASE = "the base is put together once; sweep model_id"
FIXED: Mapping[str, str] = {
    "output_dir": "every trial has a folder of its own",
    "storage_path": "every trial has a folder of its own",
    "features_dir": "trials share their shards",
    "overwrite": "it is the sweep that starts afresh",
    "num_workers": "all trials take as many processes",
    "tasks_file": "all trials share their features",
    "val_jsonl": SAME_ROWS,
    "eval_max_rows": SAME_ROWS,
    **dict.fromkeys(("whisper_path", "beats_path", "llama_path", "end_sym", "audio_prefix"), ONE_BASE),
}
"""Flags that cannot differ between trials, and why."""

Choice = dict[str, Any]
"""{flag: value} of one trial, with JSON values."""


@dataclass(frozen=True)
class Domain:
    """The values that trials may use for one flag.

    Attributes:
        name: The settings field.
        kind: ``choice``: one of ``values``. ``range``: uniform between the two values. ``log``: log-uniform.
        values: The choices as JSON values, or the lowest and the highest number.
        whole: Whether numbers are integers.
    """

    name: str
    kind: Literal["choice", "range", "log"]
    values: tuple[Any, ...]
    whole: bool = False

    @property
    def size(self) -> float:
        """Number of values; infinite for a range of real numbers."""
        if self.kind == "choice":
            return len(self.values)
        return self.values[1] - self.values[0] + 1 if self.whole else math.inf

    def all(self) -> tuple[Any, ...]:
        """Every value of a finite domain."""
        return self.values if self.kind == "choice" else tuple(range(self.values[0], self.values[1] + 1))

    def sample(self, rng: random.Random) -> Any:
        """Draw one value."""
        if self.kind == "choice":
            return rng.choice(self.values)
        low, high = self.values
        if self.kind == "range":
            return rng.randint(low, high) if self.whole else self.rounded(rng.uniform(low, high))
        margin = 0.5 if self.whole else 0.0
        return self.rounded(math.exp(rng.uniform(math.log(low - margin), math.log(high + margin))))

    def rounded(self, number: float) -> float | int:
        """Round to ``DIGITS`` significant digits, or to an integer, and clamp to the range."""
        low, high = self.values
        value = round(number) if self.whole else float(f"{number:.{DIGITS}g}")
        return min(max(value, low), high)

    def samples(self) -> tuple[Any, ...]:
        """A few values that cover the domain: all choices, or both ends and the middle."""
        if self.kind == "choice":
            return self.values
        low, high = self.values
        middle = math.sqrt(low * high) if self.kind == "log" else (low + high) / 2
        return tuple(dict.fromkeys((low, self.rounded(middle), high)))


def parse_space(value: Any, trains: type[Settings]) -> dict[str, Domain]:
    """Parse and validate a search space.

    Args:
        value: {flag: choices or range}, or the same as YAML text.
        trains: Settings class of the training job, which validates every value.
    Raises:
        ValueError: With one line for every error.
    """
    value = yaml_value(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise ValueError(f"needs flags and their values, such as {{lora_r: [4, 8]}}, not {value!r}")
    names, domains, errors = flag_names(trains), dict[str, Domain](), list[str]()
    for key, domain in value.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            errors.append(f"{key}: no flag of the training job")
        elif name in domains:
            errors.append(f"{key}: given twice")
        elif reason := FIXED.get(name) or flag_metadata(trains.model_fields[name]).no_effect:
            errors.append(f"{key}: cannot be swept: {reason}")
        else:
            try:
                domains[name] = _parse_domain(name, domain, trains)
            except ValueError as error:
                errors.append(f"{key}: {error}")
    if errors:
        raise ValueError("\n".join(errors))
    return domains


def _parse_domain(name: str, domain: Any, trains: type[Settings]) -> Domain:
    if not (isinstance(domain, Mapping) and {"choice", "range", "log"} & set(domain)):
        try:
            return _parse_choices(name, domain, trains)
        except ValueError:
            if isinstance(domain, Mapping):  # nor is it the value of a flag that takes a mapping, {asr: 1, sqa: 2}
                raise ValueError(f"{SYNTAX}, not {domain!r}") from None
            raise
    if len(domain) != 1:
        raise ValueError(f"{SYNTAX}, not {domain!r}")
    ((kind, values),) = domain.items()
    if kind == "choice":
        return _parse_choices(name, values, trains)
    whole = trains.model_fields[name].annotation is int
    if not whole and trains.model_fields[name].annotation is not float:
        raise ValueError(f"{kind} is for numbers; give a list of choices")
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise ValueError(f"{kind} needs two numbers, the lowest and the highest, not {values!r}")
    low, high = (_validate(name, end, trains) for end in values)
    if not low < high:
        raise ValueError(f"{kind}: {low!r} is not below {high!r}")
    if kind == "log" and low <= 0:
        raise ValueError(f"log: {low!r} is not above 0")
    return Domain(name, kind, (low, high), whole)


def _parse_choices(name: str, choices: Any, trains: type[Settings]) -> Domain:
    """Parse a list of choices; anything but a list is a single choice."""
    values, errors = list[Any](), list[str]()
    for choice in choices if isinstance(choices, list | tuple) else [choices]:
        try:
            value = _validate(name, choice, trains)
        except ValueError as error:
            errors.append(str(error))
            continue
        if value in values:
            errors.append(f"{choice!r} is given twice")
        values.append(value)
    if errors or not values:
        raise ValueError("; ".join(errors) or "has no choices")
    return Domain(name, "choice", tuple(values))


def _validate(name: str, value: Any, trains: type[Settings]) -> Any:
    """Validate a value with the training job's field and return it in JSON types.

    Raises:
        ValueError: The value is invalid. The message is one line.
    """
    field = trains.model_fields[name]
    if isinstance(value, bool) and field.annotation is not bool:
        raise ValueError(f"{value!r}: is not true or false")
    adapter = field_adapter(field)
    try:
        validated = adapter.validate_python(value)
    except ValidationError as error:
        reasons = dict.fromkeys(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ValueError(f"{value!r}: {'; '.join(reasons)}") from None
    if isinstance(validated, float) and not math.isfinite(validated):
        raise ValueError(f"{value!r}: is not finite")
    return adapter.dump_python(validated, mode="json")


def as_yaml(domain: Domain) -> Any:
    """The domain in the YAML syntax of a search space."""
    return {domain.kind: list(domain.values)}


def choice_key(choice: Choice) -> str:
    """A string that is the same for equal choices."""
    return json.dumps(choice, sort_keys=True, ensure_ascii=False)


def format_value(value: Any) -> str:
    """The value as written on the command line."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={format_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(format_value, value))
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return f"{value:.{DIGITS + 2}g}" if isinstance(value, float) else str(value)


def format_choice(choice: Choice) -> str:
    """The choice on one line: ``lora_r 8, lr 0.001``."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in choice.items())
