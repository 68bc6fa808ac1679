"""SALMONN: Whisper's encoder and BEATs side by side -> a Q-Former over short windows -> a language model.

Modules and weights have the names of the official checkpoints, except inside the Q-Former, which is transformers'
BLIP-2 Q-Former (``compat.checkpoint.official_name`` translates).

Shape letters: B rows, L tokens, W windows, N samples, F mel bins, T mel frames, P LLM positions of a clip, D width, V
vocabulary.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Blip2QFormerModel, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from voxray.models.parts.placeholders import put_audio
from voxray.models.salmonn.audio_path import TRAINED_MODULES, AudioPathMixin
from voxray.models.salmonn.beats import Beats
from voxray.models.salmonn.config import SalmonnConfig

AUDIO = ("input_features", "waveform", "waveform_mask", "num_samples", "audio_positions")
"""Inputs of ``embed`` beside token ids."""


class SalmonnForConditionalGeneration(AudioPathMixin, PreTrainedModel):
    """The whole model.

    Args:
        speech_encoder: Whisper's encoder with its weights; if None, one with random weights is built.
        llama_model: The language model with its weights; if None, one with random weights is built.
    """

    config: SalmonnConfig
    config_class = SalmonnConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    full_modules = TRAINED_MODULES
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = list(TRAINED_MODULES)  # noqa: RUF012  # PreTrainedModel expects a list

    def __init__(
        self, config: SalmonnConfig, speech_encoder: nn.Module | None = None, llama_model: nn.Module | None = None
    ) -> None:
        super().__init__(config)
        speech, beats, qformer, text = _parts(config)
        for part in filter(None, (speech_encoder, llama_model)):
            for module in part.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # post_init keeps its weights
        self.speech_encoder: Any = speech_encoder or WhisperEncoder(speech)
        self.beats = Beats(beats)
        self.ln_speech = nn.LayerNorm(speech.d_model)
        self.ln_audio = nn.LayerNorm(beats.encoder_embed_dim)
        self.speech_query_tokens = nn.Parameter(torch.zeros(1, config.num_query, qformer.hidden_size))
        self.speech_Qformer = Blip2QFormerModel(qformer)
        self.speech_llama_proj = nn.Linear(qformer.hidden_size, text.hidden_size)
        self.llama_model: Any = llama_model or AutoModelForCausalLM.from_config(text)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SalmonnForConditionalGeneration):
            from transformers import initialization

            initialization.normal_(self.speech_query_tokens, std=_parts(self.config)[2].initializer_range)

    def train(self, mode: bool = True) -> "SalmonnForConditionalGeneration":
        """Switch to training mode; an encoder in which nothing trains stays in eval mode."""
        super().train(mode)
        for encoder in (self.speech_encoder, self.beats):
            encoder.train(mode and any(weight.requires_grad for weight in encoder.parameters()))
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.llama_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llama_model.get_output_embeddings()

    def embed(
        self,
        input_ids: torch.Tensor,
        input_features: torch.Tensor | None = None,
        waveform: torch.Tensor | None = None,
        waveform_mask: torch.Tensor | None = None,
        num_samples: torch.Tensor | None = None,
        audio_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings in which audio embeddings replace the placeholders.

        Args:
            input_ids: (B, L); ``audio_token_id`` is the placeholder of one position of audio.
            input_features: (W, F, T) Whisper's log-mel of all windows, in the order of their placeholders.
            waveform: (W, N) samples of the windows.
            waveform_mask: (W, N) True for samples that are not padding.
            num_samples: (W,) unpadded samples of every window; required without ``waveform``. Then
                ``input_features`` are stored features, with BEATs' after the log-mel (see ``stacked_features``).
            audio_positions: Positions of the placeholders, counted through all rows; looked for if None.
        Returns:
            embeds_BLD.
        Raises:
            ValueError: The number of placeholders is not the number of the clips' positions.
        """
        is_audio_BL = input_ids == self.config.audio_token_id
        embeds_BLD = self.get_input_embeddings()(input_ids.masked_fill(is_audio_BL, 0))
        if audio_positions is None:
            audio_positions = is_audio_BL.flatten().nonzero()[:, 0]
        num_clips = 0 if input_features is None else len(input_features)
        num_tokens, num_positions = len(audio_positions), num_clips * self.config.positions_per_clip
        if num_tokens != num_positions:
            raise ValueError(f"{num_tokens} audio tokens for {num_clips} clips, which have {num_positions} positions")
        if input_features is None:
            return embeds_BLD
        if waveform is None:
            assert num_samples is not None, "without waveform, num_samples is required"
            audio_WPD = self.window_embeds(input_features, num_samples)
        else:
            padding = None if waveform_mask is None else ~waveform_mask.bool()
            audio_WPD = self.audio_embeds(input_features, waveform, padding)
        return put_audio(embeds_BLD, audio_WPD, {"audio_positions": audio_positions})

    def llm_inputs(self, input_ids: torch.Tensor, **inputs: Any) -> dict[str, Any]:
        """Inputs of the language model for a batch: the result of ``embed`` in place of ids and audio."""
        audio = {name: inputs.pop(name) for name in AUDIO if name in inputs}
        return {"inputs_embeds": self.embed(input_ids, **audio), **inputs}

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        """Predict the next token at every position.

        Args:
            input_ids: (B, L).
            inputs: Audio as for ``embed``, and inputs of the language model such as ``attention_mask`` and ``labels``
                (B, L), with -100 at positions that the loss ignores.
        Returns:
            The language model's output: ``logits`` (B, L, V), and with labels ``loss``, their mean.
        """
        return self.llama_model(**self.llm_inputs(input_ids, **inputs))

    def generate(self, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Generate answers to left-padded prompts with transformers' ``generate``.

        Args:
            input_ids: (B, L).
            inputs: Audio as for ``embed``, ``attention_mask``, and arguments of ``generate``.
        Returns:
            ids_BL of the new tokens, padded on the right.
        """
        return self.llama_model.generate(**self.llm_inputs(input_ids, **inputs))


def _parts(config: SalmonnConfig) -> tuple[Any, Any, Any, Any]:
    return config.speech_config, config.beats_config, config.qformer_config, config.text_config
