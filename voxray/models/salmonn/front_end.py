"""Features and prompts of SALMONN, without weights.

Shape letters: K valid frames of a clip, F log-mel bins.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from voxray.audio.fbank import NUM_MEL_BINS
from voxray.audio.logmel import LogMel
from voxray.core.content_hash import combined_hash
from voxray.core.errors import BadRow, SettingsError
from voxray.core.manifest import Sample
from voxray.core.source import Segment
from voxray.models.front_end import AudioFeatures
from voxray.models.parts.logmel_windows import FEATURES_VERSION, WindowedLogMel
from voxray.models.salmonn.config import SalmonnConfig
from voxray.models.salmonn.folder import part_path, read_folder
from voxray.models.salmonn.loading import end_token_id, load_tokenizer
from voxray.models.salmonn.prompts import AUDIO_MARK, DEFAULTS, QUESTION_MARK, Prompts, read_prompts
from voxray.models.salmonn.stacked_features import stack_features

FBANK_VERSION = "beats-fbank-2"
TEMPLATE_VERSION = "salmonn-1"
MAX_WINDOWS = 10
"""Longest recording, in windows: 880 of the 2,048 positions of a Vicuna. SALMONN was trained on one window."""


class SalmonnFrontEnd(WindowedLogMel):
    """Features and prompts equal to those of SALMONN's own code (tests compare the token ids).

    A frame holds Whisper's log-mel and BEATs' filter bank side by side (see ``stacked_features``).

    Args:
        model_id: A SALMONN folder (see ``folder``).
        trim_audio: Not supported, because every window has the same number of positions.
        prompts: Prompts by task; if None, those that the folder names, or else SALMONN's own test prompts.
    """

    max_windows: int | None = None
    cross_attention_positions = 0
    needs_language = False
    trims_audio = False
    needs_num_samples = True

    def __init__(self, model_id: str, *, trim_audio: bool = False, prompts: Prompts | None = None) -> None:
        if trim_audio:
            raise SettingsError(
                "--trim_audio_tokens: SALMONN's clips take the same number of tokens always; leave it out"
            )
        config: SalmonnConfig = read_folder(model_id)
        speech: Any = config.speech_config
        super().__init__(part_path(model_id, config, "whisper"), speech.num_mel_bins, speech.max_source_positions)
        self.model_id = model_id
        self.log_mel_bins: int = speech.num_mel_bins
        self.num_mel_bins = speech.num_mel_bins + NUM_MEL_BINS
        self._read_shapes(config)
        prompts_path = (config.parts or {}).get("prompts")
        self.prompts = prompts or (read_prompts(prompts_path) if prompts_path else Prompts(DEFAULTS))
        self._tokenizer: Any = load_tokenizer(part_path(model_id, config, "llm"))
        self.pad_id: int = self._tokenizer.pad_token_id
        bos_id: int | None = self._tokenizer.bos_token_id
        self._start_ids: list[int] = [] if bos_id is None else [bos_id]
        self.eos_id: int = end_token_id(self._tokenizer, config.end_sym)
        self.fingerprint = combined_hash(self._fingerprint_values())

    def _read_shapes(self, config: SalmonnConfig) -> None:
        speech, beats, text = (getattr(config, f"{name}_config") for name in ("speech", "beats", "text"))
        self.encoder_dim: int = speech.d_model + beats.encoder_embed_dim
        assert config.audio_token_id is not None  # SalmonnConfig.__post_init__ sets it
        self.positions_per_window, self.audio_id = config.positions_per_clip, config.audio_token_id
        self.template, self.end_sym = config.prompt_template, config.end_sym
        self.max_positions: int = text.max_position_embeddings
        self.max_audio_sec = MAX_WINDOWS * self.window_samples / self.sample_rate_hz

    def _fingerprint_values(self) -> list[Any]:
        """Everything that features and token ids depend on."""
        numbers = [self.log_mel_bins, self.window_frames, self.positions_per_window, self.audio_id]
        texts = [self.template, self.end_sym, {task: list(prompts) for task, prompts in self.prompts.by_task.items()}]
        return [
            FEATURES_VERSION,
            FBANK_VERSION,
            TEMPLATE_VERSION,
            *numbers,
            *texts,
            self._tokenizer.backend_tokenizer.to_str(),
        ]

    def features(self, samples: np.ndarray) -> AudioFeatures:
        """Log-mel and BEATs' filter bank of one clip. The log-mel is clamped relative to the maximum of the whole clip.

        Args:
            samples: float32, shape (num_samples,), at 16 kHz.
        Returns:
            Frames of ``num_mel_bins`` values, the filter bank's last; ``fill`` is the log-mel's.
        """
        if not hasattr(self, "_logmel"):
            self._logmel = LogMel(self.log_mel_bins)
        num_windows = self.num_windows(len(samples))
        mel_KF, fill = self._logmel.valid(samples, num_windows * self.window_samples)
        return AudioFeatures(stack_features(mel_KF, samples), fill, num_windows)

    def prompt_ids(self, sample: Sample, num_samples: int) -> list[int]:
        """Token ids up to the answer, with the task's default prompt.

        Raises:
            BadRow: The row is a conversation.
        """
        if sample.task.template == "conversation":
            message = f"SALMONN answers one question per clip; this row's task is {sample.task.name}"
            raise BadRow("unsupported_task", message)
        prompt = self.prompts.default(sample.task.name, sample.prompt)
        return self.render_ids(prompt, sample.prompt, self.num_windows(num_samples))

    def sampled_prompt_ids(self, row: Any, *, seed: int, epoch: int) -> list[int]:
        """Token ids up to the answer, with the prompt that is sampled for this row and epoch.

        Args:
            row: Has ``id``, ``task``, ``prompt`` and ``num_windows``, such as ``features.reader.FeatureRow``.
        """
        prompt = self.prompts.sample(row.task, row.prompt, row.id, seed=seed, epoch=epoch)
        return self.render_ids(prompt, row.prompt, row.num_windows)

    def render_ids(self, prompt: str, question: str, num_windows: int) -> list[int]:
        """Token ids of ``<s>USER: <Speech>``, 88 audio tokens per window, ``</Speech> question\\nASSISTANT:``.

        The texts before and after the audio are tokenized separately, as in SALMONN's own code; tokenizing them as one
        text gives other ids. A prompt without audio is one text.
        """
        before, mark, after = self.template.replace(QUESTION_MARK, prompt, 1).partition(AUDIO_MARK)
        ids = list(self._start_ids)
        # Questions are inserted last because they may contain marks. Control tokens in them are plain text.
        is_text = any(token in question for token in self._tokenizer.all_special_tokens)
        ids += self._encode(before.replace(QUESTION_MARK, question), is_text)
        if mark:
            ids += [self.audio_id] * (self.positions_per_window * num_windows)
            ids += self._encode(after.replace(QUESTION_MARK, question), is_text)
        return ids

    def target_ids(self, text: str, segments: Sequence[Segment] = ()) -> list[int]:
        """Token ids of the answer and its end token. SALMONN has no time tokens."""
        return [*self._encode(text, True), self.eos_id]

    def _encode(self, text: str, is_text: bool) -> list[int]:
        """Token ids. If ``is_text``, control tokens are split like other text."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=is_text)
        except (UnicodeEncodeError, TypeError):
            raise BadRow("bad_text", "the text holds half of a surrogate pair, which has no UTF-8 form") from None

    def needs_sequential_generate(self, prompt_ids: Sequence[int] | np.ndarray, num_windows: int) -> bool:
        """Never."""
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens and audio."""
        text_ids = [int(token) for token in ids if token != self.audio_id]
        return self._tokenizer.decode(text_ids, skip_special_tokens=True).strip()

    def show(self, ids: Sequence[int]) -> str:
        """Text of token ids for people: with control tokens, and runs of audio tokens as ``<SpeechHere>x88``."""
        parts = []
        for is_audio, run in groupby(map(int, ids), lambda token: token == self.audio_id):
            tokens = list(run)
            parts.append(f"{AUDIO_MARK}x{len(tokens)}" if is_audio else self._tokenizer.decode(tokens))
        return "".join(parts)
