"""Features and prompts of Whisper, without weights."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voxray.core.errors import BadRow, RunError, SettingsError, one_line
from voxray.core.manifest import Sample
from voxray.core.source import Segment
from voxray.models.hf_files import model_file
from voxray.models.parts.logmel_windows import FEATURES_VERSION, WindowedLogMel

TASKS = ("asr",)
TEMPLATE_VERSION = "whisper-1"
MAX_AUDIO_SEC = 2 * 3600.0  # of one recording, which has 230 MB of log-mel
ENGLISH_VOCABULARY = 51_864  # tokens of the English-only checkpoints; the others have at least one more
TIME_STEP_SEC = 0.02  # step of Whisper's time tokens: two mel frames


class WhisperFrontEnd(WindowedLogMel):
    """Whisper's features and prompts, equal to ``WhisperProcessor``'s (tests compare the two).

    Args:
        model_id: Base model.
        trim_audio: Not supported, because prompts have no audio tokens.
    """

    max_audio_sec = MAX_AUDIO_SEC
    max_windows: int | None = 1
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
        self.is_multilingual = bool(getattr(generation, "is_multilingual", config.vocab_size != ENGLISH_VOCABULARY))
        self.needs_language = self.is_multilingual
        ids = {f"<|{code}|>": self._tokenizer.convert_tokens_to_ids(f"<|{code}|>") for code in LANGUAGES}
        ids = {token: token_id for token, token_id in ids.items() if token_id != self.eos_id}  # unknown ones are eos
        self.language_ids: dict[str, int] = getattr(generation, "lang_to_id", ids) if self.is_multilingual else {}
        options = [FEATURES_VERSION, TEMPLATE_VERSION, self.num_mel_bins, self.window_frames, self.is_multilingual]
        self.fingerprint = hashlib.sha256(json.dumps([*options, self._tokenizer_hash()]).encode()).hexdigest()

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

        Rows without a language get no language token; the model detects the language before it answers. Rows with
        segments are transcribed with times, so ``<|notimestamps|>`` is omitted.

        Raises:
            BadRow: The row is not a transcription, or its language is unknown.
        Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision (2022), figure 1.
        """
        if sample.task.name not in TASKS:
            raise BadRow("unsupported_task", f"Whisper only transcribes; this row's task is {sample.task.name}")
        ids = [self.start_id]
        if self.is_multilingual:
            if sample.language:
                ids.append(self._language_id(sample.language))
            ids.append(self._id("<|transcribe|>"))
        return ids if sample.segments else [*ids, self.no_times_id]

    def _language_id(self, language: str) -> int:
        token = f"<|{language}|>"
        if token not in self.language_ids:
            raise BadRow(
                "bad_language", f"language {language!r} is none of the {len(self.language_ids)} that this model has"
            )
        return self.language_ids[token]

    def target_ids(self, text: str, segments: Sequence[Segment] = ()) -> list[int]:
        """Token ids of the transcript and the end of text, with the times of its segments if it has any."""
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
