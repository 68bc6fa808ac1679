"""Voxtral: Whisper encoder -> projector (four encoder positions each) -> Mistral-type language model.

Window length, mel bins and positions per window come from the model's configuration: 30 s, 128 and 375 for the released
Voxtral, other values for the tiny one.

Shape letters: B rows, L tokens, W windows, T mel frames of a window, F mel bins, N predicted positions in
``answer_logits`` and audio positions of all windows in ``audio_path``, V vocabulary, D width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from voxray.core.errors import library_errors
from voxray.core.tasks import TASKS
from voxray.models.family_defaults import FamilyDefaults
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import build_on_meta, unwrap_peft
from voxray.models.interface import AudioPath, Batch
from voxray.models.parts.audio_encoder import EncoderMethods, replace_audio_encoder
from voxray.models.parts.cpu_lm_head import few_rows_linear
from voxray.models.parts.kv_cache import CausalDecodeState
from voxray.models.parts.layer_compile import compile_layers, eager_mode
from voxray.models.parts.packed_attention import Segments, use_packed_attention
from voxray.models.parts.quantize import load_frozen
from voxray.models.parts.zero_audio_gradients import zero_audio_gradients
from voxray.models.voxtral.audio import EncoderAndProjector, embed_trimmed_audio, silent_audio_features
from voxray.models.voxtral.front_end import VoxtralFrontEnd

ENCODER, PROJECTOR = "audio_tower", "multi_modal_projector"


class Voxtral(EncoderMethods, FamilyDefaults):
    """Voxtral's model side (see ``ModelFamily``)."""

    name = "voxtral"
    tasks: tuple[str, ...] = tuple(TASKS)
    roles: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {"encoder": (ENCODER,), "projector": (PROJECTOR,), "llm": ("language_model", "lm_head")}
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
    encoder_name = ENCODER

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> VoxtralFrontEnd:
        with library_errors(f"--model_id {model_id}: its configuration or tokenizer cannot be used"):
            return VoxtralFrontEnd(model_id, trim_audio=trim_audio)

    def projector_positions(self, config: Any, front_end: FrontEnd) -> int:
        audio = config.audio_config
        return audio.max_source_positions * audio.hidden_size // audio.intermediate_size

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        """Load the base; ``quantize`` applies to the layers of the language model."""
        from transformers import VoxtralForConditionalGeneration

        options: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}
        return load_frozen(VoxtralForConditionalGeneration, model_id, **options, keep=(ENCODER, PROJECTOR, "lm_head"))

    def build_on_meta(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """Build the base on the meta device."""
        from transformers import VoxtralConfig, VoxtralForConditionalGeneration

        config = VoxtralConfig.from_pretrained(model_id)
        return build_on_meta(lambda: VoxtralForConditionalGeneration._from_config(config, dtype=dtype), model_id)

    def encoder_class(self, model_id: str) -> tuple[Any, Any]:
        from transformers import VoxtralConfig, VoxtralEncoder

        return VoxtralEncoder, VoxtralConfig.from_pretrained(model_id).audio_config

    def audio_path(self, model: Any) -> EncoderAndProjector:
        """Encoder and projector: mel_WFT -> states_ND, the positions of all windows in order."""
        base = unwrap_peft(model)
        return EncoderAndProjector(base.model.audio_tower, base.model.multi_modal_projector, base.config.audio_config)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Make a model call ``run`` instead of encoder and projector."""
        inner = unwrap_peft(model).model
        replace_audio_encoder(inner.audio_tower, inner, "get_audio_features", "pooler_output", run)

    def compile_layers(self, model: Any) -> None:
        """Compile the layers of the language model for ``answer_logits``."""
        compile_layers(unwrap_peft(model).model.language_model, model.device)

    def answer_logits(
        self, model: Any, batch: Batch, keep_BL: torch.Tensor, *, roles_in_every_pass: Sequence[str] = ()
    ) -> torch.Tensor:
        """Compute logits_NV at selected positions. With 131,072 tokens, logits are most of a step's memory."""
        base = unwrap_peft(model)
        inputs = embed_trimmed_audio(base, batch)
        if "segment_ends" in inputs:
            use_packed_attention(base.model.language_model)
            inputs["segments"] = Segments.of(inputs.pop("segment_ends"))
        roles = () if "input_features" in batch else roles_in_every_pass
        with zero_audio_gradients(base.get_input_embeddings(), roles, partial(silent_audio_features, base)):
            # Without a cache, because with one transformers lets the samples of a packed row attend to each other.
            hidden_BLD = base.model(use_cache=False, **inputs).last_hidden_state
        return base.lm_head(hidden_BLD[keep_BL])

    def prefill(self, model: Any, batch: Batch) -> tuple[CausalDecodeState, torch.Tensor]:
        """Run left-padded prompts; returns their state and logits_BV of the first new token."""
        base = unwrap_peft(model)

        def forward(**inputs: Any) -> torch.Tensor:
            with eager_mode(base.model.language_model):
                hidden_BLD = base.model(use_cache=True, **inputs).last_hidden_state
            return few_rows_linear(base.lm_head, hidden_BLD[:, -1])

        return CausalDecodeState.prefill(forward, embed_trimmed_audio(base, batch))

    def generate(self, model: Any, batch: Batch, *, num_samples: Sequence[int] = (), **options: Any) -> torch.Tensor:
        """Generate answers to left-padded prompts; returns ids_BL of the new tokens, padded on the right."""
        base = unwrap_peft(model)
        inputs = embed_trimmed_audio(base, batch)
        with eager_mode(base.model.language_model):
            ids_BL = model.generate(**inputs, **options)
        return ids_BL[:, batch["input_ids"].shape[1] :] if "input_ids" in inputs else ids_BL
