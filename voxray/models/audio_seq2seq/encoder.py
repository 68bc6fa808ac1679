"""The audio encoder of an encoder-decoder, on clips of their own length.

Shape letters: W windows, one for each clip, T mel frames of a window, F mel bins, P encoder positions, D width.
"""

from typing import Any

import torch

from voxray.models.audio_seq2seq.facts import HOP_SAMPLES, Seq2SeqFacts
from voxray.models.parts.audio_encoder import first_columns

DROPOUTS = ("dropout", "dropout_positions", "activation_dropout", "attention_dropout", "layerdrop")


def encode_windows(
    encoder: Any, facts: Seq2SeqFacts, features_WFT: torch.Tensor, num_samples_W: torch.Tensor
) -> torch.Tensor:
    """Run the encoder on windows, up to the end of the longest clip among them.

    Args:
        num_samples_W: Unpadded samples of every window, on the CPU.
    Returns:
        states_WPD. Positions after the end of a clip are 0.
    """
    num_samples = num_samples_W.tolist()
    if facts.is_waveform:
        samples = features_WFT.transpose(1, 2).flatten(1).to(encoder.dtype)
        clips = [clip[None, :length] for clip, length in zip(samples, num_samples, strict=True)]
        states = [encoder(clip).last_hidden_state[0] for clip in clips]
        return torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    num_samples_W = num_samples_W.to(features_WFT.device, non_blocking=True)
    frames_W, positions_W = num_samples_W // HOP_SAMPLES, facts.positions(num_samples_W, encoder.config)
    longest = max(num_samples) // HOP_SAMPLES
    mel_WTF = features_WFT[:, :, :longest].transpose(1, 2).to(encoder.dtype)
    states_WPD = encoder(mel_WTF, attention_mask=first_columns(frames_W, longest)).last_hidden_state
    is_padding_WP = ~first_columns(positions_W, states_WPD.shape[1])
    return states_WPD.masked_fill(is_padding_WP[..., None], 0)  # not by a product, because padding may hold NaN


class FrozenBatchNorm(torch.nn.BatchNorm1d):
    """Normalizes with the stored mean and variance in training too, so that the rows of a batch stay independent."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


def fix_training_mode(model: Any) -> None:
    """Make a base compute the same in training as in evaluation: stored statistics, and no dropout of its own.

    Stored encoder outputs then equal those of the encoder in the model. LoRA has a dropout of its own.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.__class__ = FrozenBatchNorm
        for name in DROPOUTS:
            if isinstance(getattr(module, name, None), float | int):
                setattr(module, name, 0.0)
