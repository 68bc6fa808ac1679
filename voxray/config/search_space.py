"""The search space of a sweep: which values its trials give to a flag, as YAML says it.

::

    space:
      lora_r: [4, 8, 16]              # choices; task_weights: ["1,1,1", "asr=2,tqa=1"] too
      lr: {log: [1e-5, 1e-3]}         # a number between the two, drawn evenly in its logarithm
      lora_dropout: {range: [0, 0.2]} # the same, drawn evenly; whole numbers for a flag that takes whole ones
"""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from voxray.config.parse import Settings, field_adapter, flag_metadata, flag_names, yaml_value

DIGITS = 4
"""Significant digits of a drawn number, so that people can read and repeat it."""
SYNTAX = "write a list of choices, {range: [lowest, highest]} or {log: [lowest, highest]}"
SAME_ROWS = "trials are compared on the same validation rows"
ONE_BASE = "the base is put together once; sweep model_id"
FIXED: Mapping[str, str] = {
    "output_dir": "every trial has a folder of its own",
    "storage_path": "every trial has a folder of its own",
    "features_dir": "trials share their shards",
    "overwrite": "it is the sweep that starts afresh",
    "num_workers": "all trials take as many processes",
    "val_jsonl": SAME_ROWS,
    "eval_max_rows": SAME_ROWS,
    **dict.fromkeys(("whisper_path", "beats_path", "llama_path", "end_sym", "audio_prefix"), ONE_BASE),
}
"""Flags that no trial can have for itself, and why."""

Choice = dict[str, Any]
"""{flag: value} of one trial; values as JSON holds them."""


@dataclass(frozen=True)
class Domain:
    """What one flag may be.

    Attributes:
        name: The settings field.
        kind: ``choice`` is one of the values, ``range`` and ``log`` a number between the two.
        values: The choices as JSON holds them, or the lowest and the highest number.
        whole: Whether numbers are whole.
    """

    name: str
    kind: Literal["choice", "range", "log"]
    values: tuple[Any, ...]
    whole: bool = False

    @property
    def size(self) -> float:
        """How many values there are; infinite for a range of fractions."""
        if self.kind == "choice":
            return len(self.values)
        return self.values[1] - self.values[0] + 1 if self.whole else math.inf

    def all(self) -> tuple[Any, ...]:
        """Every value, where their number has an end."""
        return self.values if self.kind == "choice" else tuple(range(self.values[0], self.values[1] + 1))

    def draw(self, rng: random.Random) -> Any:
        """One value at random."""
        if self.kind == "choice":
            return rng.choice(self.values)
        low, high = self.values
        if self.kind == "range":
            return rng.randint(low, high) if self.whole else self.tidy(rng.uniform(low, high))
        margin = 0.5 if self.whole else 0.0
        return self.tidy(math.exp(rng.uniform(math.log(low - margin), math.log(high + margin))))

    def tidy(self, number: float) -> float | int:
        """The number as it is used: rounded, and within the ends."""
        low, high = self.values
        rounded = round(number) if self.whole else float(f"{number:.{DIGITS}g}")
        return min(max(rounded, low), high)

    def samples(self) -> tuple[Any, ...]:
        """A few values that stand for all: the choices, or both ends and a middle."""
        if self.kind == "choice":
            return self.values
        low, high = self.values
        middle = math.sqrt(low * high) if self.kind == "log" else (low + high) / 2
        return tuple(dict.fromkeys((low, self.tidy(middle), high)))


