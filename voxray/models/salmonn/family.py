"""SALMONN's model side: what of it is loaded, trained and asked.

Shape letters: B rows, L tokens, W windows, T mel frames, F bins, D width, N answer positions, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from transformers.utils import logging

from voxray.errors import SettingsError
from voxray.models.compiling import compile_layers, is_compiled
from voxray.models.decoding import CausalDecoding
from voxray.models.family import AudioPath, outlined
from voxray.models.few_rows import linear_of_few
from voxray.models.packed import Segments, use_packed_attention
from voxray.models.quantize import quantization, settle
from voxray.models.salmonn.checkpoint import official_name
from voxray.models.salmonn.features import MIN_SAMPLES
from voxray.models.salmonn.folder import copy_files, load_folder, read_folder
from voxray.models.salmonn.model import TRAINED, SalmonnForConditionalGeneration
from voxray.models.salmonn.processor import SalmonnFrontEnd
from voxray.models.windows import ENCODER_STRIDE
from voxray.tasks import TASKS

LLM, ENCODERS = "llama_model", ("speech_encoder", "beats")
NO_DECAY = ("bias", "ln", "bn")
NO_STORE = (
    "--store encoder: SALMONN hears through two encoders, whose outputs are not stored; take --store mel or pcm16"
)
NO_AUDIO_PATH = "what hears the audio in SALMONN is not compiled ahead of time: it depends on every clip's length"


class Salmonn:
    """SALMONN's model side (see ``models.family.Family``)."""

    name = "salmonn"
    tasks: tuple[str, ...] = tuple(TASKS)
    roles: Mapping[str, tuple[str, ...]] = MappingProxyType({"encoder": ENCODERS, "projector": TRAINED, "llm": (LLM,)})
    lora_targets: Mapping[str, tuple[str, ...]] = MappingProxyType({"llm": ("q_proj", "v_proj")})
    trained_whole: tuple[str, ...] = TRAINED
    fixed: tuple[str, ...] = ENCODERS
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
        config = quantization(quantize, dtype, (*ENCODERS, *TRAINED, "lm_head"))
        options: dict[str, Any] = {"quantization_config": config, "device_map": {"": device}} if config else {}
        model = load_folder(model_id, dtype=dtype, **options)
        if isinstance(model.llama_model, PeftModel):
            if config and "checkpoint" in (read_folder(model_id).parts or {}):
                raise SettingsError(
                    f"--quantize {quantize}: the LoRA of the checkpoint that {model_id} names cannot be added into "
                    "quantised weights; name no checkpoint there, and start from it with --ckpt"
                )
            model.llama_model = model.llama_model.merge_and_unload()
        settle(model)
        return model.to(device).requires_grad_(False).eval()

    def outline(self, model_id: str, *, dtype: torch.dtype) -> Any:
        """The model without weights (see ``models.family.Family``)."""
        config = read_folder(model_id)
        return outlined(lambda: SalmonnForConditionalGeneration._from_config(config, dtype=dtype), model_id)

    def copy_files(self, model_id: str, folder: Path) -> None:
        """Put what stands beside configuration and weights, tokenizer and front ends, into another folder."""
        copy_files(model_id, folder)

    def encoder_fingerprint(self, model_id: str) -> str:
        """There is none.

        Raises:
            SettingsError: Always.
        """
        raise SettingsError(NO_STORE)

    def load_encoder(self, model_id: str, *, dtype: torch.dtype, device: torch.device) -> Any:
        raise SettingsError(NO_STORE)

    def encode(self, encoder: Any, mel_WFT: torch.Tensor) -> torch.Tensor:
        raise SettingsError(NO_STORE)

    def skip_encoder(self, model: Any) -> None:
        raise SettingsError(NO_STORE)

    def audio_path(self, model: Any) -> torch.nn.Module:
        raise SettingsError(NO_AUDIO_PATH)

    def use_audio_path(self, model: Any, run: AudioPath) -> None:
        raise SettingsError(NO_AUDIO_PATH)

    def compile_layers(self, model: Any) -> None:
        """Let ``answer_logits`` run compiled layers of the language model; ``generate`` leaves them as they are.

        Raises:
            RunError: Nothing can be compiled on this machine.
        """
        compile_layers(_base(model).llama_model.model, model.device)

    def answer_logits(
        self, model: Any, batch: dict[str, torch.Tensor], keep_BL: torch.Tensor, *, touched: Sequence[str] = ()
    ) -> torch.Tensor:
        """Logits at the chosen positions only.

        Args:
            model: The base or its PEFT wrapper.
            batch: As ``collate`` makes it, padded or packed, without labels and tasks.
            keep_BL: True where the next token is to be predicted.
            touched: Roles that take part even in a batch without audio, without changing the result.
        Returns:
            logits_NV.
        """
        base = _base(model)
        with _touching(base, () if "input_features" in batch else touched):
            inputs = _embedded(base, batch)
        language_model = base.llama_model.model
        if "segment_ends" in inputs:
            use_packed_attention(language_model)
            inputs["segments"] = Segments.of(inputs.pop("segment_ends"))
        hidden_BLD = language_model(use_cache=False, **inputs).last_hidden_state
        return base.llama_model.lm_head(hidden_BLD[keep_BL])

    def begin(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[CausalDecoding, torch.Tensor]:
        """Read left-padded prompts, to continue them token by token (see ``models.family.Family``)."""
        base = _base(model)

        def run(**inputs: Any) -> torch.Tensor:
            with _uncompiled(base):
                hidden_BLD = base.llama_model.model(use_cache=True, **inputs).last_hidden_state
            return linear_of_few(base.llama_model.lm_head, hidden_BLD[:, -1])

        return CausalDecoding.begin(run, _embedded(base, batch))

    def generate(
        self, model: Any, batch: dict[str, torch.Tensor], *, num_samples: Sequence[int] = (), **options: Any
    ) -> torch.Tensor:
        """Continue left-padded prompts.

        Returns:
            ids_BL of the continuations alone, padded on the right.
        """
        base = _base(model)
        with _uncompiled(base):
            return base.llama_model.generate(**_embedded(base, batch), **options)


def _embedded(base: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A batch as the language model takes it: audio and tokens as ``inputs_embeds``."""
    inputs = dict[str, Any](batch)
    ids_BL, features = inputs.pop("input_ids"), inputs.pop("input_features", None)
    return inputs | {"inputs_embeds": base.embed(ids_BL, features, num_samples=inputs.pop("num_samples", None))}


@contextmanager
def _touching(base: Any, roles: Sequence[str]) -> Iterator[None]:
    """Within it the token embeddings of a batch without audio depend on what hears, by nothing."""
    if not {"encoder", "projector"} & set(roles):
        yield
        return

    def depend(module: Any, inputs: Any, embedded_BLD: torch.Tensor) -> torch.Tensor:
        device, speech = embedded_BLD.device, base.config.speech_config
        frames, bins = speech.max_source_positions * ENCODER_STRIDE, speech.num_mel_bins
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # for the dropout of what comes after
            mel_1FT = torch.zeros(1, bins, frames, device=device)
            heard = base.audio_embeds(mel_1FT, torch.zeros(1, MIN_SAMPLES, device=device))
        # not times zero: gradients of float16, added up, overflow, and zero times infinity is no number
        never = torch.zeros((), dtype=torch.bool, device=device)
        return torch.where(never, heard.flatten()[0].to(embedded_BLD.dtype), embedded_BLD)

    hook = base.get_input_embeddings().register_forward_hook(depend)
    try:
        yield
    finally:
        hook.remove()


def _uncompiled(base: Any) -> Any:
    """Layers compiled for training would be compiled anew for one token and a cache that grows."""
    compiled = is_compiled(base.llama_model.model)
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
