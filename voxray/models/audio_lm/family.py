"""Decoder-only language models that read audio at placeholder tokens: encoder -> projector -> language model.

``facts.FACTS`` lists the model types and what distinguishes them.

Shape letters: B rows, L tokens, W windows, T mel frames of a window, F mel bins, P positions of a window, N predicted
positions, V vocabulary, D width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from voxray.core.errors import RunError, library_errors
from voxray.models.audio_lm.audio import COMPILED, AudioModules, audio_embeds, run_encoder, silent_audio
from voxray.models.audio_lm.facts import FACTS
from voxray.models.audio_lm.front_end import AudioLmFrontEnd
from voxray.models.family_defaults import FamilyDefaults
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import build_on_meta, library_class, unwrap_peft
from voxray.models.interface import AudioPath, Batch, OutputFn, apply_layer
from voxray.models.parts.audio_encoder import EncoderMethods
from voxray.models.parts.cpu_lm_head import few_rows_linear
from voxray.models.parts.kv_cache import CausalDecodeState
from voxray.models.parts.layer_compile import compile_layers, eager_mode
from voxray.models.parts.losses import at_positions
from voxray.models.parts.packed_attention import use_training_attention
from voxray.models.parts.placeholders import put_audio
from voxray.models.parts.quantize import load_frozen
from voxray.models.parts.zero_audio_gradients import zero_audio_gradients

ENCODER, PROJECTOR = "audio_tower", "multi_modal_projector"


class AudioLm(EncoderMethods, FamilyDefaults):
    """The model side of one model type of ``FACTS`` (see ``ModelFamily``)."""

    roles: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {"encoder": (ENCODER,), "projector": (PROJECTOR,), "llm": ("language_model", "lm_head")}
    )
    always_frozen: tuple[str, ...] = ("audio_tower.embed_positions",)  # sinusoids
    quantized: tuple[str, ...] = ("llm",)
    files: tuple[str, ...] = (
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
    )
    encoder_name = ENCODER

    def __init__(self, model_type: str) -> None:
        self.name, self.facts = model_type, FACTS[model_type]
        self.tasks = self.facts.tasks

    @property
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        """{role: names of the Linear layers that LoRA adapts in it}."""
        return {
            "encoder": ("q_proj", "k_proj", "v_proj", self.facts.output),
            "projector": self.facts.projector,
            "llm": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        }

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> FrontEnd:
        with library_errors(f"--model_id {model_id}: its configuration or processor cannot be used"):
            return AudioLmFrontEnd(model_id, self.facts, trim_audio=trim_audio)

    def projector_positions(self, config: Any, front_end: FrontEnd) -> int:
        audio = config.audio_config
        return int(self.facts.positions(self.facts.window_frames(audio), audio))

    def encoder_layer_positions(self, config: Any, front_end: FrontEnd) -> int:
        return front_end.encoder_positions * self.facts.pooled

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        """Load the base; ``quantize`` applies to the layers of the language model."""
        options: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}
        return load_frozen(library_class(self.facts.model), model_id, **options, keep=(ENCODER, PROJECTOR, "lm_head"))

    def build_on_meta(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """Build the base on the meta device."""
        config = library_class(self.facts.config).from_pretrained(model_id)
        return build_on_meta(lambda: library_class(self.facts.model)._from_config(config, dtype=dtype), model_id)

    def encoder_class(self, model_id: str) -> tuple[Any, Any]:
        return library_class(self.facts.encoder), library_class(self.facts.config).from_pretrained(
            model_id
        ).audio_config

    @torch.inference_mode()
    def encode(self, encoder: Any, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Run the encoder on whole windows; returns states_WPD."""
        device = next(encoder.parameters()).device
        return run_encoder(encoder, self.facts, features_WFT.to(device), num_samples_W.to(device))

    def audio_path(self, model: Any) -> torch.nn.Module:
        """Encoder and projector: (mel_WFT, num_samples_W) -> embeds_WPD.

        Raises:
            RunError: The encoder cannot be compiled.
        """
        base = unwrap_peft(model)
        if not self.facts.compiles:
            reason = f"the audio path of a {self.name} model depends on whole clips"
            raise RunError(f"--model_id {base.name_or_path}: {reason}, so it cannot be compiled")
        return AudioModules(base, self.facts)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Make a model call ``run`` instead of encoder and projector."""
        base = unwrap_peft(model)
        setattr(base, COMPILED, run)
        base.model.audio_tower.layers = torch.nn.ModuleList()

    def compile_layers(self, model: Any) -> None:
        """Compile the layers of the language model for ``answer_logits``."""
        compile_layers(unwrap_peft(model).model.language_model, model.device)

    def audio_embeds(self, base: Any, batch: Batch) -> torch.Tensor:
        """Outputs of encoder and projector for the windows of a batch, the last dimension their width."""
        return audio_embeds(base, self.facts, batch)

    def embed_audio(self, base: Any, batch: Batch) -> dict[str, Any]:
        """Inputs of a base's ``model``: embeddings, with audio at the placeholder tokens; without audio the batch."""
        inputs = dict[str, Any](batch)
        if "input_features" not in batch:
            return inputs
        for name in ("input_features", "num_samples", "audio_positions", "audio_outputs"):
            inputs.pop(name, None)
        embeddings_BLD = base.get_input_embeddings()(inputs.pop("input_ids"))
        inputs["inputs_embeds"] = put_audio(embeddings_BLD, self.audio_embeds(base, batch), batch)
        return inputs

    def silent_audio(self, base: Any, with_encoder: bool, device: torch.device) -> torch.Tensor:
        """Outputs of the projector for inputs of zeros, of the encoder if ``with_encoder``, else of the projector."""
        return silent_audio(base, self.facts, with_encoder, device)

    def answer_logits(
        self,
        model: Any,
        batch: Batch,
        positions_N: torch.Tensor,
        output: OutputFn = apply_layer,
        *,
        roles_in_every_pass: Sequence[str] = (),
    ) -> torch.Tensor:
        """Compute logits_NV at selected positions. With 131,072 tokens, logits are most of a step's memory."""
        base = unwrap_peft(model)
        roles = () if "input_features" in batch else roles_in_every_pass
        with zero_audio_gradients(base.get_input_embeddings(), roles, partial(self.silent_audio, base)):
            inputs = self.embed_audio(base, batch)
            if "input_ids" in inputs:  # embeddings come first in all batches, because workers gather them in one order
                inputs["inputs_embeds"] = base.get_input_embeddings()(inputs.pop("input_ids"))
        inputs = use_training_attention(base.model.language_model, inputs, positions_N.device)
        # Without a cache, because with one transformers lets the samples of a packed row attend to each other.
        hidden_BLD = base.model(use_cache=False, **inputs).last_hidden_state
        return output(base.lm_head, at_positions(hidden_BLD, positions_N))

    def prefill(self, model: Any, batch: Batch) -> tuple[CausalDecodeState, torch.Tensor]:
        """Run left-padded prompts; returns their state and logits_BV of the first new token."""
        base = unwrap_peft(model)

        def forward(**inputs: Any) -> torch.Tensor:
            with eager_mode(base.model.language_model):
                hidden_BLD = base.model(use_cache=True, **inputs).last_hidden_state
            return few_rows_linear(base.lm_head, hidden_BLD[:, -1])

        return CausalDecodeState.prefill(forward, self.embed_audio(base, batch))

    def generate(self, model: Any, batch: Batch, *, num_samples: Sequence[int] = (), **options: Any) -> torch.Tensor:
        """Generate answers to left-padded prompts; returns ids_BL of the new tokens, padded on the right."""
        base = unwrap_peft(model)
        inputs = self.embed_audio(base, batch)
        with eager_mode(base.model.language_model):
            ids_BL = model.generate(**inputs, **options)
        return ids_BL[:, batch["input_ids"].shape[1] :] if "input_ids" in inputs else ids_BL
