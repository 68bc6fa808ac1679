"""Features and prompts of Voxtral, without weights."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from voxray.audio.logmel import num_valid_frames
from voxray.core.chat import CLIP, Turn
from voxray.core.errors import BadRow, RunError, one_line
from voxray.core.languages import LANGUAGE_CODES, check_language
from voxray.core.manifest import Sample
from voxray.core.source import Segment
from voxray.models.adapters.audio_trim_record import trims_audio
from voxray.models.front_end import with_labels
from voxray.models.hf_files import model_file
from voxray.models.parts.logmel_windows import FEATURES_VERSION, WindowedLogMel

TEMPLATE_VERSION = "voxtral-v7-1"
MAX_AUDIO_SEC = 30 * 60.0  # Mistral's limit for transcription; longer clips do not fit the context anyway


@lru_cache(maxsize=2)
def _read_tokenizer(path: str, mtime_ns: int, size: int) -> Any:
    """Read tekken.json. Jobs need it several times, and decoding its 131,072 tokens takes a while."""
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(path).instruct_tokenizer.tokenizer


class VoxtralFrontEnd(WindowedLogMel):
    """Voxtral's features and prompts, equal to ``VoxtralProcessor``'s (tests compare the two).

    Prompts are built from token ids directly, because the processor encodes every clip as a base64 WAV file to count
    its windows, which costs more than the features.

    Args:
        model_id: Base model.
        trim_audio: Give a clip only the audio tokens that its valid frames reach. The encoder still gets whole windows,
            but the projector's outputs for padding do not enter the language model.
    """

    max_audio_sec = MAX_AUDIO_SEC
    max_windows: int | None = None
    cross_attention_positions = 0
    needs_language = False
    languages: frozenset[str] | None = frozenset(
        code for code in LANGUAGE_CODES if len(code) == 2
    )  # as mistral-common requires

    def __init__(self, model_id: str, *, trim_audio: bool = False) -> None:
        from transformers import VoxtralConfig

        config: Any = VoxtralConfig.from_pretrained(model_id)
        audio = config.audio_config
        super().__init__(model_id, audio.num_mel_bins, audio.max_source_positions)
        self.trims_audio = trims_audio(model_id, trim_audio)
        self.encoder_dim: int = audio.hidden_size
        self.max_positions: int = config.text_config.max_position_embeddings
        # Voxtral reshapes (encoder positions, hidden) to (positions, intermediate): 1,500 x 1,280 / 5,120 = 375.
        self.positions_per_window: int = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
        self.frames_per_position = self.window_frames // self.positions_per_window  # 3,000 / 375 = 8
        self._load_tokenizer()
        self.fingerprint = hashlib.sha256(
            json.dumps(
                [
                    FEATURES_VERSION,
                    TEMPLATE_VERSION,
                    self.num_mel_bins,
                    self.window_frames,
                    self.positions_per_window,
                    hashlib.sha256(Path(self._tokenizer_path).read_bytes()).hexdigest(),
                    *(["trimmed"] if self.trims_audio else []),
                ]
            ).encode()
        ).hexdigest()

    def _load_tokenizer(self) -> None:
        self._tokenizer_path = model_file(self.model_id, "tekken.json")
        names = ("<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]")
        names += ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
        try:
            status = os.stat(self._tokenizer_path)
            self._tekken = _read_tokenizer(self._tokenizer_path, status.st_mtime_ns, status.st_size)
            ids = [self._tekken.get_special_token(name) for name in names]
        except Exception as error:
            reason = one_line(error, 200)
            raise RunError(f"{self._tokenizer_path}: not a Voxtral tokenizer: {reason}") from None
        self.bos_id, self.eos_id, self.pad_id = ids[:3]
        self.begin_inst_id, self.end_inst_id, self.audio_id, self.begin_audio_id, self.transcribe_id = ids[3:8]
        self.begin_system_id, self.end_system_id = ids[8:]

    def __getstate__(self) -> dict[str, Any]:
        """State without the tokenizer, whose Rust core cannot be pickled; ``__setstate__`` loads it again."""
        return {key: value for key, value in super().__getstate__().items() if key != "_tekken"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load_tokenizer()

    def num_positions(self, num_samples: int) -> int:
        """Number of audio tokens of a clip: those of whole windows, or, if trimmed, those that its frames reach.

        A position covers eight mel frames: the encoder has stride 2, and the projector joins four of its outputs.
        """
        num_windows = self.num_windows(num_samples)
        if not self.trims_audio:
            return num_windows * self.positions_per_window
        return -(-num_valid_frames(num_samples, num_windows * self.window_samples) // self.frames_per_position)

    def prompt_ids(self, sample: Sample, num_samples: int) -> list[int]:
        """Token ids up to the answer.

        Args:
            num_samples: Length of the clip at 16 kHz; 0 omits its audio tokens.

        A transcription request is ``<s>[INST][BEGIN_AUDIO][AUDIO]*n[/INST]lang:ko[TRANSCRIBE]`` (without ``lang:`` when
        the language is unknown). The context of a row stands before ``[/INST]``, like the text of a chat; Mistral
        defines no place for it. A chat request is ``<s>[INST][BEGIN_AUDIO][AUDIO]*n question[/INST]``. A conversation
        goes on with ``answer</s>[INST]...[/INST]``, and may begin with ``<s>[SYSTEM_PROMPT]...[/SYSTEM_PROMPT]``.

        Raises:
            BadRow: The base does not have the row's language, or the row has a system message beside a clip.
        Source: mistral-common, ``InstructTokenizerV7``.
        """
        audio: list[int] = []
        if sample.audio_path:
            audio = [self.begin_audio_id] + [self.audio_id] * (self.num_positions(num_samples) if num_samples else 0)
        if sample.turns:
            return [self.bos_id, *(token for turn in sample.turns for token in self._turn_ids(turn, audio))]
        ids = [self.bos_id, self.begin_inst_id, *audio]
        if sample.task.template == "transcription":
            check_language(sample.language, self.languages, self.model_id)
            language = self._encode(f"lang:{sample.language}") if sample.language else []
            return [*ids, *self._encode(sample.prompt), self.end_inst_id, *language, self.transcribe_id]
        return [*ids, *self._encode(sample.prompt), self.end_inst_id]

    def _turn_ids(self, turn: Turn, audio: Sequence[int]) -> list[int]:
        """Token ids of one turn of a conversation; ``audio`` takes the place of the clip."""
        ids = [token for part in turn.parts for token in (audio if part == CLIP else self._encode(part))]
        if turn.role == "assistant":
            return with_labels([*ids, self.eos_id])
        if turn.role == "user":
            return [self.begin_inst_id, *ids, self.end_inst_id]
        if audio:
            reason = "mistral-common takes no system message beside a clip; put its text into the user's first message"
            raise BadRow("unsupported_chat", reason)
        return [self.begin_system_id, *ids, self.end_system_id]

    def target_ids(self, text: str, segments: Sequence[Segment] = ()) -> list[int]:
        """Token ids of the answer and the end-of-text token after it."""
        return [*self._encode(text), self.eos_id]

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tekken.encode(text, bos=False, eos=False)
        except UnicodeEncodeError:
            raise BadRow("bad_text", "the text holds half of a surrogate pair, which has no UTF-8 form") from None

    def needs_sequential_generate(self, prompt_ids: Sequence[int] | np.ndarray, num_windows: int) -> bool:
        """Never: one prompt holds all windows of a clip."""
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        return self._decode(ids, "IGNORE")

    def show(self, ids: Sequence[int]) -> str:
        """Text of token ids for people: with control tokens, and runs of audio tokens as ``[AUDIO]x375``."""
        text = self._decode(ids, "KEEP")
        return re.sub(r"(?:\[AUDIO\])+", lambda run: f"[AUDIO]x{run[0].count('[AUDIO]')}", text)

    def _decode(self, ids: Sequence[int], policy: str) -> str:
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        return self._tekken.decode([int(token) for token in ids], special_token_policy=SpecialTokenPolicy[policy])
