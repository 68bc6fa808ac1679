"""A task, and the form in which YAML files define the built-in tasks and the tasks of users."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from voxray.core.languages import language_name

ERROR_RATES = ("cer_nospace", "cer", "wer", "swer")
"""Headline metrics of transcripts."""
TRANSLATION_METRICS = ("bleu", "chrf")
"""Headline metrics of translations, from 0 to 100. A task with another headline is scored as free text."""
HEADLINE_METRICS = (*ERROR_RATES, "exact_match", "rouge_l", "char_f1", *TRANSLATION_METRICS)
"""Metrics computed from sums over rows, as intervals, slices and the mean over tasks need them."""
TASK_METRICS = (*HEADLINE_METRICS, "cider_d")
MAX_TASKS = 100
"""The index of a feature set stores the position of a task in 8 bits."""
RESERVED = frozenset(
    ("overall", "slices", "normalizer", "signatures", "intervals", "not_available", "counts", "terms", "unlabelled")
) | {"long_audio", "batch_invariance", "loss", "unknown", "replay"}
"""Names beside those of tasks in metrics.json, metrics.jsonl and audit.json."""
TARGET_LANGUAGE = "target_language"
LANGUAGE_KEYS = ("language", TARGET_LANGUAGE)
"""Keys of a row that hold languages. A prompt shows their English names."""
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_KEY_IN_BRACES = re.compile(r"\{([A-Za-z_]\w*)\}")


Template = Literal["transcription", "translation", "chat", "conversation"]


@dataclass(frozen=True)
class Task:
    """One kind of training row.

    Attributes:
        name: Short name, used in flags, metrics and predictions.
        keys: Keys that a row must have. A row belongs to the first task whose keys it has all.
        template: ``transcription`` (the model's own transcription request), ``translation`` (the model's own
            translation request if it has one, else the user message), ``chat`` (one user message) or ``conversation``
            (the messages of the row, see ``core/chat.py``).
        prompt_text: The user message, with keys of the row in braces (see ``prompt``).
        answer_key: Key of the text that the model is to produce.
        metrics: Names of the metrics reported everywhere, the headline metric first. Evaluation adds the others of
            the same kind (``metrics/names.py``).
        allows_empty_answer: Whether "" is a valid answer (nobody speaks in the clip). Otherwise such a row is refused.
        default_prompt: The user message of a row without any of the texts in ``prompt_text``.
    """

    name: str
    keys: tuple[str, ...]
    template: Template
    prompt_text: str
    answer_key: str
    metrics: tuple[str, ...]
    allows_empty_answer: bool = False
    default_prompt: str = ""

    @property
    def has_audio(self) -> bool:
        return "audio_path" in self.keys

    @cached_property
    def prompt_keys(self) -> tuple[str, ...]:
        """Keys whose texts are in the user message."""
        return tuple(dict.fromkeys(_KEY_IN_BRACES.findall(self.prompt_text)))

    @property
    def asks(self) -> bool:
        """Whether each row has a request of its own, so that rows with equal audio may differ."""
        return bool(self.prompt_keys) or self.template == "conversation"

    @property
    def kind(self) -> Literal["asr", "ast", "sqa", "tqa"]:
        """The built-in task of the same form: asr for transcriptions, ast for translations, sqa for other tasks with
        audio, tqa for text."""
        if self.template in ("chat", "conversation"):
            return "sqa" if self.has_audio else "tqa"
        return "asr" if self.template == "transcription" else "ast"

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The user's text of a row; empty for a plain transcription request.

        Keys that are missing or empty are left out, with the blanks before them. A line that holds only such keys is
        left out. Languages appear by their English names.

        Raises:
            BadRow: A key of ``LANGUAGE_KEYS`` in the prompt holds no known language (``bad_language``).
        """
        lines = [(line, _fill(line, row)) for line in self.prompt_text.split("\n")]
        texts = [text for line, text in lines if text or not _KEY_IN_BRACES.search(line)]
        return "\n".join(texts) or self.default_prompt

    @property
    def definition(self) -> dict[str, Any]:
        """The task as a file defines it."""
        request = {} if self.template == "chat" else {"template": self.template}
        request |= {"prompt": self.prompt_text} if self.prompt_text else {}
        optional = {"allow_empty_answer": True} if self.allows_empty_answer else {}
        optional |= {"default_prompt": self.default_prompt} if self.default_prompt else {}
        texts = {"answer": self.answer_key, "metrics": list(self.metrics)}
        return {"keys": list(self.keys), **request, **texts, **optional}


def _fill(line: str, row: Mapping[str, Any]) -> str:
    text, *rest = _KEY_IN_BRACES.split(line)
    for key, following in zip(rest[::2], rest[1::2], strict=True):
        value = language_name(row.get(key), key) if key in LANGUAGE_KEYS else row.get(key)
        text = f"{text}{value}" if value else text.rstrip(" ")
        text += following if text else following.lstrip(" ")
    return text


