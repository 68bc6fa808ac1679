"""What the demo's page asks of a model: its answer to a clip or a question, and the base's beside it."""

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from voxray.audio.decode import decode_native, header_seconds
from voxray.config.demo import DemoSettings
from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import language_code
from voxray.core.tasks import TASKS
from voxray.evaluation.predictions import metrics_by_task, with_counts
from voxray.features.extract import Extractor, FeatureSpec
from voxray.generation.generate import Completion, failure_reason
from voxray.generation.model import (
    InferenceConfig,
    base_and_adapter,
    inference_config,
    load_model,
    match_training_prompts,
)
from voxray.generation.requests import AnswerRequest, answer_requests, make_request, make_sample
from voxray.models.registry import get_family


class Unanswered(Exception):
    """Why a request has no answer; the message is the line that the page shows."""


class _Stopping(BaseException):
    """Ends an answer between two tokens; no Exception, since what a model raises is taken as the row's fault."""


@dataclass(frozen=True)
class DemoRequest:
    """What somebody asks.

    Attributes:
        audio_path: The clip, or "" for a question in text.
        question: About the clip; "" asks for its transcript.
        language: Of the clip, or "" to let the model find out.
        reference: What the right answer is, as far as it is known; answers are scored against it.
        compare: Ask the base as well.
    """

    audio_path: str = ""
    question: str = ""
    language: str = ""
    reference: str = ""
    compare: bool = False


@dataclass(frozen=True)
class DemoAnswer:
    """One model's answer.

    Attributes:
        is_base: Whether the adapter was switched off for it.
        audio_sec: Length of the clip; 0 without one.
        sec: From the file to the text: decoding, features and generation. Waiting for others is not counted.
        num_tokens: Tokens of the answer.
        hit_max: Whether it was cut off at the longest answer.
        num_chunks: Parts in which a long recording was answered; 1 for all others.
        metrics: Of the task, against the reference; {} without one.
    """

    is_base: bool
    text: str
    audio_sec: float
    sec: float
    num_tokens: int
    hit_max: bool
    num_chunks: int
    metrics: dict[str, float]

    @property
    def rtfx(self) -> float:
        """Seconds of audio answered in a second."""
        return self.audio_sec / self.sec


