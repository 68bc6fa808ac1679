"""SALMONN's audio path: Whisper's encoder and BEATs side by side, and a Q-Former over short windows of both.

Shape letters: B clips, W windows of 30 s, N samples, F mel bins, T mel frames, M filter bank bins, K frames of an
encoder, D width, P LLM positions of a clip.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from voxray.audio.fbank import HOP_SAMPLES, num_fbank_frames
from voxray.models.salmonn.beats import beats_fbank, past_end_mask
from voxray.models.salmonn.stacked_features import MIN_SAMPLES, split_features

ENCODERS = ("speech_encoder", "beats")
TRAINED_MODULES = ("ln_speech", "ln_audio", "speech_Qformer", "speech_query_tokens", "speech_llama_proj")
"""What SALMONN trains beside the LoRA of its language model."""


class DualEncoder:
    """Both encoders' outputs, for modules that hold the encoders under these names."""

    speech_encoder: Any
    beats: Any

    def encoder_states(
        self, mel_BFT: torch.Tensor, fbank_BTM: torch.Tensor, padding_BK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run both encoders; BEATs may have fewer frames than Whisper's encoder.

        Args:
            fbank_BTM: Frames up to the end of the longest clip.
            padding_BK: True for tokens of BEATs that no other token may attend to.
        Returns:
            speech_BKD and audio_BKD, whose K and D differ.
        """
        speech_BKD = self.speech_encoder(mel_BFT.to(self.speech_encoder.conv1.weight.dtype)).last_hidden_state
        return speech_BKD, self.beats.encode(fbank_BTM, padding_BK)


class StoredEncoders(DualEncoder, nn.Module):
    """Both encoders without the rest of the model, for ``--store encoder``."""

    def __init__(self, speech_encoder: nn.Module, beats: nn.Module) -> None:
        super().__init__()
        self.speech_encoder, self.beats = speech_encoder, beats

    def forward(self, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Encode windows independently of each other (see ``SalmonnConfig.alone``).

        Args:
            features_WFT: Whole windows (see ``stacked_features``).
            num_samples_W: Unpadded samples of every window.
        Returns:
            states_WKD. Each frame holds Whisper's values, then BEATs', which are zero after the end of the clip.
        """
        lengths_W = num_samples_W.clamp(min=MIN_SAMPLES)
        longest = int(lengths_W.max())
        mel_WFT, fbank_WTM = split_features(features_WFT, num_samples_W, num_fbank_frames(longest))
        padding_WK = past_end_mask(lengths_W, self.beats.num_tokens(longest), self.beats.config)
        speech_WKD, audio_WKD = self.encoder_states(mel_WFT, fbank_WTM, padding_WK)
        audio_WKD = audio_WKD.masked_fill(padding_WK[..., None], 0)
        return torch.cat([speech_WKD, _pad_frames(audio_WKD, speech_WKD.shape[1])], dim=-1)


class AudioPathMixin(DualEncoder):
    """From clips to LLM positions, for modules that hold all parts under these names."""

    config: Any
    ln_speech: Any
    ln_audio: Any
    speech_query_tokens: Any
    speech_Qformer: Any
    speech_llama_proj: Any

    def audio_embeds(
        self, mel_BFT: torch.Tensor, waveform_BN: torch.Tensor, padding_mask_BN: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings of clips for the language model.

        Args:
            mel_BFT: Whisper's log-mel, padded to whole windows.
            waveform_BN: Samples of the same clips at 16 kHz, padded with zeros to the longest.
            padding_mask_BN: True where a clip is padded.
        Returns:
            embeds_BPD, the same number of positions for every clip.
        Raises:
            ValueError: The samples are too few for BEATs.
        """
        num_samples = waveform_BN.shape[1]
        self.beats.check_length(num_samples)
        if padding_mask_BN is None:
            padding_mask_BN = torch.zeros_like(waveform_BN)
        padding_mask_BN = padding_mask_BN.bool()
        padding_BK = self.beats.token_padding(padding_mask_BN)
        if self.config.alone:
            padding_BK = self._past_end((~padding_mask_BN).sum(1), padding_BK.shape[1])
        return self._query(*self.encoder_states(mel_BFT, beats_fbank(waveform_BN), padding_BK), padding_BK)

    def window_embeds(
        self, features_WFT: torch.Tensor, num_samples_W: torch.Tensor, beats_samples: int | None = None
    ) -> torch.Tensor:
        """Embeddings embeds_WPD, from features as they are stored.

        Args:
            features_WFT: Whole windows (see ``stacked_features``).
            num_samples_W: Unpadded samples of every window; on the CPU if ``beats_samples`` is None.
            beats_samples: Samples of each window that BEATs gets; those of the longest clip if None.
        """
        beats_samples = beats_samples or max(MIN_SAMPLES, *num_samples_W.tolist())
        num_samples_W = num_samples_W.to(features_WFT.device, non_blocking=True)
        lengths_W = num_samples_W.clamp(min=MIN_SAMPLES)
        mel_WFT, fbank_WTM = split_features(features_WFT, num_samples_W, num_fbank_frames(beats_samples))
        if self.config.alone:
            padding_WK = self._past_end(lengths_W, self.beats.num_tokens(beats_samples))
        else:
            index_N = torch.arange(beats_samples, device=lengths_W.device)
            padding_WK = self.beats.token_padding(index_N >= lengths_W[:, None])
        return self._query(*self.encoder_states(mel_WFT, fbank_WTM, padding_WK), padding_WK)

    def stored_embeds(self, states_WKD: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Embeddings embeds_WPD, from outputs of ``StoredEncoders``; only for models with ``SalmonnConfig.alone``."""
        widths = self.config.speech_config.d_model, self.config.beats_config.encoder_embed_dim
        num_samples_W = num_samples_W.to(states_WKD.device, non_blocking=True)
        padding_WK = self._past_end(num_samples_W.clamp(min=MIN_SAMPLES), states_WKD.shape[1])
        speech_WKD, audio_WKD = states_WKD.split(widths, dim=-1)
        return self._query(speech_WKD, audio_WKD, padding_WK)

    def _past_end(self, num_samples_B: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return past_end_mask(num_samples_B, num_tokens, self.config.beats_config)

    def _query(self, speech_BKD: torch.Tensor, audio_BKD: torch.Tensor, padding_BK: torch.Tensor) -> torch.Tensor:
        """Run the Q-Former over windows of both encoders' frames. Frames after the last whole window are dropped.

        Args:
            padding_BK: Tokens of BEATs that belong to no clip.
        Returns:
            embeds_BPD.
        """
        dtype = self.ln_speech.weight.dtype
        speech_BKD, audio_BKD = self.ln_speech(speech_BKD.to(dtype)), self.ln_audio(audio_BKD.to(dtype))
        if self.config.alone:
            audio_BKD = audio_BKD.masked_fill(padding_BK[..., None], 0)
        num_frames = max(speech_BKD.shape[1], audio_BKD.shape[1])
        frames_BKD = torch.cat([_pad_frames(speech_BKD, num_frames), _pad_frames(audio_BKD, num_frames)], dim=-1)
        windows = frames_BKD.unfold(1, self.config.window_frames, self.config.stride_frames)  # (B, windows, D, frames)
        num_clips, num_windows = windows.shape[:2]
        windows = windows.flatten(0, 1).transpose(1, 2)
        queries = self.speech_query_tokens.expand(len(windows), -1, -1)
        outputs = self.speech_Qformer(query_embeds=queries, encoder_hidden_states=windows).last_hidden_state
        return self.speech_llama_proj(outputs).reshape(num_clips, num_windows * outputs.shape[1], -1)


class WindowPath(AudioPathMixin, nn.Module):
    """The whole audio path, for compiling. Its shapes depend on no clip's length: BEATs gets whole windows.

    Args:
        model: The model whose modules it shares, with ``alone`` in its configuration.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        for name in (*ENCODERS, *TRAINED_MODULES):
            setattr(self, name, getattr(model, name))

    def forward(self, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        return self.window_embeds(features_WFT, num_samples_W, features_WFT.shape[2] * HOP_SAMPLES)

    def get_extra_state(self) -> torch.Tensor:
        """Values beside the weights that the results depend on, for ``compiled_audio.weights_hash``."""
        beats, qformer = self.config.beats_config, self.config.qformer_config
        heads = (beats.encoder_attention_heads, qformer.num_attention_heads)
        return torch.tensor([self.config.window_frames, self.config.stride_frames, *heads, beats.max_distance])


def _pad_frames(states_BKD: torch.Tensor, num_frames: int) -> torch.Tensor:
    return F.pad(states_BKD, (0, 0, 0, num_frames - states_BKD.shape[1]))