def read_definitions(definitions: Mapping[Any, Any], built_in: Mapping[str, Task]) -> dict[str, Task]:
    """Check the definitions of tasks.

    Args:
        definitions: {name: {"keys", "prompt" or "template", "answer", "metrics", ...}}, as in a YAML file.
        built_in: Tasks whose names are taken; empty for the built-in tasks themselves.
    Returns:
        {name: task}, in the order of the file.
    Raises:
        ValueError: The message has one line for each mistake, which names the task and the key.
    """
    tasks: dict[str, Task] = {}
    errors = [f"{len(definitions)} tasks; {MAX_TASKS} at most"] if len(definitions) > MAX_TASKS else []
    for name, values in definitions.items():
        try:
            _check_name(name, built_in)
            tasks[name] = _read_task(name, values, is_built_in=not built_in)
            _refuse_hidden(tasks[name], tasks)
        except ValueError as error:
            errors.append(f"{name}: {error}")
    if errors:
        raise ValueError("\n".join(errors))
    return tasks


def _check_name(name: Any, built_in: Mapping[str, Task]) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("a task's name is lower-case letters, digits and _, at most 32, and starts with a letter")
    if name in built_in or name in RESERVED:
        raise ValueError(f"is {'a built-in task' if name in built_in else 'reserved'}; give the task another name")


def _refuse_hidden(task: Task, tasks: Mapping[str, Task]) -> None:
    """Refuse a task that no row can have, because an earlier one needs no other keys."""
    for other in tasks.values():
        if other is not task and set(other.keys) <= set(task.keys):
            raise ValueError(f"keys: {other.name}, which comes first, takes every row with them; put {task.name} first")


def _read_task(name: str, values: Any, *, is_built_in: bool) -> Task:
    """One task of a file.

    Raises:
        ValueError: The message names the key.
    """
    known = ("keys", "prompt", "template", "answer", "metrics", "allow_empty_answer", "default_prompt")
    if not isinstance(values, Mapping):
        raise ValueError(f"needs {', '.join(known[:2])}, {', '.join(known[3:5])}")
    for key in values:
        if key not in known:
            raise ValueError(f"{key}: unknown key; known: {', '.join(known)}")
    keys, metrics = _names(values, "keys"), _names(values, "metrics")
    answer, allows_empty = values.get("answer"), values.get("allow_empty_answer", False)
    if answer not in keys:
        raise ValueError(f"answer: {answer!r} is not one of keys ({', '.join(keys)})")
    if not isinstance(allows_empty, bool):
        raise ValueError(f"allow_empty_answer: must be true or false, not {allows_empty!r}")
    _check_metrics(metrics)
    template: Any = values.get("template", "chat")
    if template not in ("chat", "transcription", "conversation") and not (is_built_in and template == "translation"):
        choices = "transcription or conversation"
        raise ValueError(f"template: must be {choices}, or left out for a prompt, not {template!r}")
    prompt_text, default = _text(values, "prompt"), _text(values, "default_prompt")
    task = Task(name, keys, template, prompt_text, answer, metrics, allows_empty, default)
    _check_request(task)
    return task


def _names(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = values.get(key)
    if not (isinstance(names, list) and names and all(isinstance(name, str) and name for name in names)):
        raise ValueError(f"{key}: must be a list of names, such as [a, b]")
    if len(set(names)) < len(names):
        raise ValueError(f"{key}: a name is there twice")
    return tuple(names)


def _text(values: Mapping[str, Any], key: str) -> str:
    text = values.get(key, "")
    if not isinstance(text, str):
        raise ValueError(f"{key}: must be text, not {text!r}")
    return text.strip()


def _check_metrics(metrics: tuple[str, ...]) -> None:
    for metric in metrics:
        if metric not in TASK_METRICS:
            raise ValueError(f"metrics: {metric!r} is not one of {', '.join(TASK_METRICS)}")
    if metrics[0] not in HEADLINE_METRICS:
        raise ValueError(f"metrics: {metrics[0]} cannot come first; {', '.join(HEADLINE_METRICS)} can")
    if "cider_d" in metrics and metrics[0] in (*ERROR_RATES, *TRANSLATION_METRICS):
        raise ValueError(f"metrics: cider_d is for captions, so {metrics[0]} cannot come first")
    for metric in TRANSLATION_METRICS:
        if metric in metrics and metrics[0] in ERROR_RATES:
            raise ValueError(f"metrics: {metric} is not for transcripts, so {metrics[0]} cannot come first")


def _check_request(task: Task) -> None:
    """Check ``template``, ``prompt`` and ``default_prompt`` together."""
    if task.template == "conversation":
        if task.prompt_text or task.default_prompt or task.answer_key != "messages":
            raise ValueError("template: conversation needs answer: messages, and no prompt")
    elif task.template == "transcription":
        if task.prompt_text or task.default_prompt:
            raise ValueError("template: transcription is the model's own request; leave the prompt out")
        if not task.has_audio:
            raise ValueError("keys: template transcription needs audio_path")
    elif not task.prompt_text:
        raise ValueError("prompt: is missing; template: transcription is the model's own transcription request")
    if task.answer_key in task.prompt_keys:
        raise ValueError(f"prompt: holds the answer, {{{task.answer_key}}}")
    if task.default_prompt and task.prompt({}) != task.default_prompt:
        raise ValueError("default_prompt: is never used, because the prompt has words of its own")