class DemoModel:
    """A loaded model that answers one request after the other.

    Args:
        model: As ``answerer.load_model`` gives it.
        how: What it was loaded by.
        max_audio_sec: Longest clip.
        max_len: Longest prompt in tokens.
    Attributes:
        tasks: Names of the tasks that it answers.
        has_base: Whether the base can be asked as well: there is an adapter, and it can be switched off.
    """

    def __init__(self, model: Any, how: InferenceConfig, *, max_audio_sec: float, max_len: int) -> None:
        self.how, self.max_audio_sec, self.max_len = how, max_audio_sec, max_len
        family = get_family(how.model_id)
        self.tasks = family.tasks
        # what trained beside LoRA stands in the place of the base's own weights, and stays there
        self.has_base = isinstance(model, PeftModel) and not family.full_modules
        self._model = model
        self._extractor = Extractor(how.model_id, FeatureSpec(trim_audio=how.trim_audio))
        self._turn = threading.Lock()  # the adapter is switched off for whoever uses the model then
        self._is_stopping = False
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):  # every token of an answer passes through one
                module.register_forward_pre_hook(self._end_when_stopping)

    @property
    def base_name(self) -> str:
        return Path(self.how.model_id).name

    @property
    def adapter_name(self) -> str:
        """The adapter's folder with the one above it, since most are called ``adapter``; "" without one."""
        return "/".join(Path(self.how.adapter).parts[-2:]) if self.how.adapter else ""

    def answers(self, request: DemoRequest) -> Iterator[DemoAnswer]:
        """The base's answer, if it is to be compared, then that of the model as it was loaded.

        Raises:
            Unanswered: There is nothing to answer, it cannot be used, or the model fails at it.
        """
        began = time.perf_counter()
        item, language = self._read(request)
        read_sec = time.perf_counter() - began
        for is_base in (True, False) if request.compare and self.has_base else (False,):
            with self._turn, self._model.disable_adapter() if is_base else nullcontext():
                began = time.perf_counter()
                given = self._given(item)
                sec = read_sec + time.perf_counter() - began
            text, task = item.text(given), item.rows[0].task
            yield DemoAnswer(
                is_base=is_base,
                text=text,
                audio_sec=item.num_samples / self._extractor.front_end.sample_rate_hz,
                sec=sec,
                num_tokens=sum(answer.num_new_tokens for answer in given),
                hit_max=any(answer.hit_max for answer in given),
                num_chunks=len(item.rows),
                metrics=_metrics(task, language, request.reference, text),
            )

    def stop(self) -> None:
        """Break off the answer at which the model is, and give no more."""
        self._is_stopping = True

    def _end_when_stopping(self, *_: Any) -> None:
        if self._is_stopping:
            raise _Stopping

    def _read(self, request: DemoRequest) -> tuple[AnswerRequest, str]:
        """Features of what is asked, and the code of its language."""
        path, question = request.audio_path, request.question.strip()
        self._check_task(path, question)
        name = Path(path).name or "question"
        if path and not Path(path).is_file():
            raise Unanswered(f"{name} was deleted meanwhile: choose it once more.")
        try:
            language = language_code(request.language)
            duration_sec = self._unknown_length(path) if path else 0.0
            sample = make_sample(name, question, path, language, duration_sec=duration_sec)
            item = make_request(sample, self._extractor, self.max_len)
            self._check_length(item.num_samples / self._extractor.front_end.sample_rate_hz)
        except BadRow as error:
            raise Unanswered(self._said(error, path, name)) from None
        return item, language

    def _check_task(self, path: str, question: str) -> None:
        task = "tqa" if not path else "sqa" if question else "asr"
        if (path or question) and task in self.tasks:
            return
        if task == "sqa":
            raise Unanswered("This model answers no questions: leave the question empty.")
        if task == "asr":
            raise Unanswered("Write a question about the clip.")
        raise Unanswered(f"Record or upload a clip first{', or write a question' if 'tqa' in self.tasks else ''}.")

    def _unknown_length(self, path: str) -> float:
        """Seconds of a clip whose header does not say so, as some browsers record them; 0 for all others.

        Raises:
            BadRow: It is too long, or cannot be decoded.
        """
        try:
            seconds, unknown_sec = header_seconds(path), 0.0
        except (OSError, ValueError):
            samples, rate_hz = decode_native(path, max_sec=self.max_audio_sec)
            seconds = unknown_sec = len(samples) / rate_hz
        self._check_length(seconds)
        return unknown_sec

    def _check_length(self, audio_sec: float) -> None:
        if audio_sec > self.max_audio_sec:
            raise BadRow("audio_too_long", f"over --max_audio_sec {self.max_audio_sec:g}")

    def _said(self, error: BadRow, path: str, name: str) -> str:
        """A refusal as the page says it: with the clip's own name in the place of where it lies here."""
        if error.reason == "audio_too_long":
            most_sec, with_question = self.max_audio_sec, self._extractor.front_end.max_audio_sec
            asked = f", and {with_question:g} s with a question" if with_question < most_sec else ""
            return f"{name} is too long: clips may last {most_sec:g} s{asked}."
        message = (error.message.replace(path, name) if path else error.message).rstrip(".")
        if not message.startswith(name):
            message = message[:1].upper() + message[1:]
        return f"{message}.{' Is it an audio file?' if error.reason == 'audio_unreadable' else ''}"

    def _given(self, item: AnswerRequest) -> list[Completion]:
        try:
            [(_, answers)] = answer_requests([item], self._model, self._extractor.front_end, self.how)
        except RunError as error:
            raise Unanswered(f"{error}.") from None
        except _Stopping:
            raise Unanswered("The demo is being stopped.") from None
        for answer in answers:
            if isinstance(answer, Exception):
                raise Unanswered(f"The model failed: {failure_reason(answer)}")
        return [answer for answer in answers if isinstance(answer, Completion)]


def _metrics(task: str, language: str, reference: str, text: str) -> dict[str, float]:
    if not reference.strip():
        return {}
    row = with_counts({"task": task, "language": language, "reference": reference, "prediction": text})
    found = metrics_by_task([row]).get(task, {})
    return {name: float(found[name]["value"]) for name in TASKS[task].metrics if name in found}


def open_model(settings: DemoSettings) -> tuple[DemoModel, int]:
    """Load what the settings name; also returns how many tensors of the adapter were taken.

    Raises:
        RunError, SettingsError: The model or the adapter cannot be used.
    """
    model_id, adapter = base_and_adapter(settings, settings.lora_dir)
    settings = match_training_prompts(settings, model_id, adapter)
    how = inference_config(settings, model_id, adapter, settings.max_new_tokens, settings.batch_size)
    model, num_tensors = load_model(how)
    return DemoModel(model, how, max_audio_sec=settings.max_audio_sec, max_len=settings.max_len), num_tensors
