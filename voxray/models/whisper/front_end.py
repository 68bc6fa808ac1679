"""Features and prompts of Whisper, without weights."""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voxray.core.content_hash import combined_hash
from voxray.core.errors import BadRow, RunError, SettingsError, one_line
from voxray.core.languages import check_language, find_code
from voxray.core.manifest import Sample
from voxray.core.source import Segment, text_matches
from voxray.models.hf_files import model_file
from voxray.models.parts.logmel_windows import FEATURES_VERSION, WindowedLogMel

TEMPLATE_VERSION = "whisper-1"
ENGLISH_TEMPLATE_VERSION = "whisper-en-2"  # rows of other languages are refused
MAX_AUDIO_SEC = 2 * 3600.0  # of one recording, which has 230 MB of log-mel
ENGLISH_VOCABULARY = 51_864  # tokens of the English-only checkpoints; the others have at least one more
TIME_STEP_SEC = 0.02  # step of Whisper's time tokens: two mel frames
END_TOLERANCE_SEC = 0.1  # by which segments may end after the clip, whose length some formats state inexactly


class WhisperFrontEnd(WindowedLogMel):
    """Whisper's features and prompts, equal to ``WhisperProcessor``'s (tests compare the two).

    Args:
        model_id: Base model.
        trim_audio: Not supported, because prompts have no audio tokens.
    """

    max_audio_sec = MAX_AUDIO_SEC
    max_windows: int | None = 1
    audio_id: int | None = None
    positions_per_window = 0
    trims_audio = False

    def __init__(self, model_id: str, *, trim_audio: bool = False) -> None:
        from transformers import GenerationConfig, WhisperConfig, WhisperTokenizer
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        if trim_audio:
            raise SettingsError("--trim_audio_tokens: Whisper has no audio tokens in its prompts; leave it out")
        config: Any = WhisperConfig.from_pretrained(model_id)
        super().__init__(model_id, config.num_mel_bins, config.max_source_positions)
        self.encoder_dim: int = config.d_model
        self.cross_attention_positions: int = config.max_source_positions
        self.max_positions: int = config.max_target_positions
        try:
            self._tokenizer: Any = WhisperTokenizer.from_pretrained(model_id)
        except (OSError, ValueError) as error:
            raise RunError(f"--model_id {model_id}: no usable tokenizer: {one_line(error, 200)}") from None
        try:
            generation: Any = GenerationConfig.from_pretrained(model_id)
        except OSError:
            generation = None  # older checkpoints have none
        self.eos_id = self.pad_id = self._id("<|endoftext|>")
        self.start_id = self._id("<|startoftranscript|>")
        self.no_times_id = self._id("<|notimestamps|>")
        # Prompts of English-only checkpoints have neither language nor task.
        stored = getattr(generation, "is_multilingual", None)
        self.is_multilingual = config.vocab_size != ENGLISH_VOCABULARY if stored is None else bool(stored)
        self.needs_language = self.is_multilingual
        ids = {f"<|{code}|>": self._tokenizer.convert_tokens_to_ids(f"<|{code}|>") for code in LANGUAGES}
        ids = {token: token_id for token, token_id in ids.items() if token_id != self.eos_id}  # unknown ones are eos
        ids = getattr(generation, "lang_to_id", None) or ids if self.is_multilingual else {}
        self.lang_to_id: dict[str, int] = ids
        self.language_ids = {_code(token): token_id for token, token_id in ids.items()}
        self.languages: frozenset[str] | None = frozenset({"en"})
        if self.is_multilingual:
            self.languages = frozenset(self.language_ids)
        template = TEMPLATE_VERSION if self.is_multilingual else ENGLISH_TEMPLATE_VERSION
        options = [FEATURES_VERSION, template, self.num_mel_bins, self.window_frames, self.is_multilingual]
        self.fingerprint = combined_hash([*options, self._tokenizer_hash()])

    def _id(self, token: str) -> int:
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        if self._tokenizer.convert_ids_to_tokens(token_id) != token:  # unknown tokens become <|endoftext|>
            raise RunError(f"--model_id {self.model_id}: its tokenizer has no {token}")
        return token_id

    def _tokenizer_hash(self) -> str:
        try:
            paths = [model_file(self.model_id, "tokenizer.json")]
        except RunError:  # older checkpoints have the vocabulary in two files
            paths = [model_file(self.model_id, name) for name in ("vocab.json", "merges.txt")]
        return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()

    def prompt_ids(self, sample: Sample, num_samples: int) -> list[int]:
        """Token ids up to the answer: ``<|startoftranscript|><|ko|><|transcribe|><|notimestamps|>``.

        A translation has ``<|translate|>`` instead of ``<|transcribe|>``; the language is that of the speech. Rows
        without a language get no language token; the model detects the language before it answers. Rows with segments
        are transcribed with times, so ``<|notimestamps|>`` is omitted. The context of a row stands before the
        start, after ``<|startofprev|>``; of a long one the last tokens count, as in OpenAI's code.

        Raises:
            BadRow: The row is neither a transcription nor a translation into English, the base does not translate or
                does not have its language, or its segments end after the clip.
        Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision (2022), figure 1.
        """
        is_translation = sample.task.template == "translation"
        if sample.task.template not in ("transcription", "translation"):
            message = f"Whisper only transcribes and translates; this row's task is {sample.task.name}"
            raise BadRow("unsupported_task", message)
        if is_translation and not self.is_multilingual:
            raise BadRow("unsupported_task", f"{self.model_id} is an English-only checkpoint, which does not translate")
        if is_translation and sample.target_language != "en":
            message = f"Whisper translates into English only; target_language of this row is {sample.target_language}"
            raise BadRow("unsupported_task", message)
        check_language(sample.language, self.languages, self.model_id)
        if sample.segments and num_samples:
            end_sec, clip_sec = sample.segments[-1][1], num_samples / self.sample_rate_hz
            if end_sec > clip_sec + END_TOLERANCE_SEC:
                raise BadRow("bad_segment", f"segments end at {end_sec:g} s, and the clip lasts {clip_sec:.2f} s")
        ids = [*([] if is_translation else self._context_ids(sample.prompt)), self.start_id]
        if self.is_multilingual:
            if sample.language:
                ids.append(self.language_ids[sample.language])
            ids.append(self._id("<|translate|>" if is_translation else "<|transcribe|>"))
        return ids if sample.segments else [*ids, self.no_times_id]

    def _context_ids(self, context: str) -> list[int]:
        if not context:
            return []
        ids = self._tokenizer.encode(f" {context}", add_special_tokens=False, split_special_tokens=True)
        return [self._id("<|startofprev|>"), *ids[-(self.max_positions // 2 - 1) :]]

    def prompt_language(self, prompt_ids: Sequence[int]) -> str:
        """Code of the language in a prompt; "" if the prompt has none, "en" for English-only models."""
        if not self.is_multilingual:
            return "en"
        return next((code for code, token_id in self.language_ids.items() if token_id in prompt_ids), "")

    @property
    def task_to_id(self) -> dict[str, int]:
        """Ids of the task tokens that generation uses."""
        return {"transcribe": self._id("<|transcribe|>"), "translate": self._id("<|translate|>")}

    def target_ids(self, text: str, segments: Sequence[Segment] = ()) -> list[int]:
        """Token ids of the transcript and the end of text, with the times of its segments if it has any.

        Times after the window become its end. Rows that are longer than the window are divided before they train.

        Raises:
            BadRow: The text cannot be encoded, or the segments say something else.
        """
        if segments and not text_matches(segments, text):
            parts = " ".join(part for *_, part in segments)
            raise BadRow("segments_differ", f"the segments say {parts[:80]!r}, and the transcript {text[:80]!r}")
        ids: list[int] = []
        if not segments:
            ids = self._encode(text)
        for start, end, part in segments:
            ids += [self._time_id(start), *self._encode(f" {part}"), self._time_id(end)]
        return [*ids, self.eos_id]

    def _time_id(self, sec: float) -> int:
        longest = self.window_samples / self.sample_rate_hz
        return self.no_times_id + 1 + round(min(sec, longest) / TIME_STEP_SEC)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            raise BadRow("bad_text", "the text holds half of a surrogate pair, which has no UTF-8 form") from None

    def needs_sequential_generate(self, prompt_ids: Sequence[int] | np.ndarray, num_windows: int) -> bool:
        """True for recordings of several windows and rows with times: each token depends on the times before it."""
        return num_windows > 1 or self.no_times_id not in prompt_ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids without control and time tokens, whose ids are all greater than those of text."""
        return self._tokenizer.decode([int(token) for token in ids if token < self.eos_id])

    def show(self, ids: Sequence[int]) -> str:
        """Text of token ids for people, with control and time tokens."""
        parts = []
        for is_text, run in itertools.groupby(map(int, ids), lambda token: token < self.eos_id):
            tokens = list(run)
            parts.append(self.decode(tokens) if is_text else "".join(self._tokenizer.convert_ids_to_tokens(tokens)))
        return "".join(parts)


def _code(token: str) -> str:
    """Code of a language token: ``<|ko|>`` -> ``ko``, ``<|jw|>`` -> ``jv``."""
    return find_code(token.strip("<|>")) or token.strip("<|>")
