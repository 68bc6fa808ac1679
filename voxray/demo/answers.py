"""Answer the requests of the demo's page: a clip or a question, by the tuned model and by its base."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from voxray.audio.isolated import IsolatedDecoder
from voxray.config.demo import DemoSettings
from voxray.core.errors import BadRow, RunError
from voxray.core.languages import language_code
from voxray.core.tasks import TASKS
from voxray.evaluation.predictions import metrics_by_task, with_counts
from voxray.features.extract import Extractor, FeatureSpec
from voxray.generation.engines.engine import TransformersEngine
from voxray.generation.generate import Completion, failure_reason
from voxray.generation.model import (
    InferenceConfig,
    base_and_adapter,
    inference_config,
    load_model,
    resolve_settings,
)
from voxray.generation.requests import AnswerRequest, answer_requests, make_request, make_sample
from voxray.models.registry import get_family, require_language


class AnswerError(Exception):
    """A request has no answer; the message is the line that the page shows."""


class _Stopping(BaseException):
    """Ends generation between two tokens. Not an ``Exception``: those are caught as failures of a row."""


@dataclass(frozen=True)
class DemoRequest:
    """A request from the page.

    Attributes:
        audio_path: The clip, or "" for a question in text.
        question: About the clip; "" asks for its transcript.
        language: Language of the clip, or "" to let the model detect it.
        reference: The correct answer, or ""; answers are scored against it.
        compare: Let the base answer as well.
    """

    audio_path: str = ""
    question: str = ""
    language: str = ""
    reference: str = ""
    compare: bool = False


@dataclass(frozen=True)
class DemoAnswer:
    """The answer of one model.

    Attributes:
        is_base: Whether the adapter was disabled for this answer.
        audio_sec: Length of the clip; 0 without one.
        sec: From the file to the text: decoding, features and generation, without waiting for other requests.
        num_tokens: Tokens of the answer.
        hit_max: Whether the answer was cut off at the maximum length.
        num_chunks: Chunks in which a long recording was answered; otherwise 1.
        metrics: The task's metrics against the reference; {} without one.
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
        """Seconds of audio answered per second."""
        return self.audio_sec / self.sec


