"""How audio enters the language model: encoder, projector, and the embeddings at the placeholder tokens.

Shape letters: B rows, L tokens, W windows, T mel frames of a window, F mel bins, P positions of a window, D width.
"""

from typing import Any

import torch

from voxray.audio.logmel import HOP_SAMPLES
from voxray.models.audio_lm.facts import Facts
from voxray.models.interface import Batch
from voxray.models.parts.audio_encoder import PassThrough, first_columns

COMPILED = "voxray_audio_path"
"""Attribute of a base with the function that replaces its encoder and projector."""


def valid_frames(num_samples_W: torch.Tensor) -> torch.Tensor:
    """Valid mel frames of every window."""
    return (num_samples_W + HOP_SAMPLES - 1) // HOP_SAMPLES


def run_encoder(encoder: Any, facts: Facts, mel_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
    """Run an encoder on windows of which only the valid frames count.

    Returns:
        states_WPD. What an encoder leaves out as padding is 0.
    """
    frames_W, options = valid_frames(num_samples_W), {}
    if facts.mask == "frames":
        options["input_features_mask"] = first_columns(frames_W, mel_WFT.shape[-1]).long()
    elif facts.mask == "attention":
        options["attention_mask"] = _attention_mask(encoder, mel_WFT, frames_W)
    states = encoder(mel_WFT.to(encoder.dtype), return_dict=True, **options).last_hidden_state
    if states.ndim == 3:
        return states
    # The encoder put the valid positions of all windows one after the other.
    positions_W = facts.positions(frames_W, encoder.config)
    full = int(facts.positions(mel_WFT.shape[-1], encoder.config))
    zeros = states.new_zeros(len(mel_WFT), full, states.shape[-1])
    return zeros.masked_scatter(first_columns(positions_W, full)[..., None], states)


def _attention_mask(encoder: Any, mel_WFT: torch.Tensor, frames_W: torch.Tensor) -> Any:
    """Mask of attention over the outputs of the encoder's convolutions, of which the second has stride 2."""
    from transformers.masking_utils import create_bidirectional_mask

    num_windows, length = len(mel_WFT), mel_WFT.shape[-1] // 2
    embeds = torch.zeros(num_windows, length, 1, dtype=encoder.dtype, device=mel_WFT.device)
    is_valid_WP = first_columns((frames_W - 1) // 2 + 1, length).long()
    return create_bidirectional_mask(config=encoder.config, inputs_embeds=embeds, attention_mask=is_valid_WP)


class AudioModules(torch.nn.Module):
    """Encoder, then projector: (mel_WFT, num_samples_W) -> embeds_WPD. An encoder that was skipped passes its input."""

    def __init__(self, base: Any, facts: Facts) -> None:
        super().__init__()
        self.encoder, self.projector = base.model.audio_tower, base.model.multi_modal_projector
        self.facts = facts

    def forward(self, mel_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        return self.project(self.encode(mel_WFT, num_samples_W))

    def encode(self, features_WFT: torch.Tensor, num_samples_W: torch.Tensor) -> torch.Tensor:
        if isinstance(self.encoder, PassThrough):
            return features_WFT.to(self.encoder.dtype)
        return run_encoder(self.encoder, self.facts, features_WFT, num_samples_W)

    def project(self, states_WPD: torch.Tensor) -> torch.Tensor:
        num_windows, num_states, width = states_WPD.shape
        merged = self.facts.merged
        return self.projector(states_WPD.reshape(num_windows, num_states // merged, merged * width))


def audio_embeds(base: Any, facts: Facts, batch: Batch) -> torch.Tensor:
    """embeds_WPD for all positions of the windows of a batch."""
    features = batch["input_features"]
    num_samples_W = batch["num_samples"].to(features.device, non_blocking=True)
    path = AudioModules(base, facts)
    if not facts.timed:
        return getattr(base, COMPILED, path)(features, num_samples_W)
    positions_W = facts.positions(valid_frames(num_samples_W), base.config.audio_config)
    states_WPD = path.encode(features, num_samples_W)
    return path.project(_rotate_by_time(base.model, states_WPD, batch["input_ids"], positions_W))


def _rotate_by_time(
    model: Any, states_WPD: torch.Tensor, ids_BL: torch.Tensor, positions_W: torch.Tensor
) -> torch.Tensor:
    """Rotate the encoder's outputs by their time in their clip, which the library finds by the placeholder tokens."""
    from transformers.models.musicflamingo.modeling_musicflamingo import apply_rotary_time_emb

    length = states_WPD.shape[1]
    seconds_WP = model._build_audio_timestamps(ids_BL, positions_W, length)
    return apply_rotary_time_emb(states_WPD, *model.pos_emb(seconds_WP.to(states_WPD.device), seq_len=length))


def silent_audio(base: Any, facts: Facts, with_encoder: bool, device: torch.device) -> torch.Tensor:
    """Embeddings for a window of zeros, of the encoder if ``with_encoder``, else of the projector."""
    audio = base.config.audio_config
    path, frames = AudioModules(base, facts), facts.window_frames(audio)
    is_mel = with_encoder and not isinstance(path.encoder, PassThrough)
    if is_mel:
        mel_WFT = torch.zeros(1, audio.num_mel_bins, frames, dtype=base.dtype, device=device)
        return path(mel_WFT, torch.full((1,), frames * HOP_SAMPLES, device=device))
    return path.project(torch.zeros(1, facts.merged, audio.hidden_size, dtype=base.dtype, device=device))
