"""The task table: which keys identify a task's rows, its prompt, its answer and its metrics.

A row's task follows from its keys, so manifests may mix tasks. ``tasks.yaml`` has the built-in tasks. A job adds the
tasks of a user's file (``--tasks_file``), and passes them to Ray's processes in an environment variable.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from voxray.core.chat import task_keys
from voxray.core.errors import is_utf8_text
from voxray.core.task_definitions import Task, read_definitions
from voxray.core.yaml_file import read_yaml

VARIABLE = "VOXRAY_TASKS"
"""Environment variable with the own tasks of a job, as JSON."""
MAX_CHARS = 32_000
"""Longest JSON of own tasks. The system limits the arguments and variables of a process."""
BUILT_IN = read_definitions(read_yaml(Path(__file__).with_name("tasks.yaml")), {})
DETECTION_ORDER = sorted(BUILT_IN.values(), key=lambda task: task.template != "translation")
"""The built-in tasks in the order of detection. A row with a translation may also have the transcript."""
TASKS: dict[str, Task] = {}
"""All tasks: the built-in ones, then the user's own in the order of their file."""
TASK_CODES: dict[str, int] = {}
"""{task: its position in ``TASKS``}, which feature shards store."""


NO_TARGET = ("target_language", "")
"""A cell of a table whose other rows are translations."""


def use_own_tasks(tasks: Mapping[str, Task]) -> None:
    """Replace the own tasks of this process; an empty mapping leaves the built-in ones."""
    for table in (TASKS, TASK_CODES):
        table.clear()
    TASKS.update({**BUILT_IN, **tasks})
    TASK_CODES.update({name: code for code, name in enumerate(TASKS)})


def own_tasks() -> dict[str, Task]:
    """The tasks that are not built in."""
    return {name: task for name, task in TASKS.items() if name not in BUILT_IN}


def own_definitions() -> dict[str, Any]:
    """{name: definition} of the own tasks, as their file has them."""
    return {name: task.definition for name, task in own_tasks().items()}


def parse_own_tasks(definitions: Mapping[Any, Any]) -> dict[str, Task]:
    """Check the definitions of own tasks (see ``read_definitions``).

    Raises:
        ValueError: As ``read_definitions``, or the definitions are too long.
    """
    tasks = read_definitions(definitions, BUILT_IN)
    checked = {name: task.definition for name, task in tasks.items()}
    if not is_utf8_text(json.dumps(checked, ensure_ascii=False)):
        raise ValueError("holds half of a surrogate pair")
    if (size := len(json.dumps(checked))) > MAX_CHARS:
        raise ValueError(f"takes {size:,} characters as JSON; {MAX_CHARS:,} at most")
    return tasks


use_own_tasks(parse_own_tasks(json.loads(os.environ.get(VARIABLE) or "{}")))
POSITIONAL_TASKS: tuple[str, ...] = ("asr", "sqa", "tqa")
"""Tasks of a positional ``--task_weights 1.0,1.5,1.2``. Weights of other tasks are set by name."""


def detect_task(row: Mapping[str, Any]) -> Task:
    """Detect the task of a manifest row by its keys. Own tasks come before the built-in ones, of which ast comes first.

    Exports of tables have all columns in every row. So keys without a value count only if the others match no task.

    Raises:
        ValueError: The keys match no task. The message lists the keys of each task.
    """
    with_values = {key: value for key, value in row.items() if not (value is None or (key, value) == NO_TARGET)}
    for keys in (task_keys(with_values), task_keys(row)):
        for task in (*own_tasks().values(), *DETECTION_ORDER):
            if all(key in keys for key in task.keys):
                return task
    required = "; ".join(f"{task.name}: {', '.join(task.keys)}" for task in TASKS.values())
    raise ValueError(f"keys {', '.join(map(str, row)) or '(none)'} match no task ({required})")


def template_codes(*templates: str) -> list[int]:
    """Codes of the tasks with one of some templates (``Task.template``)."""
    return [TASK_CODES[name] for name, task in TASKS.items() if task.template in templates]


