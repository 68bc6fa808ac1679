"""The task table: which keys identify a task's rows, its prompt, its answer and its metrics.

A row's task follows from its keys, so manifests may mix tasks. To add a task, append an entry to ``TASKS``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Task:
    """One kind of training row.

    Attributes:
        name: Short name, used in flags, metrics and predictions.
        keys: Keys that a row must have. A row belongs to the first task whose keys it has all.
        template: ``transcription`` (the model's own transcription request) or ``chat`` (one user message).
        prompt_keys: Keys whose texts form the user message, joined by a newline. Empty texts are left out.
        default_prompt: The user message of a row without any of these texts.
        answer_key: Key of the text that the model is to produce.
        metrics: Names of the metrics reported everywhere, the headline metric first. Evaluation adds the others of
            the same kind (``metrics/names.py``).
        allows_empty_answer: Whether "" is a valid answer (nobody speaks in the clip). Otherwise such a row is refused.
    """

    name: str
    keys: tuple[str, ...]
    template: Literal["transcription", "chat"]
    prompt_keys: tuple[str, ...]
    answer_key: str
    metrics: tuple[str, ...]
    allows_empty_answer: bool = False
    default_prompt: str = ""

    @property
    def has_audio(self) -> bool:
        return "audio_path" in self.keys

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The user's text of a row; empty for a plain transcription request."""
        return "\n".join(str(row[key]) for key in self.prompt_keys if row.get(key)) or self.default_prompt


SPEECH_METRICS = ("cer_nospace", "cer", "wer", "swer", "exact_match")
ANSWER_METRICS = ("rouge_l", "exact_match")
CAPTION_METRICS = ("rouge_l", "exact_match", "cider_d")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("asr", ("audio_path", "transcript"), "transcription", (), "transcript", SPEECH_METRICS, True),
        Task("sqa", ("audio_path", "question", "answer"), "chat", ("question",), "answer", ANSWER_METRICS),
        Task("tqa", ("instruction", "output"), "chat", ("instruction", "input"), "output", ANSWER_METRICS),
        Task(
            "aac",
            ("audio_path", "caption"),
            "chat",
            ("question",),
            "caption",
            CAPTION_METRICS,
            default_prompt="Please describe the audio.",  # SALMONN's own request for a caption
        ),
    )
}
"""Append new tasks at the end: feature shards store a task's index, so the order must not change."""
POSITIONAL_TASKS: tuple[str, ...] = ("asr", "sqa", "tqa")
"""Tasks of a positional ``--task_weights 1.0,1.5,1.2``. Weights of other tasks are set by name."""


def detect_task(row: Mapping[str, Any]) -> Task:
    """Detect the task of a manifest row by its keys.

    Raises:
        ValueError: The keys match no task. The message lists the keys of each task.
    """
    for task in TASKS.values():
        if all(key in row for key in task.keys):
            return task
    required = "; ".join(f"{task.name}: {', '.join(task.keys)}" for task in TASKS.values())
    raise ValueError(f"keys {', '.join(map(str, row)) or '(none)'} match no task ({required})")


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
