"""SALMONN's prompts: several per task, one of which is sampled for each row and epoch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxray.core.errors import RunError, one_line
from voxray.core.tasks import TASKS
from voxray.corpora.importers.salmonn import OTHER_CAPTION_REQUEST
from voxray.models.front_end import with_context_line

AUDIO_MARK = "<SpeechHere>"
QUESTION_MARK = "{}"
QUESTION = f"<Speech>{AUDIO_MARK}</Speech> {QUESTION_MARK}"
OTHER_CAPTIONS = "audiocaption_v2"
OFFICIAL_TASKS = {"audiocaption": "aac", "QA": "sqa"}
DEFAULTS = {
    "asr": (f"<Speech>{AUDIO_MARK}</Speech> Recognize the speech and give me the transcription.",),
    "sqa": (QUESTION,),
    "aac": (f"<Speech>{AUDIO_MARK}</Speech> Please describe the audio.",),
    OTHER_CAPTIONS: (f"<Speech>{AUDIO_MARK}</Speech> {OTHER_CAPTION_REQUEST}",),
}
"""SALMONN's own prompts for testing."""


@dataclass(frozen=True)
class Prompts:
    """Prompts by task.

    Attributes:
        by_task: {task: prompts}, for voxray's tasks and audiocaption_v2. Every prompt contains ``AUDIO_MARK`` where the
            audio goes, and may contain ``QUESTION_MARK`` where the row's question goes.
        left_out: Entries of a file that are not used, for a message: prompts without audio, and tasks that voxray does
            not have.
    """

    by_task: Mapping[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Hash of all prompts."""
        prompts_by_task = {task: list(prompts) for task, prompts in self.by_task.items()}
        return hashlib.sha256(json.dumps(prompts_by_task, sort_keys=True).encode()).hexdigest()

    def choices(self, task: str, question: str) -> tuple[str, ...]:
        """The prompts that a row with this question may get."""
        if not TASKS[task].has_audio:
            return (QUESTION_MARK,)
        if question == OTHER_CAPTION_REQUEST:
            return self.by_task[OTHER_CAPTIONS]
        is_own = question != TASKS[task].default_prompt and TASKS[task].template != "translation"
        has_own_question = bool(question) and is_own
        is_transcription = TASKS[task].kind == "asr"
        own = self.by_task["asr"] if is_transcription else (QUESTION,)
        prompts = self.by_task.get(task, own)
        if is_transcription and question:  # the question is the row's context
            return tuple(p if QUESTION_MARK in p else with_context_line(p, QUESTION_MARK) for p in prompts)
        return tuple(QUESTION if has_own_question and QUESTION_MARK not in prompt else prompt for prompt in prompts)

    def default(self, task: str, question: str) -> str:
        """The prompt that evaluation uses: the first choice."""
        return self.choices(task, question)[0]

    def sample(self, task: str, question: str, row_id: str, *, seed: int, epoch: int) -> str:
        """The prompt of a row in one epoch. It depends on the arguments only, on every machine."""
        digest = hashlib.sha256(f"{seed} {epoch} {row_id}".encode(errors="surrogatepass")).digest()
        choices = self.choices(task, question)
        return choices[int.from_bytes(digest[:8], "big") % len(choices)]


def read_prompts(path: str | Path) -> Prompts:
    """Read ``{task: prompt}`` or ``{task: [prompts]}`` from YAML or JSON, under voxray's or SALMONN's task names.

    Tasks that are not in the file keep their defaults.

    Raises:
        RunError: The file cannot be read or has another structure.
    """
    by_task: dict[str, tuple[str, ...]] = {}
    left_out = []
    for name, prompts in _read(path).items():
        if isinstance(prompts, str):
            prompts = [prompts]
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise RunError(f"{path}: {name}: needs a prompt or a list of prompts")
        task = OFFICIAL_TASKS.get(name, name)
        usable = tuple(prompt for prompt in prompts if AUDIO_MARK in prompt)
        if task != OTHER_CAPTIONS and (task not in TASKS or not TASKS[task].has_audio):
            left_out.append(f"task {name}")
            continue
        left_out += [f"{name}: {prompt}" for prompt in prompts if prompt not in usable]
        if usable:
            by_task[task] = by_task.get(task, ()) + usable
    return Prompts({**DEFAULTS, **by_task}, tuple(left_out))


def _read(path: str | Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot read the prompts: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: no YAML: {one_line(error, 200)}") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise RunError(f"{path}: needs {{task: prompts}}")
    return content
