"""SALMONN's model side.

Shape letters: B rows, L tokens, W windows, T mel frames, F bins, K frames of both encoders, P LLM positions of a
window, D width, N predicted positions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers.utils import logging

from voxray.core.errors import SettingsError, library_errors
from voxray.core.tasks import single_turn_tasks
from voxray.models.family_defaults import FamilyDefaults
from voxray.models.front_end import FrontEnd
from voxray.models.hf_files import build_on_meta, unwrap_peft
from voxray.models.interface import AudioPath, Batch, InitAdapter, OutputFn, apply_layer
from voxray.models.layer_names import LayerNames
from voxray.models.parts.audio_encoder import PassThrough
from voxray.models.parts.cpu_lm_head import few_rows_linear
from voxray.models.parts.kv_cache import CausalDecodeState
from voxray.models.parts.layer_compile import compile_layers, eager_mode
from voxray.models.parts.logmel_windows import ENCODER_STRIDE
from voxray.models.parts.losses import at_positions
from voxray.models.parts.packed_attention import use_training_attention
from voxray.models.parts.quantize import quantization_config, stabilize_quantized_layers
from voxray.models.parts.zero_audio_gradients import zero_audio_gradients
from voxray.models.salmonn.audio_path import ENCODERS, TRAINED_MODULES, StoredEncoders, WindowPath
from voxray.models.salmonn.compat.checkpoint import official_name
from voxray.models.salmonn.folder import (
    content_hash,
    copy_files,
    encoders_fingerprint,
    load_encoders,
    load_folder,
    read_folder,
)
from voxray.models.salmonn.front_end import SalmonnFrontEnd
from voxray.models.salmonn.model import SalmonnForConditionalGeneration
from voxray.models.salmonn.stacked_features import MIN_SAMPLES

LLM = "llama_model"
NO_DECAY = ("bias", "ln", "bn")  # parts of names


class Salmonn(FamilyDefaults):
    """SALMONN's model side (see ``ModelFamily``)."""

    name = "salmonn"
    tasks: tuple[str, ...] = single_turn_tasks()
    roles: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {"encoder": ENCODERS, "projector": TRAINED_MODULES, "llm": (LLM,)}
    )
    lora_targets: Mapping[str, tuple[str, ...]] = MappingProxyType({"llm": ("q_proj", "v_proj")})
    full_modules: tuple[str, ...] = TRAINED_MODULES
    always_frozen: tuple[str, ...] = ENCODERS
    quantized: tuple[str, ...] = ("llm",)
    float32_roles: tuple[str, ...] = ("projector",)
    layer_names = LayerNames(
        shared_inputs=(*LayerNames.shared_inputs, ("query", "key", "value")),
        cross_attention=(("crossattention", "key", "value"),),
        encoder_norms=("ln_speech", "ln_audio"),
    )

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> SalmonnFrontEnd:
        with library_errors(f"--model_id {model_id}: its configuration or tokenizer cannot be used"):
            return SalmonnFrontEnd(model_id, trim_audio=trim_audio)

    def projector_positions(self, config: Any, front_end: FrontEnd) -> int:
        return config.positions_per_clip

    def cross_attention_frames(self, config: Any, front_end: FrontEnd) -> int:
        """Each position of the Q-Former reads the frames of its own short window."""
        return config.positions_per_clip * config.window_frames

    def no_decay(self, name: str, parameter: torch.nn.Parameter) -> bool:
        """Exclude the parameters that SALMONN's trainer excludes, by name and number of dimensions."""
        return parameter.ndim < 2 or any(part in official_name(name) for part in NO_DECAY)

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        """Load the base. LoRA of a checkpoint that the folder names is merged into the language model.

        Args:
            dtype: Type of the weights that SALMONN does not train, and of their computation; the others are float32.
            quantize: ``8bit`` or ``4bit`` quantizes the layers of the language model.
        Raises:
            RunError: Weights are missing or cannot be read, or bitsandbytes is missing.
            SettingsError: A checkpoint's LoRA would have to be merged into quantized weights.
        """
        logging.disable_progress_bar()
        config = quantization_config(quantize, dtype, (*ENCODERS, *TRAINED_MODULES, "lm_head"))
        options: dict[str, Any] = {"quantization_config": config} if config else {}
        if config or device.type != "cpu":  # convert each weight on its device
            options["device_map"] = {"": device}
        model = load_folder(model_id, dtype=dtype, **options)
        if unwrap_peft(model.llama_model) is not model.llama_model:
            if config and "checkpoint" in (read_folder(model_id).parts or {}):
                raise SettingsError(
                    f"--quantize {quantize}: the LoRA of the checkpoint that {model_id} names cannot be added into "
                    "quantised weights; name no checkpoint there, and start from it with --ckpt"
                )
            model.llama_model = model.llama_model.merge_and_unload()
        stabilize_quantized_layers(model)
        return model.to(device).requires_grad_(False).eval()

    def build_on_meta(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """Build the base on the meta device."""
        config = read_folder(model_id)
        return build_on_meta(lambda: SalmonnForConditionalGeneration._from_config(config, dtype=dtype), model_id)

    def content_hash(self, model_id: str) -> str:
        return content_hash(model_id)

    def copy_files(self, model_id: str, folder: Path) -> None:
        """Copy tokenizer, Whisper's preprocessor and prompts."""
        copy_files(model_id, folder)

    def read_official(self, path: str, *, r: int, alpha: float) -> InitAdapter | None:
        """Read a checkpoint (.pth) of SALMONN's trainer; None for a folder."""
        from voxray.models.salmonn.compat.init_checkpoint import read_official

        return read_official(path, r=r, alpha=alpha) if Path(path).is_file() else None

    def write_official(self, model: Any, folder: Path, model_id: str) -> tuple[Path, int]:
        from voxray.models.salmonn.compat.export_checkpoint import write_official

        return write_official(model, folder, read_folder(model_id))

    def load_official(self, base: Any, path: Path) -> Any:
        from voxray.models.salmonn.compat.export_checkpoint import load_official

        return load_official(base, self, path)

    def encoder_fingerprint(self, model_id: str) -> str:
        """Hash of both encoders' stored weights.

        Raises:
            SettingsError: According to the folder, a clip's embeddings depend on its batch.
        """
        _check_batch_independence(read_folder(model_id), model_id)
        return encoders_fingerprint(model_id)

    def load_encoder(self, model_id: str, *, dtype: torch.dtype, device: torch.device) -> StoredEncoders:
        """Load both encoders alone, with the same weights that ``load_model`` gives them.

        Raises:
            RunError: Their weights are missing or do not fit the configuration.
        """
        return load_encoders(model_id, dtype=dtype, device=device)

    @torch.inference_mode()
    def encode(self, encoder: StoredEncoders, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Run both encoders on whole windows; returns states_WKD (see ``StoredEncoders``)."""
        device = next(encoder.parameters()).device
        return encoder(features_WFT.to(device), num_samples_W.to(device))

    def skip_encoder(self, model: Any) -> None:
        """Make a model accept both encoders' outputs as ``input_features``, and free the encoders' memory."""
        base = unwrap_peft(model)
        for name in ENCODERS:
            setattr(base, name, PassThrough(base))
        base.window_embeds = base.stored_embeds

    def audio_path(self, model: Any) -> WindowPath:
        """Both encoders and the Q-Former: (features_WFT, num_samples_W) -> embeds_WPD.

        Raises:
            SettingsError: According to the folder, a clip's embeddings depend on its batch.
        """
        base = unwrap_peft(model)
        _check_batch_independence(base.config, base.name_or_path)
        return WindowPath(base)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Make a model call ``run`` instead of encoders and Q-Former."""
        base = unwrap_peft(model)
        base.window_embeds = lambda features, num_samples_W: run(features, num_samples_W.to(features.device))
        base.speech_encoder.layers, base.beats.encoder.layers = torch.nn.ModuleList(), torch.nn.ModuleList()

    def compile_layers(self, model: Any) -> None:
        """Compile the layers of the language model for ``answer_logits``."""
        compile_layers(unwrap_peft(model).llama_model.model, model.device)

    def answer_logits(
        self,
        model: Any,
        batch: Batch,
        positions_N: torch.Tensor,
        output: OutputFn = apply_layer,
        *,
        roles_in_every_pass: Sequence[str] = (),
    ) -> torch.Tensor:
        """Compute logits_NV at selected positions."""
        base = unwrap_peft(model)
        roles = () if "input_features" in batch else roles_in_every_pass
        with zero_audio_gradients(base.get_input_embeddings(), roles, partial(_silent_embeds, base)):
            inputs = _llm_inputs(base, batch)
        language_model = base.llama_model.model
        inputs = use_training_attention(language_model, inputs, positions_N.device)
        hidden_BLD = language_model(use_cache=False, **inputs).last_hidden_state
        return output(base.llama_model.lm_head, at_positions(hidden_BLD, positions_N))

    def prefill(self, model: Any, batch: Batch) -> tuple[CausalDecodeState, torch.Tensor]:
        """Run left-padded prompts; returns their state and logits_BV of the first new token."""
        base = unwrap_peft(model)

        def forward(**inputs: Any) -> torch.Tensor:
            with eager_mode(base.llama_model.model):
                hidden_BLD = base.llama_model.model(use_cache=True, **inputs).last_hidden_state
            return few_rows_linear(base.llama_model.lm_head, hidden_BLD[:, -1])

        return CausalDecodeState.prefill(forward, _llm_inputs(base, batch))

    def generate(self, model: Any, batch: Batch, *, num_samples: Sequence[int] = (), **options: Any) -> torch.Tensor:
        """Generate answers to left-padded prompts; returns ids_BL of the new tokens, padded on the right."""
        base = unwrap_peft(model)
        with eager_mode(base.llama_model.model):
            return base.llama_model.generate(**_llm_inputs(base, batch), **options)


def _llm_inputs(base: Any, batch: Batch) -> dict[str, Any]:
    """Inputs of the language model for a batch, of which some have no audio."""
    no_positions = batch["input_ids"].new_empty(0)
    return base.llm_inputs(**{"audio_positions": no_positions, **batch})


def _silent_embeds(base: Any, with_encoder: bool, device: torch.device) -> torch.Tensor:
    """Embeddings for inputs of zeros, of the encoders if ``with_encoder``, else of the Q-Former."""
    speech, beats = base.config.speech_config, base.config.beats_config
    zeros, frames = partial(torch.zeros, device=device), speech.max_source_positions
    if with_encoder and not isinstance(base.beats, PassThrough):
        return base.audio_embeds(zeros(1, speech.num_mel_bins, frames * ENCODER_STRIDE), zeros(1, MIN_SAMPLES))
    return base.stored_embeds(zeros(1, frames, speech.d_model + beats.encoder_embed_dim), zeros(1))


def _check_batch_independence(config: Any, model_id: str) -> None:
    if not config.alone:
        raise SettingsError(
            f'--model_id {model_id}: its config.json says "alone": false, so the embeddings of a clip depend on the '
            "other clips in its batch, and can neither be stored (--store encoder) nor compiled; set it to true"
        )
