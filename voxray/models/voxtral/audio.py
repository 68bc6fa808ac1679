"""Voxtral's encoder and projector.

Shape letters: N audio positions of a batch, D width, W windows, P encoder positions of a window, T mel frames of a
window, F mel bins.
"""

from functools import partial
from typing import Any

import torch

from voxray.models.parts.audio_encoder import PassThrough
from voxray.models.parts.logmel_windows import ENCODER_STRIDE


class EncoderAndProjector(torch.nn.Module):
    """Encoder, then projector, for compiling: mel_WFT -> states_ND.

    Args:
        audio_config: The encoder's configuration. The projector reads ``intermediate_size`` values at a time.
    """

    def __init__(self, encoder: torch.nn.Module, projector: torch.nn.Module, audio_config: Any) -> None:
        super().__init__()
        self.encoder, self.projector, self.width = encoder, projector, audio_config.intermediate_size

    def forward(self, mel_WFT: torch.Tensor) -> torch.Tensor:
        states_WPD = self.encoder(mel_WFT, return_dict=True).last_hidden_state
        return self.projector(states_WPD.reshape(-1, self.width))


def silent_audio_features(base: Any, with_encoder: bool, device: torch.device) -> torch.Tensor:
    """Projector outputs for inputs of zeros, of the encoder if ``with_encoder``, else of the projector."""
    audio, model = base.config.audio_config, base.model
    zeros, frames = partial(torch.zeros, dtype=base.dtype, device=device), audio.max_source_positions
    if not with_encoder:
        return model.multi_modal_projector(zeros(1, audio.intermediate_size))
    if isinstance(model.audio_tower, PassThrough):
        return model.get_audio_features(zeros(1, frames, audio.hidden_size)).pooler_output
    return model.get_audio_features(zeros(1, audio.num_mel_bins, frames * ENCODER_STRIDE)).pooler_output
