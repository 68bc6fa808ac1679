"""Features and prompts of the encoder-decoders in ``facts.FACTS`` that have a processor, without weights.

Shape letters: K valid frames of a clip, F values of a frame.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from voxray.config.recipes import load_object
from voxray.core.content_hash import combined_hash
from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.core.languages import NO_LANGUAGE, check_language, find_code
from voxray.core.manifest import Sample
from voxray.core.source import Segment
from voxray.models.audio_seq2seq.facts import HOP_SAMPLES, Seq2SeqFacts, encoder_config
from voxray.models.front_end import AudioFeatures
from voxray.models.parts.logmel_windows import SAMPLE_RATE_HZ, WindowedLogMel

TEMPLATE_VERSION = "audio-seq2seq-1"


class AudioSeq2SeqFrontEnd(WindowedLogMel):
    """Features and prompts equal to those of the base's own processor (tests compare the two).

    The features are those of the base's feature extractor. If the encoder reads samples, a frame has 160 of them.

    Args:
        model_id: Base model.
        facts: Its model type.
        trim_audio: Not supported, because prompts have no audio tokens.
    """

    max_windows: int | None = 1
    audio_id: int | None = None
    positions_per_window = 0
    trims_audio = False
    needs_num_samples = True
    takes_context = False

    def __init__(self, model_id: str, facts: Seq2SeqFacts, *, trim_audio: bool = False) -> None:
        from transformers import AutoConfig, AutoProcessor

        if trim_audio:
            raise SettingsError("--trim_audio_tokens: prompts of this model have no audio tokens; leave it out")
        config: Any = AutoConfig.from_pretrained(model_id)
        self.model_id, self.facts, self._audio = model_id, facts, encoder_config(config)
        self._processor: Any = AutoProcessor.from_pretrained(model_id)
        self._tokenizer: Any = self._processor.tokenizer
        self._extractor: Any = self._processor.feature_extractor
        self._check_extractor()
        self.num_mel_bins = HOP_SAMPLES if facts.is_waveform else int(self._audio.num_mel_bins)
        self.max_audio_sec = facts.max_audio_sec
        self.window_samples = int(facts.max_audio_sec * SAMPLE_RATE_HZ)
        self.window_frames = self.window_samples // HOP_SAMPLES
        self.encoder_positions = self.cross_attention_positions = self.num_positions(self.window_samples)
        self.encoder_dim = int(self._audio.hidden_size)
        self.max_positions = int(config.get_text_config(decoder=True).max_position_embeddings)
        self.eos_id = int(config.eos_token_id)
        self.pad_id = self.eos_id if config.pad_token_id is None else int(config.pad_token_id)
        self._prompts = self._read_prompts(config)
        self.needs_language = bool(facts.languages)
        self.languages = frozenset(self._prompts) if self.needs_language else None
        self.fingerprint = combined_hash(self._fingerprint_values())

    def _check_extractor(self) -> None:
        hop = HOP_SAMPLES if self.facts.is_waveform else self._extractor.hop_length
        if (self._extractor.sampling_rate, hop) != (SAMPLE_RATE_HZ, HOP_SAMPLES):
            values = f"sampling_rate {self._extractor.sampling_rate} and hop_length {hop}"
            expected = f"{SAMPLE_RATE_HZ} and {HOP_SAMPLES}"
            raise RunError(f"--model_id {self.model_id}: its preprocessor has {values}, not {expected}")
        if not self.facts.is_waveform and self._extractor.feature_size != self._audio.num_mel_bins:
            bins = f"{self._extractor.feature_size} mel bins, and its encoder {self._audio.num_mel_bins}"
            raise RunError(f"--model_id {self.model_id}: its preprocessor has {bins}")
        longest = getattr(self._extractor, "max_audio_clip_s", np.inf)
        if longest < self.facts.max_audio_sec:
            message = f"its preprocessor divides clips over {longest:g} s, and voxray only those over"
            raise RunError(f"--model_id {self.model_id}: {message} {self.facts.max_audio_sec:g} s")

    def _read_prompts(self, config: Any) -> Mapping[str, list[int]]:
        """{code of a language: token ids of the prompt}; {"": ids} if prompts name no language."""
        if not self.facts.languages:
            return {"": [int(config.decoder_start_token_id)]}
        known = self._tokenizer.get_vocab()
        codes = [code for code in sorted(load_object(self.facts.languages)) if f"<|{code}|>" in known]
        if not codes:
            raise RunError(f"--model_id {self.model_id}: its tokenizer has no token of a language, such as <|en|>")
        return {find_code(code) or code: self._prompt(code) for code in codes}

    def _prompt(self, code: str) -> list[int]:
        if hasattr(self._processor, "get_decoder_prompt_ids"):
            return self._processor.get_decoder_prompt_ids(language=code)
        [text] = self._processor.apply_transcription_request("clip.wav", source_language=code, tokenize=False)
        return self._tokenizer(text)["input_ids"]

    def _fingerprint_values(self) -> list[Any]:
        """Everything that features and token ids depend on."""
        extractor = {**self._extractor.to_dict(), "processor_class": None}
        numbers = [self.window_frames, self.encoder_positions, self.eos_id]
        prompts = [value for code, ids in sorted(self._prompts.items()) for value in (code, *ids)]
        return [TEMPLATE_VERSION, extractor, *numbers, *prompts, self._tokenizer.backend_tokenizer.to_str()]

    def num_positions(self, num_samples: int) -> int:
        """Outputs of the encoder for a clip; 0 if it is too short, as a single frame has no deviation to divide by."""
        if not self.facts.is_waveform and num_samples < 2 * HOP_SAMPLES:
            return 0
        return max(int(self.facts.positions(num_samples, self._audio)), 0)

    def features(self, samples: np.ndarray) -> AudioFeatures:
        """Features of one clip by the base's own extractor.

        Args:
            samples: float32, shape (num_samples,), at 16 kHz.
        """
        num_windows = self.num_windows(len(samples))
        if not num_windows:
            return AudioFeatures(np.empty((0, self.num_mel_bins), np.float32), 0.0, 0)
        values = self._extractor(samples, sampling_rate=SAMPLE_RATE_HZ, return_tensors="np")
        if self.facts.is_waveform:
            padding = -len(samples) % HOP_SAMPLES
            frames_KF = np.pad(values["input_values"][0], (0, padding)).reshape(-1, HOP_SAMPLES)
        else:
            frames_KF = values["input_features"][0][: len(samples) // HOP_SAMPLES]
        return AudioFeatures(np.ascontiguousarray(frames_KF, np.float32), 0.0, num_windows)

    def prompt_ids(self, sample: Sample, num_samples: int) -> list[int]:
        """Token ids up to the answer.

        Raises:
            BadRow: The row is not a transcription or has a context, its language is missing or not one of the base, or
                its clip is too short.
        """
        if sample.task.template != "transcription":
            raise BadRow("unsupported_task", f"{self.model_id} only transcribes; this row's task is {sample.task.name}")
        if sample.prompt:
            raise BadRow("unsupported_context", f"prompts of {self.model_id} have no place for a context; remove it")
        check_language(sample.language, self.languages, self.model_id)
        if self.needs_language and not sample.language:
            raise BadRow("no_language", NO_LANGUAGE)
        if num_samples and not self.num_positions(num_samples):
            raise BadRow("audio_too_short", f"{num_samples} samples are too few for the model to hear")
        return list(self._prompts[sample.language if self.needs_language else ""])

    def prompt_language(self, prompt_ids: Sequence[int]) -> str:
        """Code of the language in a prompt."""
        return next((code for code, ids in self._prompts.items() if list(prompt_ids) == ids), "")

    def target_ids(self, text: str, segments: Sequence[Segment] = ()) -> list[int]:
        """Token ids of the transcript and of the token that ends it."""
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        except (UnicodeEncodeError, TypeError):
            raise BadRow("bad_text", "the text holds half of a surrogate pair, which has no UTF-8 form") from None
        return [*ids, self.eos_id]

    def needs_sequential_generate(self, prompt_ids: Sequence[int] | np.ndarray, num_windows: int) -> bool:
        """Never."""
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)

    def show(self, ids: Sequence[int]) -> str:
        """Text of token ids for people, with control tokens."""
        return self._tokenizer.decode([int(token) for token in ids])
