"""The engine of ``--server``: every row is one request to OpenAI's API, which vLLM, SGLang, llama.cpp and others have.

Transcripts come from /audio/transcriptions, translations into English from /audio/translations, all other answers from
/chat/completions, where a clip is a part ``input_audio`` of a message.
"""

import base64
import io
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import soundfile

from voxray.core.chat import CLIP, Turn
from voxray.core.errors import BadRow, RunError, is_utf8_text
from voxray.core.languages import language_code
from voxray.core.manifest import Sample, samples_at
from voxray.core.tasks import TASKS
from voxray.features.reader import FeatureRow
from voxray.generation.engines.server_client import ServerClient, ServerError
from voxray.generation.generate import Completion
from voxray.generation.model import InferenceConfig
from voxray.models.served import ServedFrontEnd

FROM_MANIFEST = ("conversation", "translation")
"""Templates of tasks whose rows have turns or a target language, which feature sets do not store."""


class ServerEngine:
    """A model on a server."""

    @classmethod
    def check(cls, config: InferenceConfig) -> None:
        """Raise a SettingsError unless address and key can be used. Nothing is sent."""
        assert config.server
        ServerClient(config.server)

    def __init__(self, config: InferenceConfig, front_end: ServedFrontEnd) -> None:
        assert config.server
        self.client, self.model, self.sampling = ServerClient(config.server), config.server.model, config.sampling
        self.rate_hz = front_end.sample_rate_hz

    def generate(self, rows: Sequence[FeatureRow], batch_size: int) -> Iterator[tuple[int, Completion | Exception]]:
        """Send ``batch_size`` requests at a time (see ``InferenceEngine``). No request is repeated for another one."""
        sources = [row.source for row in rows if TASKS[row.task].template in FROM_MANIFEST]
        samples = {sample.source: sample for sample in samples_at(sources)} if sources else {}
        return _run_threads(lambda index, stop: self._answer(rows[index], samples, stop), len(rows), batch_size)

    def _answer(self, row: FeatureRow, samples: Mapping[str, Sample], stop: threading.Event) -> Completion:
        path, content = self._request(row, samples)
        body, sec = self.client.post(path, stop, **content)
        text, is_cut = _chat_answer(body) if "json" in content else (body.get("text"), False)
        if not isinstance(text, str):
            raise ServerError(f"the response has no text; it has {', '.join(sorted(body)) or 'nothing'}")
        if not is_utf8_text(text):
            raise ServerError("the text of the response holds half of a surrogate pair, which cannot be stored")
        usage, language = body.get("usage"), body.get("language")
        num_tokens = usage.get("completion_tokens", 0) if isinstance(usage, dict) else 0
        return Completion(
            text.strip(),
            num_tokens if isinstance(num_tokens, int) and 0 <= num_tokens < 1 << 31 else 0,
            is_cut,
            sec,
            row.language or _code(language if isinstance(language, str) else ""),
        )

    def _request(self, row: FeatureRow, samples: Mapping[str, Sample]) -> tuple[str, dict[str, Any]]:
        """Path and body of a row's request."""
        template, sample = TASKS[row.task].template, samples.get(row.source)
        if template in FROM_MANIFEST and sample is None:
            raise ServerError("its line of the manifest has changed")
        if template == "transcription":
            optional = {"language": row.language, "prompt": row.prompt}
            return "/audio/transcriptions", self._form(row, {name: text for name, text in optional.items() if text})
        if template == "translation" and sample and sample.target_language == "en":
            return "/audio/translations", self._form(row, {})
        has_audio = TASKS[row.task].has_audio
        turns: Sequence[Turn] = [Turn("user", (*([CLIP] if has_audio else []), row.prompt))]
        if template == "conversation" and sample:
            turns = sample.turns
        sampling = self.sampling
        body = {
            "model": self.model,
            "messages": [{"role": turn.role, "content": self._content(turn, row)} for turn in turns],
            "max_completion_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            **({"top_p": sampling.top_p} if sampling.top_p < 1 else {}),
        }
        return "/chat/completions", {"json": body}

    def _form(self, row: FeatureRow, values: Mapping[str, str]) -> dict[str, Any]:
        """A multipart form with the clip. Servers refuse fields that OpenAI's API does not have, such as a seed."""
        values = {"model": self.model, "temperature": f"{self.sampling.temperature:g}", **values}
        file = ("clip.wav", _wav(row.audio, self.rate_hz), "audio/wav")
        return {"data": {**values, "response_format": "json"}, "files": {"file": file}}

    def _content(self, turn: Turn, row: FeatureRow) -> str | list[dict[str, Any]]:
        """The content of a message: its text, or its parts if one of them is the clip."""
        if CLIP not in turn.parts:
            return turn.text
        clip = {"data": base64.b64encode(_wav(row.audio, self.rate_hz)).decode(), "format": "wav"}
        audio = {"type": "input_audio", "input_audio": clip}
        return [audio if part == CLIP else {"type": "text", "text": part} for part in turn.parts]


def _chat_answer(body: Mapping[str, Any]) -> tuple[Any, bool]:
    """Text of a chat completion, None without one, and whether it was cut off."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise ServerError("the response has no choices")
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise ServerError(f"the response has a choice without text (finish_reason {choice.get('finish_reason')!r})")
    return text, choice.get("finish_reason") == "length"


def _code(language: str) -> str:
    """Code of a language as a response names it; "" if it is none."""
    with suppress(BadRow):
        return language_code(language)
    return ""


def _wav(samples: np.ndarray, rate_hz: int) -> bytes:
    """A WAV file with 16-bit samples.

    Args:
        samples: int16, shape (num_samples,).
    """
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, subtype="PCM_16", format="WAV")
    return file.getvalue()


def _run_threads(
    work: Callable[[int, threading.Event], Completion], num_items: int, num_threads: int
) -> Iterator[tuple[int, Completion | Exception]]:
    """Yield (number, result or exception) of every item as it ends, ``num_threads`` at a time.

    The threads do not keep the process from ending: a request can take minutes.

    Raises:
        RunError: Work on an item raised it. No further item is begun.
    """
    waiting, results, stop = queue.SimpleQueue[int](), queue.SimpleQueue[tuple[int, Any]](), threading.Event()
    for number in range(num_items):
        waiting.put(number)

    def run() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                number = waiting.get_nowait()
                try:
                    results.put((number, work(number, stop)))
                except Exception as error:
                    if isinstance(error, RunError):
                        stop.set()
                    results.put((number, error))

    for _ in range(min(num_threads, num_items)):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in range(num_items):
            number, result = results.get()
            if isinstance(result, RunError):
                raise result
            yield number, result
    finally:
        stop.set()
