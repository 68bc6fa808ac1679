"""Voxtral: Whisper encoder -> projector (four encoder frames a position) -> Mistral-type language model.

Window length, mel bins and positions per window come from the model's configuration: 30 s, 128 and 375 for the released
Voxtral, other figures for the tiny one.

Shape letters: B rows, L tokens, W windows, T mel frames of a window, F mel bins, N answer positions, V vocabulary.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from voxray.audio.logmel import num_valid_frames
from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import Sample
from voxray.core.source import Segment
from voxray.core.tasks import TASKS
from voxray.models.adapters.audio_trim_record import trims_audio
from voxray.models.hf_files import base_of, model_file, outlined
from voxray.models.interface import AudioPath, UsualFamily
from voxray.models.parts.audio_encoder import PassThrough, encode, load_alone, weights_fingerprint
from voxray.models.parts.cpu_lm_head import linear_of_few
from voxray.models.parts.kv_cache import CausalDecoding
from voxray.models.parts.layer_compile import compile_layers, uncompiled
from voxray.models.parts.logmel_windows import FEATURES_VERSION, WindowedLogMel
from voxray.models.parts.packed_attention import Segments, use_packed_attention
from voxray.models.parts.quantize import load_frozen
from voxray.models.parts.zero_audio_gradients import touching
from voxray.models.voxtral.audio import Projected, hear_through, silence, with_trimmed_audio

TEMPLATE_VERSION = "voxtral-v7-1"
ENCODER = "audio_tower"
MAX_AUDIO_SEC = 30 * 60.0  # Mistral's own limit for transcription; longer clips do not fit the context anyway


class VoxtralFrontEnd(WindowedLogMel):
    """Voxtral's features and prompts, equal to ``VoxtralProcessor``'s (tests hold the two against each other).

    The prompts are built from token ids directly: the processor encodes every clip as a WAV file in base64 to count its
    windows, which costs more than the features themselves.

    Args:
        model_id: Base model.
        trim_audio: Give a clip only the audio tokens that its own frames reach. The encoder still hears whole windows;
            what it and the projector make of the padding has no place in the language model then (see ``Voxtral``).
    """

    max_audio_sec = MAX_AUDIO_SEC
    max_windows: int | None = None
    outside_positions = 0
    needs_language = False

    def __init__(self, model_id: str, *, trim_audio: bool = False) -> None:
        from transformers import VoxtralConfig

        config: Any = VoxtralConfig.from_pretrained(model_id)
        audio = config.audio_config
        super().__init__(model_id, audio.num_mel_bins, audio.max_source_positions)
        self.trims_audio = trims_audio(model_id, trim_audio)
        self.encoder_dim: int = audio.hidden_size
        self.max_positions: int = config.text_config.max_position_embeddings
        # Voxtral reshapes (frames, hidden) to (positions, intermediate): 1,500 x 1,280 / 5,120 = 375 positions.
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
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        self._tokenizer_path = model_file(self.model_id, "tekken.json")
        names = ("<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[AUDIO]", "[BEGIN_AUDIO]", "[TRANSCRIBE]")
        try:
            self._tekken: Any = MistralTokenizer.from_file(self._tokenizer_path).instruct_tokenizer.tokenizer
            ids = [self._tekken.get_special_token(name) for name in names]
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"{self._tokenizer_path}: not a Voxtral tokenizer: {reason}") from None
        self.bos_id, self.eos_id, self.pad_id = ids[:3]
        self.begin_inst_id, self.end_inst_id, self.audio_id, self.begin_audio_id, self.transcribe_id = ids[3:]

    def __getstate__(self) -> dict[str, Any]:
        """The tokenizer is read again where the front end arrives: its Rust core does not pickle."""
        return {key: value for key, value in super().__getstate__().items() if key != "_tekken"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load_tokenizer()

    def num_positions(self, num_samples: int) -> int:
        """Audio tokens of a clip: those of whole windows, or, trimmed, those that its frames reach.

        A position holds eight mel frames: the encoder's stride of two, four of whose frames the projector takes.
        """
        padded = self.num_windows(num_samples)
        if not self.trims_audio:
            return padded * self.positions_per_window
        return -(-num_valid_frames(num_samples, padded * self.window_samples) // self.frames_per_position)

    def prompt_ids(self, sample: Sample, num_samples: int) -> list[int]:
        """Token ids up to where the answer starts.

        Args:
            num_samples: Length of the clip at 16 kHz; 0 leaves out its tokens.

        A transcription request is ``<s>[INST][BEGIN_AUDIO][AUDIO]*n[/INST]lang:ko[TRANSCRIBE]`` (without ``lang:`` when
        the language is unknown), a chat is ``<s>[INST][BEGIN_AUDIO][AUDIO]*n question[/INST]``.

        Source: mistral-common, ``InstructTokenizerV7``.
        """
        ids = [self.bos_id, self.begin_inst_id]
        if sample.audio_path:
            ids += [self.begin_audio_id] + [self.audio_id] * (self.num_positions(num_samples) if num_samples else 0)
        if sample.task.template == "transcription":
            language = self._encode(f"lang:{sample.language}") if sample.language else []
            return [*ids, self.end_inst_id, *language, self.transcribe_id]
        return [*ids, *self._encode(sample.prompt), self.end_inst_id]

    def target_ids(self, text: str, segments: Sequence[Segment] = ()) -> list[int]:
        """Token ids of the answer and the end-of-text token after it."""
        return [*self._encode(text), self.eos_id]

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tekken.encode(text, bos=False, eos=False)
        except UnicodeEncodeError:
            raise BadRow("bad_text", "the text holds half of a surrogate pair, which has no UTF-8 form") from None

    def is_answered_alone(self, prompt_ids: Sequence[int] | np.ndarray, num_windows: int) -> bool:
        """Never: all windows of a clip stand in one prompt."""
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        return self._decode(ids, "IGNORE")

    def show(self, ids: Sequence[int]) -> str:
        """Text of token ids for people: control tokens kept, runs of audio positions as ``[AUDIO]x375``."""
        text = self._decode(ids, "KEEP")
        return re.sub(r"(?:\[AUDIO\])+", lambda run: f"[AUDIO]x{run[0].count('[AUDIO]')}", text)

    def _decode(self, ids: Sequence[int], policy: str) -> str:
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        return self._tekken.decode([int(token) for token in ids], special_token_policy=SpecialTokenPolicy[policy])


class Voxtral(UsualFamily):
    """Voxtral's model side."""

    name = "voxtral"
    job = "train_multitask"
    tasks: tuple[str, ...] = tuple(TASKS)
    roles: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {
            "encoder": (ENCODER,),
            "projector": ("multi_modal_projector",),
            "llm": ("language_model", "lm_head"),
        }
    )
    lora_targets: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {
            "encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
            "projector": ("linear_1", "linear_2"),
            "llm": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        }
    )

    fixed: tuple[str, ...] = ("audio_tower.embed_positions",)  # sinusoids
    quantized: tuple[str, ...] = ("llm",)
    files: tuple[str, ...] = ("tekken.json", "preprocessor_config.json", "processor_config.json", "params.json")

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> VoxtralFrontEnd:
        return VoxtralFrontEnd(model_id, trim_audio=trim_audio)

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        """Load the base with every weight frozen.

        Args:
            dtype: Type of the weights and of computing.
            quantize: ``8bit`` or ``4bit`` quantises the language model's layers.
        Raises:
            RunError: Weights are missing or cannot be read, or bitsandbytes is missing.
        """
        from transformers import VoxtralForConditionalGeneration

        keep = (ENCODER, "multi_modal_projector", "lm_head")
        return load_frozen(
            VoxtralForConditionalGeneration, model_id, dtype=dtype, device=device, quantize=quantize, keep=keep
        )

    def outline(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """The model without weights (see ``models.family.Family``)."""
        from transformers import VoxtralConfig, VoxtralForConditionalGeneration

        config = VoxtralConfig.from_pretrained(model_id)
        return outlined(lambda: VoxtralForConditionalGeneration._from_config(config, dtype=dtype), model_id)

    def encoder_fingerprint(self, model_id: str) -> str:
        """Hash of the audio encoder's weights as they are stored."""
        return weights_fingerprint(model_id, ENCODER)

    def load_encoder(self, model_id: str, *, dtype: torch.dtype, device: torch.device) -> Any:
        """Load the audio encoder alone, as ``load_model`` would load it.

        Raises:
            RunError: Its weights are missing or do not fit the configuration.
        """
        from transformers import VoxtralConfig, VoxtralEncoder

        config = VoxtralConfig.from_pretrained(model_id).audio_config
        return load_alone(VoxtralEncoder, config, model_id, ENCODER, dtype=dtype, device=device)

    def encode(self, encoder: Any, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Outputs of the encoder for whole windows.

        Returns:
            states_WPD, P encoder frames of a window.
        """
        return encode(encoder, features_WFT)

    def skip_encoder(self, model: Any) -> None:
        """Make a model take the encoder's outputs as ``input_features``, and free the encoder's memory."""
        base = base_of(model)
        base.model.audio_tower = PassThrough(base.dtype)

    def audio_path(self, model: Any) -> Projected:
        """Encoder and projector: mel_WFT -> states_ND, the positions of all windows one after the other."""
        base = base_of(model)
        return Projected(base.model.audio_tower, base.model.multi_modal_projector, base.config.audio_config)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Let what ``audio_path`` gives come from elsewhere, and free the memory of the encoder's layers."""
        hear_through(base_of(model).model, run)

    def compile_layers(self, model: Any) -> None:
        """Let ``answer_logits`` run compiled layers of the language model; ``generate`` leaves them as they are.

        Raises:
            RunError: Nothing can be compiled on this machine.
        """
        compile_layers(base_of(model).model.language_model, model.device)

    def answer_logits(
        self, model: Any, batch: dict[str, torch.Tensor], keep_BL: torch.Tensor, *, touched: Sequence[str] = ()
    ) -> torch.Tensor:
        """Logits at the chosen positions only: with 131,072 tokens they are most of a step's memory.

        Args:
            model: The base or its PEFT wrapper.
            batch: As ``collate`` makes it, padded or packed, without labels and tasks.
            keep_BL: True where the next token is to be predicted.
            touched: Roles that take part even in a batch without audio, at the place in the order of computing that
                they have with audio, without changing the result: they get gradients of zero.
        Returns:
            logits_NV.
        """
        base = base_of(model)
        inputs = with_trimmed_audio(base, batch)
        if "segment_ends" in inputs:
            use_packed_attention(base.model.language_model)
            inputs["segments"] = Segments.of(inputs.pop("segment_ends"))
        # The cache stays off: with it the library lets the samples of a packed row see each other.
        roles = () if "input_features" in batch else touched
        with touching(base.get_input_embeddings(), roles, partial(silence, base)):
            hidden_BLD = base.model(use_cache=False, **inputs).last_hidden_state
        return base.lm_head(hidden_BLD[keep_BL])

    def begin(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[CausalDecoding, torch.Tensor]:
        """Read left-padded prompts, to continue them token by token (see ``models.family.Family``)."""
        base = base_of(model)

        def run(**inputs: Any) -> torch.Tensor:
            with uncompiled(base.model.language_model):
                hidden_BLD = base.model(use_cache=True, **inputs).last_hidden_state
            return linear_of_few(base.lm_head, hidden_BLD[:, -1])

        return CausalDecoding.begin(run, with_trimmed_audio(base, batch))

    def generate(
        self, model: Any, batch: dict[str, torch.Tensor], *, num_samples: Sequence[int] = (), **options: Any
    ) -> torch.Tensor:
        """Continue left-padded prompts.

        Returns:
            ids_BL of the continuations alone, padded on the right.
        """
        base = base_of(model)
        inputs = with_trimmed_audio(base, batch)
        with uncompiled(base.model.language_model):
            ids_BL = model.generate(**inputs, **options)
        return ids_BL[:, batch["input_ids"].shape[1] :] if "input_ids" in inputs else ids_BL
