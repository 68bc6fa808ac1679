"""Features and prompts of the model types in ``facts.FACTS`` that have a processor, without weights.

Shape letters: K valid mel frames of a clip, F mel bins.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

import numpy as np
from jinja2 import TemplateError

from voxray.audio.logmel import HOP_SAMPLES, LogMel
from voxray.config.recipes import load_object
from voxray.core.chat import CLIP, Turn
from voxray.core.content_hash import combined_hash
from voxray.core.errors import BadRow, RunError, SettingsError, one_line
from voxray.core.languages import check_language
from voxray.core.manifest import Sample
from voxray.core.source import Segment
from voxray.models.audio_lm.facts import Facts
from voxray.models.front_end import AudioFeatures, with_context_line, with_labels
from voxray.models.parts.logmel_windows import FEATURES_VERSION, WindowedLogMel, check_preprocessor, window_lengths

TEMPLATE_VERSION = "audio-lm-1"
MARK = "\ue000text\ue000"
"""Stands for a text in a rendered template. These characters belong to no language."""


class AudioLmFrontEnd(WindowedLogMel):
    """Features and prompts equal to those of the base's own processor (tests compare the two).

    A clip is cut into windows. Where the processor cuts clips too, each window has its own log-mel. Positions beyond
    the clip's end get no token.

    Args:
        model_id: Base model.
        facts: Its model type.
        trim_audio: Not supported, because prompts never have tokens for padding.
    """

    max_windows: int | None = None
    cross_attention_positions = 0
    needs_language = False
    trims_audio = False
    needs_num_samples = True
    answer_names_language = False
    languages: frozenset[str] | None = None

    def __init__(self, model_id: str, facts: Facts, *, trim_audio: bool = False) -> None:
        from transformers import AutoConfig, AutoProcessor

        if trim_audio:
            raise SettingsError("--trim_audio_tokens: prompts of this model have no tokens for padding; leave it out")
        config: Any = AutoConfig.from_pretrained(model_id)
        self.model_id, self.facts, self._audio = model_id, facts, config.audio_config
        self._processor: Any = AutoProcessor.from_pretrained(model_id)
        self._tokenizer: Any = self._processor.tokenizer
        self._extractor: Any = self._processor.feature_extractor
        self.num_mel_bins = int(self._audio.num_mel_bins)
        self.window_frames = facts.window_frames(self._audio)
        self.window_samples = self.window_frames * HOP_SAMPLES
        self.positions_per_window = int(facts.positions(self.window_frames, self._audio))
        self.encoder_positions = self.positions_per_window * facts.merged
        self.encoder_dim = int(self._audio.hidden_size)
        self.max_positions = int(config.text_config.max_position_embeddings)
        self._check_extractor()
        self._read_tokens(config)
        self._read_languages()
        self.fingerprint = combined_hash(self._fingerprint_values())

    def _check_extractor(self) -> None:
        """Check the feature extractor, and read the longest clip."""
        self._is_whisper = type(self._extractor).__name__ == "WhisperFeatureExtractor"
        check_preprocessor(self._extractor, self.model_id, self.num_mel_bins)
        if self._is_whisper and self._extractor.nb_max_frames != self.window_frames:
            frames = f"{self._extractor.nb_max_frames} frames, and its encoder {self.window_frames}"
            raise RunError(f"--model_id {self.model_id}: its feature extractor makes windows of {frames}")
        longest = self.facts.max_audio_sec or self._processor.max_audio_len
        window_sec = self.window_samples / self.sample_rate_hz
        if self.facts.mask == "attention":  # its processor takes one window
            longest = window_sec
        self.max_audio_sec = max(longest // window_sec, 1) * window_sec if self._is_whisper else float(longest)

    def _read_tokens(self, config: Any) -> None:
        self.audio_id: int = config.audio_token_id
        if not self._processor.chat_template:
            raise RunError(f"--model_id {self.model_id}: its processor has no chat template, so it answers no task")
        self._takes_questions = MARK in self._render([self._question(MARK, True)])
        self.stop_ids = _stop_ids(self.model_id, config)
        end_id = self._end_of_answer()
        self.eos_id = int(end_id if end_id in self.stop_ids else self._tokenizer.eos_token_id)
        self.stop_ids |= {self.eos_id}
        pad_id = self._tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad_id in (None, self.audio_id) else pad_id

    def _end_of_answer(self) -> Any:
        """First token after an answer in the chat template; None if there is none."""
        turns = [_message(Turn("user", ("a",))), _message(Turn("assistant", (MARK,)))]
        text = self._processor.apply_chat_template(turns, tokenize=False)
        ids = self._tokenizer.encode(text.partition(MARK)[2], add_special_tokens=False)
        return ids[0] if ids else None

    def _read_languages(self) -> None:
        """Read the languages that a prompt can force, and the tokens that do so."""
        mark, self._mark_id = self.facts.answer_mark, None
        self._language_ids: dict[str, list[int]] = {}
        if not mark:
            return
        self._mark_id = self._tokenizer.convert_tokens_to_ids(mark)
        if self._tokenizer.convert_ids_to_tokens(self._mark_id) != mark:
            raise RunError(f"--model_id {self.model_id}: its tokenizer has no {mark}")
        names = load_object(self.facts.languages) if self.facts.languages else {}
        self._language_ids = {code: self._encode(f"language {name}{mark}") for code, name in names.items()}
        self.languages, self.answer_names_language = frozenset(names), True

    def _fingerprint_values(self) -> list[Any]:
        """Everything that features and token ids depend on."""
        extractor = {**self._extractor.to_dict(), "processor_class": None}
        numbers = [self.window_frames, self.encoder_positions, self.audio_id, self.eos_id]
        texts = [self._processor.chat_template, self._request_text(""), self._tokenizer.backend_tokenizer.to_str()]
        positions = [int(self.facts.positions(frames, self._audio)) for frames in range(self.window_frames + 1)]
        return [FEATURES_VERSION, TEMPLATE_VERSION, extractor, *numbers, *texts, positions]

    def num_frames(self, num_samples: int) -> int:
        """Valid mel frames of a clip, as the processor counts them."""
        if self._is_whisper:
            return -(-num_samples // HOP_SAMPLES)
        return max(num_samples, self._extractor.min_length) // HOP_SAMPLES if num_samples else 0

    def samples_by_window(self, num_samples: int) -> list[int]:
        """Samples that count in each window of a clip. A last window that is too short for a position is left out."""
        counted = num_samples if self._is_whisper else self.num_frames(num_samples) * HOP_SAMPLES
        return [length for length in window_lengths(counted, self.window_samples) if self._positions(length)]

    def _positions(self, num_samples: int) -> int:
        return int(self.facts.positions(-(-num_samples // HOP_SAMPLES), self._audio))

    def num_windows(self, num_samples: int) -> int:
        return len(self.samples_by_window(num_samples))

    def num_positions(self, num_samples: int) -> int:
        """Number of audio tokens of a clip."""
        return sum(map(self._positions, self.samples_by_window(num_samples)))

    def features(self, samples: np.ndarray) -> AudioFeatures:
        """Log-mel of one clip: of each window by itself, or of the whole clip if the extractor knows no windows.

        Args:
            samples: float32, shape (num_samples,), at 16 kHz.
        """
        num_windows = self.num_windows(len(samples))
        limit = num_windows * self.window_frames
        if not self._is_whisper:
            options = {"sampling_rate": self.sample_rate_hz, "padding": True, "n_window": 0, "return_tensors": "np"}
            mel_FK = self._extractor(samples, **options)["input_features"][0]
            return AudioFeatures(np.ascontiguousarray(mel_FK.T[:limit], np.float32), 0.0, num_windows)
        if not hasattr(self, "_logmel"):
            self._logmel = LogMel(self.num_mel_bins)
        starts = range(0, num_windows * self.window_samples, self.window_samples)
        windows = [
            self._logmel.valid(samples[start : start + self.window_samples], self.window_samples) for start in starts
        ]
        if not windows:
            return AudioFeatures(np.empty((0, self.num_mel_bins), np.float32), 0.0, 0)
        return AudioFeatures(np.concatenate([mel_KF for mel_KF, _ in windows]), windows[-1][1], num_windows)

    def prompt_ids(self, sample: Sample, num_samples: int) -> list[int]:
        """Token ids up to the answer, with a placeholder token for every position of the clip.

        Args:
            num_samples: Length of the clip at 16 kHz; 0 omits its audio tokens.
        Raises:
            BadRow: The base does not have the row's language, answers no questions or has no place for a message of the
                system, or the clip is too short.
        """
        if sample.task.template == "transcription":
            check_language(sample.language, self.languages, self.model_id)
            ids = self._request_ids(sample.language, sample.prompt)
        elif not self._takes_questions:
            raise BadRow("unsupported_task", f"{self.model_id} only transcribes; this row's task is {sample.task.name}")
        else:
            ids = self._conversation_ids(sample.turns or (self._question(sample.prompt, bool(sample.audio_path)),))
        if ids.count(self.audio_id) != bool(sample.audio_path):
            raise BadRow("bad_text", "a text holds the token that stands for audio")
        if not sample.audio_path:
            return ids
        positions = self.num_positions(num_samples)
        if num_samples and not positions:
            raise BadRow("audio_too_short", f"{num_samples} samples are too few for the model to hear")
        start = ids.index(self.audio_id)
        return [*ids[:start], *self._audio_ids(positions), *ids[start + 1 :]]

    def _audio_ids(self, positions: int) -> list[int]:
        """The tokens by which the processor replaces the placeholder."""
        text = self._processor.replace_audio_token({"num_audio_tokens": [1]}, 0)
        before, _, after = text.partition(self._processor.audio_token)
        return [*self._encode(before), *[self.audio_id] * positions, *self._encode(after)]

    def _request_text(self, language: str, context: str = "") -> str:
        """The text of a transcription request. Its context stands where the processor puts a prompt."""
        if self.facts.request:
            return self._render([self._question(with_context_line(self.facts.request, context), True)])
        options = {"language": language or None} if self.facts.languages else {}
        if context:  # other processors replace their own request by a prompt
            request = getattr(self._processor, "default_transcription_prompt", "")
            options["prompt"] = with_context_line(request, context) if request else context
        return self._processor.apply_transcription_request("clip.wav", tokenize=False, **options)[0]

    def _request_ids(self, language: str, context: str) -> list[int]:
        """Token ids of a transcription request. Control tokens in the context are split like other text."""
        if not any(token in context for token in self._tokenizer.all_special_tokens):
            return self._encode(self._request_text(language, context), is_prompt=True)
        before, _, after = self._request_text(language, MARK).partition(MARK)
        return [*self._encode(before, is_prompt=True), *self._encode(context, is_text=True), *self._encode(after)]

    def _question(self, text: str, has_audio: bool) -> Turn:
        """The turn of a single question."""
        if not has_audio:
            return Turn("user", (text,))
        return Turn("user", (text, CLIP) if self.facts.text_first else (CLIP, text))

    def _render(self, turns: Sequence[Turn]) -> str:
        """The text of a conversation, up to the next answer."""
        messages = list(map(_message, turns))
        return self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _conversation_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a conversation, with one placeholder for the clip; those of its answers have a label.

        Answers are tokenized by themselves, as those that the model generates. So are texts with control tokens, which
        are split like other text. The token after an answer has a label if it ends answers.
        """
        marked: list[tuple[str, str]] = []
        shown = [Turn(role, tuple(self._marked(role, part, marked) for part in parts)) for role, parts in turns]
        try:
            text = self._render(shown)
        except TemplateError as error:
            raise BadRow("unsupported_chat", f"the chat template of {self.model_id}: {one_line(error, 200)}") from None
        first, *others = text.split(MARK)
        if len(others) != len(marked) or not all(turn.text in text for turn in shown if turn.role == "system"):
            raise BadRow("unsupported_chat", f"the chat template of {self.model_id} leaves out a message")
        ids = self._encode(first, is_prompt=True)
        for (role, part), following in zip(marked, others, strict=True):
            part_ids, following_ids = self._encode(part, is_text=True), self._encode(following)
            if role == "assistant":
                num_ends = len(self.stop_ids.intersection(following_ids[:1]))
                part_ids, following_ids = [*part_ids, *following_ids[:num_ends]], following_ids[num_ends:]
            ids += [*(with_labels(part_ids) if role == "assistant" else part_ids), *following_ids]
        return ids

    def _marked(self, role: str, part: str, marked: list[tuple[str, str]]) -> str:
        """``MARK`` for a part that is tokenized by itself, which is added to ``marked``; or else the part."""
        has_control = any(token in part for token in self._tokenizer.all_special_tokens)
        if part == CLIP or (role != "assistant" and not has_control):
            return part
        marked.append((role, part))
        return MARK

    def target_ids(self, text: str, segments: Sequence[Segment] = (), *, language: str | None = None) -> list[int]:
        """Token ids of the answer and of the token that ends it.

        Args:
            language: Code of the row's language. If "", the answer of a model that names languages starts with
                ``language None``, unless it is empty.
        """
        names_none = self._mark_id is not None and text and language == ""
        start = f"language None{self.facts.answer_mark}" if names_none else ""
        return [*self._encode(start), *self._encode(text, is_text=True), self.eos_id]

    def _encode(self, text: str, *, is_text: bool = False, is_prompt: bool = False) -> list[int]:
        """Token ids.

        Args:
            is_text: Control tokens in the text are split like other text.
            is_prompt: Put the tokens before it that the tokenizer puts before a prompt.
        """
        bos = self._tokenizer.bos_token
        starts = is_prompt and not (bos and text.startswith(bos))
        try:
            return self._tokenizer.encode(text, add_special_tokens=starts, split_special_tokens=is_text)
        except (UnicodeEncodeError, TypeError):
            raise BadRow("bad_text", "the text holds half of a surrogate pair, which has no UTF-8 form") from None

    def prompt_language(self, prompt_ids: Sequence[int]) -> str:
        """Code of the language that a prompt forces."""
        ends = ((code, ids) for code, ids in self._language_ids.items() if list(prompt_ids[-len(ids) :]) == ids)
        return next((code for code, _ in ends), "")

    def needs_sequential_generate(self, prompt_ids: Sequence[int] | np.ndarray, num_windows: int) -> bool:
        """Never."""
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens, and without the language that the model names before it."""
        answer = [int(token) for token in ids]
        if self._mark_id in answer:
            answer = answer[answer.index(self._mark_id) + 1 :]
        return self._tokenizer.decode(answer, skip_special_tokens=True)

    def show(self, ids: Sequence[int]) -> str:
        """Text of token ids for people: with control tokens, and runs of audio tokens as ``<sound>x750``."""
        parts = []
        for is_audio, run in groupby(map(int, ids), lambda token: token == self.audio_id):
            tokens = list(run)
            parts.append(f"{self._processor.audio_token}x{len(tokens)}" if is_audio else self._tokenizer.decode(tokens))
        return "".join(parts)


def _message(turn: Turn) -> dict[str, Any]:
    audio, role = {"type": "audio", "path": "clip.wav"}, turn.role
    return {"role": role, "content": [audio if part == CLIP else {"type": "text", "text": part} for part in turn.parts]}


def _stop_ids(model_id: str, config: Any) -> frozenset[int]:
    """Ids that end an answer by generation_config.json, or else by config.json."""
    from transformers import GenerationConfig

    parts = [config, config.text_config]
    with suppress(OSError):
        parts.insert(0, GenerationConfig.from_pretrained(model_id))
    listed = next((ids for part in parts if (ids := getattr(part, "eos_token_id", None)) is not None), ())
    return frozenset(listed if isinstance(listed, list | tuple) else [listed])
