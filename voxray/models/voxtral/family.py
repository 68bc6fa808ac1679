"""Voxtral: Whisper encoder -> projector (four encoder frames a position) -> Mistral-type language model.

Window length, mel bins and positions per window come from the model's configuration: 30 s, 128 and 375 for the released
Voxtral, other figures for the tiny one.

Shape letters: B rows, L tokens, W windows, T mel frames of a window, F mel bins, N answer positions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from voxray.core.tasks import TASKS
from voxray.models.hf_files import build_on_meta, unwrap_peft
from voxray.models.interface import AudioPath, FamilyDefaults
from voxray.models.parts.audio_encoder import PassThrough, encode, load_alone, weights_fingerprint
from voxray.models.parts.cpu_lm_head import few_rows_linear
from voxray.models.parts.kv_cache import CausalDecodeState
from voxray.models.parts.layer_compile import compile_layers, uncompiled
from voxray.models.parts.packed_attention import Segments, use_packed_attention
from voxray.models.parts.quantize import load_frozen
from voxray.models.parts.zero_audio_gradients import zero_audio_gradients
from voxray.models.voxtral.audio import Projected, replace_audio_encoder, silence, with_trimmed_audio
from voxray.models.voxtral.front_end import VoxtralFrontEnd

ENCODER = "audio_tower"


class Voxtral(FamilyDefaults):
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

    always_frozen: tuple[str, ...] = ("audio_tower.embed_positions",)  # sinusoids
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

    def build_on_meta(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """The model without weights (see ``models.family.Family``)."""
        from transformers import VoxtralConfig, VoxtralForConditionalGeneration

        config = VoxtralConfig.from_pretrained(model_id)
        return build_on_meta(lambda: VoxtralForConditionalGeneration._from_config(config, dtype=dtype), model_id)

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
        base = unwrap_peft(model)
        base.model.audio_tower = PassThrough(base.dtype)

    def audio_path(self, model: Any) -> Projected:
        """Encoder and projector: mel_WFT -> states_ND, the positions of all windows one after the other."""
        base = unwrap_peft(model)
        return Projected(base.model.audio_tower, base.model.multi_modal_projector, base.config.audio_config)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Let what ``audio_path`` gives come from elsewhere, and free the memory of the encoder's layers."""
        replace_audio_encoder(unwrap_peft(model).model, run)

    def compile_layers(self, model: Any) -> None:
        """Let ``answer_logits`` run compiled layers of the language model; ``generate`` leaves them as they are.

        Raises:
            RunError: Nothing can be compiled on this machine.
        """
        compile_layers(unwrap_peft(model).model.language_model, model.device)

    def answer_logits(
        self,
        model: Any,
        batch: dict[str, torch.Tensor],
        keep_BL: torch.Tensor,
        *,
        roles_in_every_pass: Sequence[str] = (),
    ) -> torch.Tensor:
        """Logits at the chosen positions only: with 131,072 tokens they are most of a step's memory.

        Args:
            model: The base or its PEFT wrapper.
            batch: As ``collate`` makes it, padded or packed, without labels and tasks.
            keep_BL: True where the next token is to be predicted.
            roles_in_every_pass: Roles that take part even in a batch without audio, in the same order of computation as
                with audio, without changing the result: they get gradients of zero.
        Returns:
            logits_NV.
        """
        base = unwrap_peft(model)
        inputs = with_trimmed_audio(base, batch)
        if "segment_ends" in inputs:
            use_packed_attention(base.model.language_model)
            inputs["segments"] = Segments.of(inputs.pop("segment_ends"))
        # The cache stays off: with it the library lets the samples of a packed row see each other.
        roles = () if "input_features" in batch else roles_in_every_pass
        with zero_audio_gradients(base.get_input_embeddings(), roles, partial(silence, base)):
            hidden_BLD = base.model(use_cache=False, **inputs).last_hidden_state
        return base.lm_head(hidden_BLD[keep_BL])

    def prefill(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[CausalDecodeState, torch.Tensor]:
        """Read left-padded prompts, to continue them token by token (see ``models.family.Family``)."""
        base = unwrap_peft(model)

        def run(**inputs: Any) -> torch.Tensor:
            with uncompiled(base.model.language_model):
                hidden_BLD = base.model(use_cache=True, **inputs).last_hidden_state
            return few_rows_linear(base.lm_head, hidden_BLD[:, -1])

        return CausalDecodeState.prefill(run, with_trimmed_audio(base, batch))

    def generate(
        self, model: Any, batch: dict[str, torch.Tensor], *, num_samples: Sequence[int] = (), **options: Any
    ) -> torch.Tensor:
        """Continue left-padded prompts.

        Returns:
            ids_BL of the continuations alone, padded on the right.
        """
        base = unwrap_peft(model)
        inputs = with_trimmed_audio(base, batch)
        with uncompiled(base.model.language_model):
            ids_BL = model.generate(**inputs, **options)
        return ids_BL[:, batch["input_ids"].shape[1] :] if "input_ids" in inputs else ids_BL