class DemoModel:
    """A loaded model that answers requests one at a time.

    Args:
        model: Returned by ``generation.model.load_model``.
        config: The configuration with which it was loaded.
        max_audio_sec: Longest clip.
        max_len: Longest prompt in tokens.
    Attributes:
        tasks: Names of the tasks that the model answers.
        has_base: Whether the base can answer as well: there is an adapter and it can be disabled.
    """

    def __init__(self, model: Any, config: InferenceConfig, *, max_audio_sec: float, max_len: int) -> None:
        self.config, self.max_audio_sec, self.max_len = config, max_audio_sec, max_len
        family = get_family(config.model_id)
        self.tasks = family.tasks
        # fully trained modules replace the base's weights, so disabling the adapter would not bring the base back
        self.has_base = isinstance(model, PeftModel) and not family.full_modules
        self._model = model
        self._extractor = Extractor(config.model_id, FeatureSpec(trim_audio=config.trim_audio))
        self._engine = TransformersEngine(model, self._extractor.front_end, config)
        self._decoder = IsolatedDecoder()
        self._lock = threading.Lock()  # disabling the adapter affects all users of the model
        self._is_stopping = False
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):  # every token of an answer passes through one
                module.register_forward_pre_hook(self._raise_if_stopping)

    @property
    def base_name(self) -> str:
        return Path(self.config.model_id).name

    @property
    def adapter_name(self) -> str:
        """The adapter's folder and its parent, since most are called ``adapter``; "" without an adapter."""
        return "/".join(Path(self.config.adapter).parts[-2:]) if self.config.adapter else ""

    def answers(self, request: DemoRequest) -> Iterator[DemoAnswer]:
        """Yield the base's answer, if it is to be compared, and then the answer of the model as it was loaded.

        Raises:
            AnswerError: The request is empty or unusable, or the model fails.
        """
        start_sec = time.perf_counter()
        answer_request, language = self._extract(request)
        extract_sec = time.perf_counter() - start_sec
        for is_base in (True, False) if request.compare and self.has_base else (False,):
            with self._lock, self._model.disable_adapter() if is_base else nullcontext():
                start_sec = time.perf_counter()
                completions = self._generate(answer_request)
                sec = extract_sec + time.perf_counter() - start_sec
            text, task = answer_request.text(completions), answer_request.rows[0].task
            yield DemoAnswer(
                is_base=is_base,
                text=text,
                audio_sec=answer_request.num_samples / self._extractor.front_end.sample_rate_hz,
                sec=sec,
                num_tokens=sum(completion.num_new_tokens for completion in completions),
                hit_max=any(completion.hit_max for completion in completions),
                num_chunks=len(answer_request.rows),
                metrics=_metrics(task, language or completions[0].language, request.reference, text),
            )

    def stop(self) -> None:
        """Abort the current answer and refuse further ones."""
        self._is_stopping = True
        self._decoder.close()

    def _raise_if_stopping(self, *_: Any) -> None:
        if self._is_stopping:
            raise _Stopping

    def _extract(self, request: DemoRequest) -> tuple[AnswerRequest, str]:
        """The features of a request, and its language code."""
        path, question = request.audio_path, request.question.strip()
        self._check_task(path, question)
        name = Path(path).name or "question"
        if path and not Path(path).is_file():
            raise AnswerError(f"{name} was deleted meanwhile: choose it once more.")
        front_end = self._extractor.front_end
        with tempfile.TemporaryDirectory(dir=os.environ.get("GRADIO_TEMP_DIR") or None) as folder:
            decoded = Path(folder) / "clip.wav"
            try:
                language = language_code(request.language)
                if path:
                    self._decoder.decode(path, front_end.sample_rate_hz, decoded, max_sec=self.max_audio_sec)
                sample = make_sample(name, question, str(decoded) if path else "", language)
                return make_request(sample, self._extractor, self.max_len), language
            except BadRow as error:
                error.message = error.message.replace(str(decoded), path)
                raise AnswerError(self._message(error, path, name)) from None

    def _check_task(self, path: str, question: str) -> None:
        task = "tqa" if not path else "sqa" if question else "asr"
        if (path or question) and task in self.tasks:
            return
        if task == "sqa":
            raise AnswerError("This model answers no questions: leave the question empty.")
        if task == "asr":
            raise AnswerError("Write a question about the clip.")
        raise AnswerError(f"Record or upload a clip first{', or write a question' if 'tqa' in self.tasks else ''}.")

    def _message(self, error: BadRow, path: str, name: str) -> str:
        """The page's message for a refused clip, with the name of the upload instead of its path on this machine."""
        if error.reason == "audio_too_long":
            max_sec, max_question_sec = self.max_audio_sec, self._extractor.front_end.max_audio_sec
            limit = f", and {max_question_sec:g} s with a question" if max_question_sec < max_sec else ""
            return f"{name} is too long: clips may last {max_sec:g} s{limit}."
        message = (error.message.replace(path, name) if path else error.message).rstrip(".")
        if not message.startswith(name):
            message = message[:1].upper() + message[1:]
        return f"{message}.{' Is it an audio file?' if error.reason == 'audio_unreadable' else ''}"

    def _generate(self, answer_request: AnswerRequest) -> list[Completion]:
        try:
            [(_, results)] = answer_requests([answer_request], self._engine, self.config.batch_size)
        except RunError as error:
            raise AnswerError(f"{error}.") from None
        except _Stopping:
            raise AnswerError("The demo is being stopped.") from None
        completions = []
        for result in results:
            if isinstance(result, Exception):
                raise AnswerError(f"The model failed: {failure_reason(result)}")
            completions.append(result)
        return completions


def _metrics(task: str, language: str, reference: str, text: str) -> dict[str, float]:
    if not reference.strip():
        return {}
    row = with_counts({"task": task, "language": language, "reference": reference, "prediction": text})
    metrics = metrics_by_task([row]).get(task, {})
    return {name: float(metrics[name]["value"]) for name in TASKS[task].metrics if name in metrics}


def open_model(settings: DemoSettings) -> tuple[DemoModel, int]:
    """Load the model and adapter of the settings; also returns the number of adapter tensors loaded.

    Raises:
        RunError, SettingsError: The model or the adapter cannot be used.
    """
    model_id, adapter = base_and_adapter(settings, settings.lora_dir)
    settings = resolve_settings(settings, model_id, adapter)
    if settings.language:
        require_language(get_family(model_id).front_end(model_id), settings.language, model_id)
    config = inference_config(settings, model_id, adapter, settings.max_new_tokens, settings.batch_size)
    model, num_tensors = load_model(config)
    return DemoModel(model, config, max_audio_sec=settings.max_audio_sec, max_len=settings.max_len), num_tensors
