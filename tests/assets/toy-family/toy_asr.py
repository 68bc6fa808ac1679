"""A model family and a recipe that live outside of voxray, as somebody's own package would add them.

It shares nothing with the built-in families: its own feature extractor (log energies of eight bands), configuration,
model, byte tokenizer and names of roles. ``entry_points.txt`` beside it is all that registers it.

Shape letters: B rows, L tokens, W windows, T frames of a window, F bands, P positions of a window, N predicted
positions, V vocabulary, D width.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import nn
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from voxray.config.flags import Flag
from voxray.config.recipes import Recipe
from voxray.config.train import TrainSettings
from voxray.core.tasks import TASKS
from voxray.models.family_defaults import FamilyDefaults
from voxray.models.front_end import AudioFeatures
from voxray.models.hf_files import build_on_meta, read_config, unwrap_peft
from voxray.models.interface import OutputFn, apply_layer
from voxray.models.parts.kv_cache import CausalDecodeState
from voxray.models.parts.losses import at_positions
from voxray.models.parts.packed_attention import use_training_attention
from voxray.models.parts.quantize import load_frozen
from voxray.recipes.stages import Stage

HOP, BANDS, WINDOW_FRAMES, FRAMES_PER_POSITION = 160, 8, 100, 10
POSITIONS = WINDOW_FRAMES // FRAMES_PER_POSITION
PAD, BOS, EOS, AUDIO, ASK = 256, 257, 258, 259, 260  # after the 256 bytes
VOCABULARY = 264


class ToyConfig(PreTrainedConfig):
    model_type = "toy_asr"

    def __init__(self, ears_width: int = 16, writer: dict[str, Any] | None = None, **options: Any) -> None:
        self.ears_width, self.writer = ears_width, writer or {}
        super().__init__(**{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **options})

    def get_text_config(self, *args: Any, **options: Any) -> LlamaConfig:
        return LlamaConfig(**self.writer)


class ToyModel(PreTrainedModel, GenerationMixin):
    """Ears (a Linear over ten frames), bridge (a Linear), writer (a Llama)."""

    config_class = ToyConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.ears = nn.Sequential(nn.Linear(FRAMES_PER_POSITION * BANDS, config.ears_width), nn.GELU())
        text = config.get_text_config()
        self.bridge = nn.Sequential(nn.Linear(config.ears_width, text.hidden_size))
        self.writer = LlamaForCausalLM(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.writer.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.writer.get_output_embeddings()

    def hear(self, features_WFT: torch.Tensor) -> torch.Tensor:
        """Outputs of the ears for whole windows, (W, P, D); stored outputs pass through."""
        if isinstance(self.ears, nn.Identity):
            return features_WFT
        frames_WTF = features_WFT.transpose(1, 2).to(self.dtype)
        return self.ears(frames_WTF.reshape(len(frames_WTF), POSITIONS, -1))

    def embed(self, input_ids: torch.Tensor, input_features: torch.Tensor | None) -> torch.Tensor:
        embeddings_BLD = self.get_input_embeddings()(input_ids)
        if input_features is None:
            return embeddings_BLD
        audio_WPD = self.bridge(self.hear(input_features).to(self.dtype))
        return embeddings_BLD.masked_scatter((input_ids == AUDIO)[..., None], audio_WPD.to(embeddings_BLD.dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        if inputs_embeds is None:
            assert input_ids is not None
            has_audio = input_features is not None and bool((input_ids == AUDIO).any())
            inputs_embeds = self.embed(input_ids, input_features if has_audio else None)
        return self.writer(inputs_embeds=inputs_embeds, past_key_values=past_key_values, **options)

    def prepare_inputs_for_generation(self, *args: Any, **options: Any) -> dict[str, Any]:
        return super().prepare_inputs_for_generation(*args, **options)


class ToyFrontEnd:
    """Log energies of eight bands, and bytes as tokens."""

    sample_rate_hz = 16_000
    max_audio_sec = 30.0
    max_windows: int | None = None
    max_positions = 1024
    cross_attention_positions = 0
    window_frames = WINDOW_FRAMES
    num_mel_bins = BANDS
    encoder_positions = POSITIONS
    pad_id, eos_id = PAD, EOS
    needs_language = False
    languages: frozenset[str] | None = None
    trims_audio = False
    needs_num_samples = False
    audio_id: int | None = None
    positions_per_window = 0

    def __init__(self, model_id: str) -> None:
        self.encoder_dim = int(read_config(model_id)["ears_width"])
        self.fingerprint = hashlib.sha256(b"toy-1").hexdigest()

    def features(self, samples: np.ndarray) -> AudioFeatures:
        num_windows = self.num_windows(len(samples))
        num_frames = -(-len(samples) // HOP)
        frames = np.zeros(num_frames * HOP, np.float32)
        frames[: len(samples)] = samples
        power = np.abs(np.fft.rfft(frames.reshape(num_frames, HOP), axis=1)[:, 1:]) ** 2
        energies = power.reshape(num_frames, BANDS, -1).mean(2)
        return AudioFeatures(np.log(energies + 1e-6).astype(np.float32), float(np.log(1e-6)), num_windows)

    def num_windows(self, num_samples: int) -> int:
        return -(-num_samples // (WINDOW_FRAMES * HOP))

    def prompt_ids(self, sample: Any, num_samples: int) -> list[int]:
        audio = [AUDIO] * (self.num_windows(num_samples) * POSITIONS) if sample.audio_path else []
        return [BOS, *audio, *sample.prompt.encode(), ASK]

    def prompt_language(self, prompt_ids: Sequence[int]) -> str:
        return ""

    def target_ids(self, text: str, segments: Sequence[Any] = ()) -> list[int]:
        return [*text.encode(), EOS]

    def needs_sequential_generate(self, prompt_ids: Any, num_windows: int) -> bool:
        return False

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def show(self, ids: Sequence[int]) -> str:
        names = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", AUDIO: "<audio>", ASK: "<ask>"}
        text = "".join(names.get(int(token), chr(token) if token < 128 else "?") for token in ids)
        return re.sub(r"(?:<audio>)+", lambda run: f"<audio>x{run[0].count('<audio>')}", text)


class ToyFamily(FamilyDefaults):
    name = "toy_asr"
    tasks: tuple[str, ...] = tuple(TASKS)
    roles: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {"ears": ("ears",), "bridge": ("bridge",), "writer": ("writer",)}
    )
    lora_targets: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {"ears": ("0",), "bridge": ("0",), "writer": ("q_proj", "v_proj", "down_proj")}
    )
    always_frozen: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ("writer",)
    encoder_role = "ears"
    projector_role = "bridge"

    def front_end(self, model_id: str, *, trim_audio: bool = False) -> ToyFrontEnd:
        return ToyFrontEnd(model_id)

    def load_model(self, model_id: str, *, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> Any:
        keep = ("ears", "bridge", "lm_head")
        return load_frozen(ToyModel, model_id, dtype=dtype, device=device, quantize=quantize, keep=keep)

    def build_on_meta(self, model_id: str, *, dtype: torch.dtype) -> Any:
        config = ToyConfig.from_pretrained(model_id)
        return build_on_meta(lambda: ToyModel._from_config(config, dtype=dtype), model_id)

    def encoder_fingerprint(self, model_id: str) -> str:
        return hashlib.sha256(Path(model_id, "model.safetensors").read_bytes()).hexdigest()

    def load_encoder(self, model_id: str, *, dtype: torch.dtype, device: torch.device) -> Any:
        return self.load_model(model_id, dtype=dtype, device=device)

    def encode(self, encoder: Any, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        return encoder.hear(features_WFT)

    def skip_encoder(self, model: Any) -> None:
        unwrap_peft(model).ears = nn.Identity()

    def audio_path(self, model: Any) -> nn.Module:
        raise NotImplementedError("the toy has nothing to compile")

    def use_audio_path(self, model: Any, run: Any) -> None:
        raise NotImplementedError("the toy has nothing to compile")

    def compile_layers(self, model: Any) -> None:
        raise NotImplementedError("the toy has nothing to compile")

    def answer_logits(
        self,
        model: Any,
        batch: dict[str, torch.Tensor],
        positions_N: torch.Tensor,
        output: OutputFn = apply_layer,
        *,
        roles_in_every_pass: Any = (),
    ) -> torch.Tensor:
        base, inputs = unwrap_peft(model), dict[str, Any](batch)
        embeddings_BLD = base.embed(inputs.pop("input_ids"), inputs.pop("input_features", None))
        inputs = use_training_attention(base.writer.model, inputs, positions_N.device)
        hidden_BLD = base.writer.model(inputs_embeds=embeddings_BLD, use_cache=False, **inputs).last_hidden_state
        return output(base.writer.lm_head, at_positions(hidden_BLD, positions_N))

    def prefill(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[CausalDecodeState, torch.Tensor]:
        base = unwrap_peft(model)

        def forward(**inputs: Any) -> torch.Tensor:
            if "input_ids" in inputs:
                inputs["inputs_embeds"] = base.embed(inputs.pop("input_ids"), inputs.pop("input_features", None))
            hidden_BLD = base.writer.model(use_cache=True, **inputs).last_hidden_state
            return base.writer.lm_head(hidden_BLD[:, -1])

        return CausalDecodeState.prefill(forward, batch)

    def generate(self, model: Any, batch: dict[str, torch.Tensor], *, num_samples: Any = (), **options: Any) -> Any:
        base = unwrap_peft(model)
        embeddings_BLD = base.embed(batch["input_ids"], batch.get("input_features"))
        return base.writer.generate(inputs_embeds=embeddings_BLD, attention_mask=batch["attention_mask"], **options)


class ToySettings(TrainSettings):
    """Settings of the toy's own training script."""

    model_id: Annotated[str, Flag(path="model"), Field(min_length=1)]
    """Base model: a folder."""


def toy_stage(settings: ToySettings) -> Stage:
    return Stage(roles=("bridge", "writer"))


# A package of its own would bring the script train_toy.py, which preflight starts by this name.
RECIPE = Recipe("toy", "toy_asr:ToySettings", "toy_asr:toy_stage", "train_toy", family="toy_asr")


def write_base(folder: Path) -> str:
    """Write a base with random weights; returns its folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": False}
    writer = {**sizes, **tokens, **more}
    ToyModel(ToyConfig(writer=writer)).save_pretrained(folder)
    return str(folder)