def parse_space(value: Any, trains: type[Settings]) -> dict[str, Domain]:
    """Read a space.

    Args:
        value: {flag: choices or range}, or that as text in YAML.
        trains: Settings of the training job, which checks every value.
    Raises:
        ValueError: With a line for everything that is wrong.
    """
    value = yaml_value(value) if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise ValueError(f"needs flags and their values, such as {{lora_r: [4, 8]}}, not {value!r}")
    names, found, faults = flag_names(trains), dict[str, Domain](), list[str]()
    for key, said in value.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            faults.append(f"{key}: no flag of the training job")
        elif name in found:
            faults.append(f"{key}: given twice")
        elif reason := FIXED.get(name) or flag_metadata(trains.model_fields[name]).no_effect:
            faults.append(f"{key}: cannot be swept: {reason}")
        else:
            try:
                found[name] = _domain(name, said, trains)
            except ValueError as error:
                faults.append(f"{key}: {error}")
    if faults:
        raise ValueError("\n".join(faults))
    return found


def _domain(name: str, said: Any, trains: type[Settings]) -> Domain:
    if not (isinstance(said, Mapping) and {"choice", "range", "log"} & set(said)):
        try:
            return _choices(name, said, trains)
        except ValueError:
            if isinstance(said, Mapping):  # not even a value of a flag that takes such, {asr: 1, sqa: 2}
                raise ValueError(f"{SYNTAX}, not {said!r}") from None
            raise
    if len(said) != 1:
        raise ValueError(f"{SYNTAX}, not {said!r}")
    ((kind, values),) = said.items()
    if kind == "choice":
        return _choices(name, values, trains)
    whole = trains.model_fields[name].annotation is int
    if not whole and trains.model_fields[name].annotation is not float:
        raise ValueError(f"{kind} is for numbers; give a list of choices")
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise ValueError(f"{kind} needs two numbers, the lowest and the highest, not {values!r}")
    low, high = (_checked(name, end, trains) for end in values)
    if not low < high:
        raise ValueError(f"{kind}: {low!r} is not below {high!r}")
    if kind == "log" and low <= 0:
        raise ValueError(f"log: {low!r} is not above 0")
    return Domain(name, kind, (low, high), whole)


def _choices(name: str, said: Any, trains: type[Settings]) -> Domain:
    """A list of choices; anything else is one choice."""
    values, faults = list[Any](), list[str]()
    for value in said if isinstance(said, list | tuple) else [said]:
        try:
            checked = _checked(name, value, trains)
        except ValueError as error:
            faults.append(str(error))
            continue
        if checked in values:
            faults.append(f"{value!r} is given twice")
        values.append(checked)
    if faults or not values:
        raise ValueError("; ".join(faults) or "has no choices")
    return Domain(name, "choice", tuple(values))


def _checked(name: str, value: Any, trains: type[Settings]) -> Any:
    """A value as the training job reads it, in JSON's types.

    Raises:
        ValueError: It refuses it; one line.
    """
    field = trains.model_fields[name]
    if isinstance(value, bool) and field.annotation is not bool:
        raise ValueError(f"{value!r}: is no switch")
    read = field_adapter(field)
    try:
        checked = read.validate_python(value)
    except ValidationError as error:
        reasons = dict.fromkeys(item["msg"].removeprefix("Value error, ") for item in error.errors())
        raise ValueError(f"{value!r}: {'; '.join(reasons)}") from None
    if isinstance(checked, float) and not math.isfinite(checked):
        raise ValueError(f"{value!r}: is not finite")
    return read.dump_python(checked, mode="json")


def as_yaml(domain: Domain) -> Any:
    """A domain in the words of the YAML file, every value as it was read."""
    return {domain.kind: list(domain.values)}


def choice_key(choice: Choice) -> str:
    """What two equal choices have in common."""
    return json.dumps(choice, sort_keys=True, ensure_ascii=False)


def shown(value: Any) -> str:
    """A value as people write it on the command line."""
    if isinstance(value, Mapping):
        return ",".join(f"{name}={shown(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value))
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return f"{value:.{DIGITS + 2}g}" if isinstance(value, float) else str(value)


def described(choice: Choice) -> str:
    """A choice in one line: ``lora_r 8, lr 0.001``."""
    return ", ".join(f"{name} {shown(value)}" for name, value in choice.items())
