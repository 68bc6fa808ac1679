"""SALMONN: Whisper's encoder and BEATs side by side -> a Q-Former over short windows -> a language model.

Modules and weights have the names of the official checkpoints, apart from the Q-Former's inside, which is BLIP-2's of
transformers (``checkpoint.official_name`` translates).

Shape letters: B clips or rows, N samples, F mel bins, T mel frames, M fbank bins, K frames of an encoder, D width,
P LLM positions of a clip, L tokens.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Blip2QFormerModel, PreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from voxray.models.salmonn.beats import Beats, beats_fbank
from voxray.models.salmonn.config import SalmonnConfig
from voxray.models.salmonn.features import apart

TRAINED = ("ln_speech", "ln_audio", "speech_Qformer", "speech_query_tokens", "speech_llama_proj")
"""What SALMONN trains beside the LoRA of its language model."""


class SalmonnForConditionalGeneration(PreTrainedModel):
    """The whole model.

    Args:
        speech_encoder: Whisper's encoder with its weights; a random one is built from the configuration if left out.
        llama_model: The language model, likewise.
    """

    config: SalmonnConfig
    config_class = SalmonnConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    trained_whole = TRAINED
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = list(TRAINED)  # noqa: RUF012  # the library's own way

    def __init__(
        self, config: SalmonnConfig, speech_encoder: nn.Module | None = None, llama_model: nn.Module | None = None
    ) -> None:
        super().__init__(config)
        speech, beats, qformer, text = _parts(config)
        for given in filter(None, (speech_encoder, llama_model)):
            for module in given.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]  # the library draws no new weights then
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
        """Switch to training; a tower of which nothing trains stays in eval mode."""
        super().train(mode)
        for tower in (self.speech_encoder, self.beats):
            tower.train(mode and any(weight.requires_grad for weight in tower.parameters()))
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.llama_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.llama_model.get_output_embeddings()

    def audio_embeds(
        self, mel_BFT: torch.Tensor, waveform_BN: torch.Tensor, padding_mask_BN: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the language model gets of clips.

        Args:
            mel_BFT: Whisper's log-mel, padded to whole windows.
            waveform_BN: The same clips' samples at 16 kHz, padded with zeros to the longest.
            padding_mask_BN: True where a clip is padded.
        Returns:
            embeds_BPD, the same number of positions for every clip.
        Raises:
            ValueError: The samples are too few for BEATs.
        """
        self.beats.check_length(waveform_BN.shape[1])
        if padding_mask_BN is None:
            padding_mask_BN = torch.zeros_like(waveform_BN, dtype=torch.bool)
        return self._embed_fbank(mel_BFT, beats_fbank(waveform_BN), padding_mask_BN)

    def fbank_embeds(self, mel_BFT: torch.Tensor, fbank_BTM: torch.Tensor, num_samples_B: torch.Tensor) -> torch.Tensor:
        """The same from BEATs' own features, as they are stored.

        Args:
            fbank_BTM: Of the longest clip's length; shorter ones are filled up with the features of silence.
            num_samples_B: Length of every clip.
        """
        place_N = torch.arange(int(num_samples_B.max()), device=num_samples_B.device)
        return self._embed_fbank(mel_BFT, fbank_BTM, place_N >= num_samples_B[:, None])

    def _embed_fbank(
        self, mel_BFT: torch.Tensor, fbank_BTM: torch.Tensor, padding_mask_BN: torch.Tensor
    ) -> torch.Tensor:
        encoder, kept = self.speech_encoder, self.ln_speech.weight.dtype
        speech_BKD = encoder(mel_BFT.to(encoder.conv1.weight.dtype)).last_hidden_state
        padding_BK = self._token_padding(padding_mask_BN)
        audio_BKD = self.beats.encode(fbank_BTM, padding_BK)
        speech_BKD, audio_BKD = self.ln_speech(speech_BKD.to(kept)), self.ln_audio(audio_BKD.to(kept))
        if self.config.alone:
            audio_BKD = audio_BKD.masked_fill(padding_BK[..., None], 0)
        missing = speech_BKD.shape[1] - audio_BKD.shape[1]
        speech_BKD, audio_BKD = (
            F.pad(x, (0, 0, 0, max(0, n))) for x, n in ((speech_BKD, -missing), (audio_BKD, missing))
        )
        return self._query(torch.cat([speech_BKD, audio_BKD], dim=-1))

    def _token_padding(self, padding_mask_BN: torch.Tensor) -> torch.Tensor:
        """BEATs tokens that are no clip's, shape (B, K)."""
        padding_BK = self.beats.token_padding(padding_mask_BN)
        if not self.config.alone:
            return padding_BK
        lengths = (~padding_mask_BN).sum(1).tolist()
        own_B = torch.tensor([self.beats.num_tokens(length) for length in lengths], device=padding_mask_BN.device)
        return torch.arange(padding_BK.shape[1], device=padding_mask_BN.device) >= own_B[:, None]

    def _query(self, frames_BKD: torch.Tensor) -> torch.Tensor:
        """Let the Q-Former read windows of frames; the frames after the last whole window are left out."""
        windows = frames_BKD.unfold(1, self.config.window_frames, self.config.stride_frames)  # (B, windows, D, frames)
        num_clips, num_windows = windows.shape[:2]
        windows = windows.flatten(0, 1).transpose(1, 2)
        queries = self.speech_query_tokens.expand(len(windows), -1, -1)
        heard = self.speech_Qformer(query_embeds=queries, encoder_hidden_states=windows).last_hidden_state
        return self.speech_llama_proj(heard).reshape(num_clips, num_windows * heard.shape[1], -1)

    def embed(
        self,
        input_ids: torch.Tensor,
        input_features: torch.Tensor | None = None,
        waveform: torch.Tensor | None = None,
        waveform_mask: torch.Tensor | None = None,
        num_samples: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Inputs of the language model, with audio in the place of its placeholders.

        Args:
            input_ids: (B, L); ``audio_token_id`` stands for one position of audio.
            input_features: (W, F, T) Whisper's log-mel of all windows, in the order of their placeholders.
            waveform: (W, N) their samples; with ``waveform_mask``, which is True for samples that are no padding.
            num_samples: (W,) samples of every window, if there is no ``waveform``: then BEATs' features stand below the
                log-mel in ``input_features`` (see ``features``).
        Returns:
            embeds_BLD.
        Raises:
            ValueError: There are more or fewer placeholders than the clips have positions.
        """
        is_audio_BL = input_ids == self.config.audio_token_id
        embeds_BLD = self.get_input_embeddings()(input_ids.masked_fill(is_audio_BL, 0))
        num_clips = 0 if input_features is None else len(input_features)
        found, wanted = int(is_audio_BL.sum()), num_clips * self.config.positions_per_clip
        if found != wanted:
            raise ValueError(f"{found} audio tokens for {num_clips} clips, which have {wanted} positions")
        if input_features is None:
            return embeds_BLD
        if waveform is None:
            assert num_samples is not None, "neither samples nor their numbers"
            audio_WPD = self.fbank_embeds(*apart(input_features, num_samples))
        else:
            padding = None if waveform_mask is None else ~waveform_mask.bool()
            audio_WPD = self.audio_embeds(input_features, waveform, padding)
        return embeds_BLD.masked_scatter(is_audio_BL[..., None], audio_WPD.to(embeds_BLD.dtype))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        waveform: torch.Tensor | None = None,
        waveform_mask: torch.Tensor | None = None,
        num_samples: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Predict the next token everywhere.

        Args:
            labels: (B, L), -100 where no prediction counts; the loss is the mean over the others of the batch.
            options: For the language model; what else, see ``embed``.
        Returns:
            The language model's output: ``logits`` (B, L, V), and ``loss`` if there are labels.
        """
        embeds_BLD = self.embed(input_ids, input_features, waveform, waveform_mask, num_samples)
        return self.llama_model(inputs_embeds=embeds_BLD, attention_mask=attention_mask, labels=labels, **options)

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        waveform: torch.Tensor | None = None,
        waveform_mask: torch.Tensor | None = None,
        num_samples: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Continue prompts, padded on the left, by transformers' own generate.

        Args:
            options: Of that; what else, see ``embed``.
        Returns:
            ids_BL of the continuations alone, padded on the right.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embeds_BLD = self.embed(input_ids, input_features, waveform, waveform_mask, num_samples)
        return self.llama_model.generate(inputs_embeds=embeds_BLD, attention_mask=attention_mask, **options)


def _parts(config: SalmonnConfig) -> tuple[Any, Any, Any, Any]:
    return config.speech_config, config.beats_config, config.qformer_config, config.text_config
