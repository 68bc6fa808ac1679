"""How SALMONN hears: Whisper's encoder and BEATs side by side, and a Q-Former that reads short windows of both.

Shape letters: B clips, W windows of 30 s, N samples, F mel bins, T mel frames, M fbank bins, K frames of an encoder, D
width, P LLM positions of a clip.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from voxray.audio.fbank import HOP_SAMPLES, num_fbank_frames
from voxray.models.salmonn.beats import beats_fbank, beyond
from voxray.models.salmonn.stacked_features import MIN_SAMPLES, apart

TOWERS = ("speech_encoder", "beats")
TRAINED = ("ln_speech", "ln_audio", "speech_Qformer", "speech_query_tokens", "speech_llama_proj")
"""What SALMONN trains beside the LoRA of its language model."""


class DualEncoder:
    """What both encoders make of clips, for modules that hold them under their names."""

    speech_encoder: Any
    beats: Any

    def towers(
        self, mel_BFT: torch.Tensor, fbank_BTM: torch.Tensor, padding_BK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whisper's and BEATs' frames, of which BEATs' may be fewer.

        Args:
            fbank_BTM: Up to the longest clip's end.
            padding_BK: True for tokens of BEATs that no other may see.
        """
        speech_BKD = self.speech_encoder(mel_BFT.to(self.speech_encoder.conv1.weight.dtype)).last_hidden_state
        return speech_BKD, self.beats.encode(fbank_BTM, padding_BK)


class StoredEncoders(DualEncoder, nn.Module):
    """Both encoders by themselves, whose outputs are stored."""

    def __init__(self, speech_encoder: nn.Module, beats: nn.Module) -> None:
        super().__init__()
        self.speech_encoder, self.beats = speech_encoder, beats

    def forward(self, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """Encode windows, each by itself (see ``SalmonnConfig.alone``).

        Args:
            features_WFT: Whole windows (see ``features``).
            num_samples_W: Samples of every window that are no padding.
        Returns:
            states_WKD: a frame holds Whisper's, then BEATs', which are zero where the clip has ended.
        """
        lengths_W = num_samples_W.clamp(min=MIN_SAMPLES)
        mel_WFT, fbank_WTM = apart(features_WFT, num_samples_W, num_fbank_frames(int(lengths_W.max())))
        padding_WK = beyond(lengths_W, self.beats.num_tokens(int(lengths_W.max())), self.beats.config)
        speech_WKD, audio_WKD = self.towers(mel_WFT, fbank_WTM, padding_WK)
        audio_WKD = audio_WKD.masked_fill(padding_WK[..., None], 0)
        return torch.cat([speech_WKD, _longer(audio_WKD, speech_WKD.shape[1])], dim=-1)


class AudioPathMixin(DualEncoder):
    """From clips to positions of the language model, for modules that hold all parts under their names."""

    config: Any
    ln_speech: Any
    ln_audio: Any
    speech_query_tokens: Any
    speech_Qformer: Any
    speech_llama_proj: Any

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
        num_samples = waveform_BN.shape[1]
        self.beats.check_length(num_samples)
        if padding_mask_BN is None:
            padding_mask_BN = torch.zeros_like(waveform_BN)
        padding_mask_BN = padding_mask_BN.bool()
        padding_BK = self.beats.token_padding(padding_mask_BN)
        if self.config.alone:
            padding_BK = self._beyond((~padding_mask_BN).sum(1), padding_BK.shape[1])
        return self._query(*self.towers(mel_BFT, beats_fbank(waveform_BN), padding_BK), padding_BK)

    def window_embeds(
        self, features_WFT: torch.Tensor, num_samples_W: torch.Tensor, longest: int | None = None
    ) -> torch.Tensor:
        """The same from features as they are stored.

        Args:
            features_WFT: Whole windows (see ``features``).
            num_samples_W: Samples of every window that are no padding.
            longest: Samples that BEATs hears of each; those of the longest clip if left out.
        """
        lengths_W = num_samples_W.clamp(min=MIN_SAMPLES)
        longest = longest or int(lengths_W.max())
        mel_WFT, fbank_WTM = apart(features_WFT, num_samples_W, num_fbank_frames(longest))
        if self.config.alone:
            padding_WK = self._beyond(lengths_W, self.beats.num_tokens(longest))
        else:
            place_N = torch.arange(longest, device=lengths_W.device)
            padding_WK = self.beats.token_padding(place_N >= lengths_W[:, None])
        return self._query(*self.towers(mel_WFT, fbank_WTM, padding_WK), padding_WK)

    def stored_embeds(self, states_WKD: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        """The same from what ``StoredEncoders`` gives, if a clip's embeddings do not depend on its batch."""
        widths = self.config.speech_config.d_model, self.config.beats_config.encoder_embed_dim
        padding_WK = self._beyond(num_samples_W.clamp(min=MIN_SAMPLES), states_WKD.shape[1])
        speech_WKD, audio_WKD = states_WKD.split(widths, dim=-1)
        return self._query(speech_WKD, audio_WKD, padding_WK)

    def _beyond(self, num_samples_B: torch.Tensor, num_tokens: int) -> torch.Tensor:
        return beyond(num_samples_B, num_tokens, self.config.beats_config)

    def _query(self, speech_BKD: torch.Tensor, audio_BKD: torch.Tensor, padding_BK: torch.Tensor) -> torch.Tensor:
        """Let the Q-Former read windows of both; the frames after the last whole one are left out.

        Args:
            padding_BK: Tokens of BEATs that are no clip's.
        """
        kept = self.ln_speech.weight.dtype
        speech_BKD, audio_BKD = self.ln_speech(speech_BKD.to(kept)), self.ln_audio(audio_BKD.to(kept))
        if self.config.alone:
            audio_BKD = audio_BKD.masked_fill(padding_BK[..., None], 0)
        num_frames = max(speech_BKD.shape[1], audio_BKD.shape[1])
        frames_BKD = torch.cat([_longer(speech_BKD, num_frames), _longer(audio_BKD, num_frames)], dim=-1)
        windows = frames_BKD.unfold(1, self.config.window_frames, self.config.stride_frames)  # (B, windows, D, frames)
        num_clips, num_windows = windows.shape[:2]
        windows = windows.flatten(0, 1).transpose(1, 2)
        queries = self.speech_query_tokens.expand(len(windows), -1, -1)
        heard = self.speech_Qformer(query_embeds=queries, encoder_hidden_states=windows).last_hidden_state
        return self.speech_llama_proj(heard).reshape(num_clips, num_windows * heard.shape[1], -1)


class WindowPath(AudioPathMixin, nn.Module):
    """All of a SALMONN that hears, for compiling: its shapes depend on no clip's length, so BEATs hears whole windows.

    Args:
        model: Whose parts it shares; with ``alone`` in its configuration.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        for name in (*TOWERS, *TRAINED):
            setattr(self, name, getattr(model, name))

    def forward(self, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        return self.window_embeds(features_WFT, num_samples_W, features_WFT.shape[2] * HOP_SAMPLES)

    def get_extra_state(self) -> torch.Tensor:
        """What decides beside the weights, for their hash (see ``models.compiled``)."""
        beats, qformer = self.config.beats_config, self.config.qformer_config
        heads = (beats.encoder_attention_heads, qformer.num_attention_heads)
        return torch.tensor([self.config.window_frames, self.config.stride_frames, *heads, beats.max_distance])


def _longer(states_BKD: torch.Tensor, num_frames: int) -> torch.Tensor:
    return F.pad(states_BKD, (0, 0, 0, num_frames - states_BKD.shape[1]))