def single_turn_tasks() -> tuple[str, ...]:
    """The tasks whose rows have one request each, for models that answer no conversations."""
    return tuple(name for name, task in TASKS.items() if task.template != "conversation")


def with_own_tasks(names: Iterable[str]) -> tuple[str, ...]:
    """Tasks of a recipe or a model, and the own tasks of the same kind (``Task.kind``) as one of them."""
    names = tuple(names)
    return tuple(dict.fromkeys((*names, *(name for name, task in own_tasks().items() if task.kind in names))))


def parse_task_sizes(value: Any) -> dict[str, int]:
    """Read ``asr=4,sqa=2,tqa=8`` into {task: rows}.

    Raises:
        ValueError: A task is unknown or occurs twice, or a number is not a positive integer.
    """
    if isinstance(value, str):
        pairs = [part.strip().partition("=")[::2] for part in value.split(",") if part.strip()]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        raise ValueError("needs task=number pairs, such as asr=4,sqa=2")
    sizes: dict[str, int] = {}
    for name, number in pairs:
        if _known_task(name) in sizes:
            raise ValueError(f"task {name!r} is given twice")
        if isinstance(number, bool) or not str(number).isdecimal() or int(number) < 1:
            raise ValueError(f"the number for {name} must be whole and above 0, not {number!r}")
        sizes[name] = int(number)
    return sizes


def parse_curriculum(value: Any) -> tuple[tuple[tuple[str, ...], int], ...]:
    """Read ``tqa:1,tqa+asr:1,tqa+asr+sqa:3`` (tasks:epochs of every phase) into ((tasks, epochs), ...).

    Raises:
        ValueError: A task is unknown or occurs twice in a phase, or a number of epochs is not a positive integer.
    """
    if not isinstance(value, str):
        value = ",".join(f"{'+'.join(tasks)}:{epochs}" for tasks, epochs in value)
    phases = []
    for part in filter(None, map(str.strip, value.split(","))):
        tasks, _, epochs = part.partition(":")
        if not epochs.strip().isdecimal() or int(epochs) < 1:
            raise ValueError(f"{part!r}: write tasks:epochs, such as tqa+asr:2")
        names = tuple(_known_task(name.strip()) for name in tasks.split("+"))
        if len(set(names)) < len(names):
            raise ValueError(f"{part!r}: a task is given twice")
        phases.append((names, int(epochs)))
    return tuple(phases)


def _known_task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return name


def parse_task_weights(value: Any) -> dict[str, float]:
    """Read ``1.0,1.5,1.2`` (for asr, sqa, tqa) or ``asr=1,aac=1.5`` into {task: relative share}.

    Raises:
        ValueError: A task is unknown or occurs twice, a number is missing, negative or not finite, or no weight is
            positive.
    """
    required = f"needs {len(POSITIONAL_TASKS)} numbers, for {', '.join(POSITIONAL_TASKS)}, or task=number pairs"
    if isinstance(value, Mapping):
        pairs = [(str(name), weight) for name, weight in value.items()]
    else:
        if not isinstance(value, str | list | tuple):
            raise ValueError(required)
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else list(value)
        if any("=" in str(part) for part in parts):
            pairs = [tuple(str(part).split("=", 1)) for part in parts if "=" in str(part)]
            if len(pairs) != len(parts):
                raise ValueError("write every weight as task=number, or none of them")
        elif len(parts) == len(POSITIONAL_TASKS):
            pairs = list(zip(POSITIONAL_TASKS, parts, strict=True))
        else:
            raise ValueError(required)
    weights: dict[str, float] = {}
    for name, text in pairs:
        if _known_task(name) in weights:
            raise ValueError(f"task {name!r} is given twice")
        try:
            weights[name] = float(text)
        except (TypeError, ValueError):
            raise ValueError(f"{text!r} is not a number") from None
        if not 0 <= weights[name] < float("inf"):
            raise ValueError(f"the weight of {name} must be 0 or more, not {text}")
    if not any(weights.values()):
        raise ValueError("at least one weight must be above 0")
    return weights
