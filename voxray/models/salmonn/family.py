"""SALMONN's model side: what of it is loaded, trained and asked.

Shape letters: B rows, L tokens, W windows, T mel frames, F bins, D width, N answer positions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from voxray.core.errors import SettingsError
from voxray.core.tasks import TASKS
from voxray.models.hf_files import build_on_meta, unwrap_peft
from voxray.models.interface import AudioPath
from voxray.models.parts.audio_encoder import PassThrough
from voxray.models.parts.cpu_lm_head import few_rows_linear
from voxray.models.parts.kv_cache import CausalDecodeState
from voxray.models.parts.layer_compile import compile_layers, uncompiled
from voxray.models.parts.logmel_windows import ENCODER_STRIDE
from voxray.models.parts.packed_attention import Segments, use_packed_attention
from voxray.models.parts.quantize import quantization, settle
from voxray.models.parts.zero_audio_gradients import zero_audio_gradients
from voxray.models.salmonn.audio_path import TOWERS, TRAINED, StoredEncoders, WindowPath
from voxray.models.salmonn.checkpoint import official_name
from voxray.models.salmonn.folder import copy_files, load_folder, load_towers, read_folder, towers_fingerprint
from voxray.models.salmonn.front_end import SalmonnFrontEnd
from voxray.models.salmonn.model import SalmonnForConditionalGeneration
from voxray.models.salmonn.stacked_features import MIN_SAMPLES

if TYPE_CHECKING:
    from voxray.models.salmonn.init_checkpoint import OfficialCheckpoint

LLM = "llama_model"
NO_DECAY = ("bias", "ln", "bn")


class Salmonn:
    """SALMONN's model side (see ``models.family.Family``)."""

    name = "salmonn"
    job = "train_salmonn"
    tasks: tuple[str, ...] = tuple(TASKS)
    roles: Mapping[str, tuple[str, ...]] = MappingProxyType({"encoder": TOWERS, "projector": TRAINED, "llm": (LLM,)})
    lora_targets: Mapping[str, tuple[str, ...]] = MappingProxyType({"llm": ("q_proj", "v_proj")})
    full_modules: tuple[str, ...] = TRAINED
    always_frozen: tuple[str, ...] = TOWERS
    quantized: tuple[str, ...] = ("llm",)
    files: tuple[str, ...] = ()

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> SalmonnFrontEnd:
        return SalmonnFrontEnd(model_id, trim_audio=trim_audio)

    def no_decay(self, name: str, parameter: torch.nn.Parameter) -> bool:
        """Whether SALMONN's trainer lets weight decay pass a parameter by; it goes by names and dimensions."""
        return parameter.ndim < 2 or any(part in official_name(name) for part in NO_DECAY)

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        """Load the base with every weight frozen; the LoRA of a checkpoint that the folder names is added into the
        language model's weights.

        Args:
            dtype: Type of the weights that SALMONN does not train, and of computing; the others stay float32.
            quantize: ``8bit`` or ``4bit`` quantises the language model's layers.
        Raises:
            RunError: Weights are missing or cannot be read, or bitsandbytes is missing.
            SettingsError: A checkpoint's LoRA would have to be added into quantised weights.
        """
        logging.disable_progress_bar()
        config = quantization(quantize, dtype, (*TOWERS, *TRAINED, "lm_head"))
        options: dict[str, Any] = {"quantization_config": config, "device_map": {"": device}} if config else {}
        model = load_folder(model_id, dtype=dtype, **options)
        if unwrap_peft(model.llama_model) is not model.llama_model:
            if config and "checkpoint" in (read_folder(model_id).parts or {}):
                raise SettingsError(
                    f"--quantize {quantize}: the LoRA of the checkpoint that {model_id} names cannot be added into "
                    "quantised weights; name no checkpoint there, and start from it with --ckpt"
                )
            model.llama_model = model.llama_model.merge_and_unload()
        settle(model)
        return model.to(device).requires_grad_(False).eval()

    def build_on_meta(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """The model without weights (see ``models.family.Family``)."""
        config = read_folder(model_id)
        return build_on_meta(lambda: SalmonnForConditionalGeneration._from_config(config, dtype=dtype), model_id)

    def copy_files(self, model_id: str, folder: Path) -> None:
        """Put what stands beside configuration and weights, tokenizer and front ends, into another folder."""
        copy_files(model_id, folder)

    def read_official(self, path: str, *, r: int, alpha: float) -> "OfficialCheckpoint | None":
        """What a checkpoint (.pth) of SALMONN's trainer holds; None for a folder."""
        from voxray.models.salmonn.init_checkpoint import read_official

        return read_official(path, r=r, alpha=alpha) if Path(path).is_file() else None

    def write_official(self, model: Any, folder: Path, model_id: str) -> tuple[Path, int]:
        from voxray.models.salmonn.export_checkpoint import write_official

        return write_official(model, folder, model_id)

    def load_official(self, base: Any, path: Path) -> Any:
        from voxray.models.salmonn.export_checkpoint import read_official_model

        return read_official_model(base, self, path)

    def encoder_fingerprint(self, model_id: str) -> str:
        """Hash of both encoders' weights as they are stored.

        Raises:
            SettingsError: The folder says that a clip's embeddings depend on its batch.
        """
        _refuse_batch_dependence(read_folder(model_id), model_id)
        return towers_fingerprint(model_id)

    def load_encoder(self, model_id: str, *, dtype: torch.dtype, device: torch.device) -> StoredEncoders:
        """Load both encoders alone, as ``load_model`` would load them.

        Raises:
            RunError: Their weights are missing or do not fit the configuration.
        """
        return load_towers(model_id, dtype=dtype, device=device)

    @torch.inference_mode()
    def encode(self, encoder: StoredEncoders, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Outputs of both encoders for whole windows.

        Returns:
            states_WKD (see ``hearing.StoredEncoders``).
        """
        device = next(encoder.parameters()).device
        return encoder(features_WFT.to(device), num_samples_W.to(device))

    def skip_encoder(self, model: Any) -> None:
        """Make a model take both encoders' outputs as ``input_features``, and free the encoders' memory."""
        base = unwrap_peft(model)
        for name in TOWERS:
            setattr(base, name, PassThrough(base.dtype))
        base.window_embeds = base.stored_embeds

    def audio_path(self, model: Any) -> WindowPath:
        """All that hears: (features_WFT, num_samples_W) -> embeds_WPD.

        Raises:
            SettingsError: The folder says that a clip's embeddings depend on its batch.
        """
        base = unwrap_peft(model)
        _refuse_batch_dependence(base.config, base.name_or_path)
        return WindowPath(base)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        """Let what ``audio_path`` gives come from elsewhere, and free the memory of the encoders' layers."""
        base = unwrap_peft(model)
        base.window_embeds = run
        base.speech_encoder.layers, base.beats.encoder.layers = torch.nn.ModuleList(), torch.nn.ModuleList()

    def compile_layers(self, model: Any) -> None:
        """Let ``answer_logits`` run compiled layers of the language model; ``generate`` leaves them as they are.

        Raises:
            RunError: Nothing can be compiled on this machine.
        """
        compile_layers(unwrap_peft(model).llama_model.model, model.device)

    def answer_logits(
        self,
        model: Any,
        batch: dict[str, torch.Tensor],
        keep_BL: torch.Tensor,
        *,
        roles_in_every_pass: Sequence[str] = (),
    ) -> torch.Tensor:
        """Logits at the chosen positions only.

        Args:
            model: The base or its PEFT wrapper.
            batch: As ``collate`` makes it, padded or packed, without labels and tasks.
            keep_BL: True where the next token is to be predicted.
            roles_in_every_pass: Roles that take part even in a batch without audio, without changing the result.
        Returns:
            logits_NV.
        """
        base = unwrap_peft(model)
        roles = () if "input_features" in batch else roles_in_every_pass
        with zero_audio_gradients(base.get_input_embeddings(), roles, partial(_silence, base)):
            inputs = base.llm_inputs(**batch)
        language_model = base.llama_model.model
        if "segment_ends" in inputs:
            use_packed_attention(language_model)
            inputs["segments"] = Segments.of(inputs.pop("segment_ends"))
        hidden_BLD = language_model(use_cache=False, **inputs).last_hidden_state
        return base.llama_model.lm_head(hidden_BLD[keep_BL])

    def prefill(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[CausalDecodeState, torch.Tensor]:
        """Read left-padded prompts, to continue them token by token (see ``models.family.Family``)."""
        base = unwrap_peft(model)

        def run(**inputs: Any) -> torch.Tensor:
            with uncompiled(base.llama_model.model):
                hidden_BLD = base.llama_model.model(use_cache=True, **inputs).last_hidden_state
            return few_rows_linear(base.llama_model.lm_head, hidden_BLD[:, -1])

        return CausalDecodeState.prefill(run, base.llm_inputs(**batch))

    def generate(
        self, model: Any, batch: dict[str, torch.Tensor], *, num_samples: Sequence[int] = (), **options: Any
    ) -> torch.Tensor:
        """Continue left-padded prompts.

        Returns:
            ids_BL of the continuations alone, padded on the right.
        """
        base = unwrap_peft(model)
        with uncompiled(base.llama_model.model):
            return base.llama_model.generate(**base.llm_inputs(**batch), **options)


def _silence(base: Any, with_encoder: bool, device: torch.device) -> torch.Tensor:
    """What the Q-Former, and both encoders before it, make of nothing."""
    speech, beats = base.config.speech_config, base.config.beats_config
    zeros, frames = partial(torch.zeros, device=device), speech.max_source_positions
    if with_encoder and not isinstance(base.beats, PassThrough):
        return base.audio_embeds(zeros(1, speech.num_mel_bins, frames * ENCODER_STRIDE), zeros(1, MIN_SAMPLES))
    return base.stored_embeds(zeros(1, frames, speech.d_model + beats.encoder_embed_dim), zeros(1))


def _refuse_batch_dependence(config: Any, model_id: str) -> None:
    if not config.alone:
        raise SettingsError(
            f'--model_id {model_id}: its config.json says "alone": false, so what it makes of a clip depends on the '
            "others of the batch, and can neither be stored (--store encoder) nor compiled; set it to true"
        )
