"""How audio enters Voxtral's language model: trimmed, stored already encoded, or not at all in a batch.

Shape letters: B rows, L tokens, N audio positions, D width, W windows, P encoder frames of a window, T mel frames of a
window, F mel bins.
"""

from functools import partial
from typing import Any

import torch

from voxray.models.interface import AudioPath
from voxray.models.parts.audio_encoder import PassThrough
from voxray.models.parts.logmel_windows import ENCODER_STRIDE


class Projected(torch.nn.Module):
    """Encoder and projector in a row, for compiling: mel_WFT -> states_ND.

    Args:
        audio: The encoder's configuration; its ``intermediate_size`` is what the projector takes at a time.
    """

    def __init__(self, encoder: torch.nn.Module, projector: torch.nn.Module, audio: Any) -> None:
        super().__init__()
        self.encoder, self.projector, self.width = encoder, projector, audio.intermediate_size

    def forward(self, mel_WFT: torch.Tensor) -> torch.Tensor:
        states_WPD = self.encoder(mel_WFT, return_dict=True).last_hidden_state
        return self.projector(states_WPD.reshape(-1, self.width))


def replace_audio_encoder(model: Any, run: AudioPath) -> None:
    """Let the language model's audio positions come from elsewhere, and free the memory of the encoder's layers.

    Args:
        model: A ``VoxtralModel``.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def get_audio_features(input_features: torch.Tensor, **options: Any) -> Any:
        return BaseModelOutputWithPooling(pooler_output=run(input_features))  # type: ignore[arg-type]

    model.get_audio_features = get_audio_features
    model.audio_tower.layers = torch.nn.ModuleList()


def silence(base: Any, with_encoder: bool, device: torch.device) -> torch.Tensor:
    """What the projector, and the encoder before it, make of nothing."""
    audio, model = base.config.audio_config, base.model
    zeros, frames = partial(torch.zeros, dtype=base.dtype, device=device), audio.max_source_positions
    if not with_encoder:
        return model.multi_modal_projector(zeros(1, audio.intermediate_size))
    if isinstance(model.audio_tower, PassThrough):
        return model.get_audio_features(zeros(1, frames, audio.hidden_size)).pooler_output
    return model.get_audio_features(zeros(1, audio.num_mel_bins, frames * ENCODER_STRIDE)).pooler_output


def with_trimmed_audio(base: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Put embeddings in the place of token ids where a batch has fewer audio tokens than its windows have positions.

    The library itself takes only as many as there are positions. How many each clip has is read off its prompt: the
    tokens of a clip are neighbours, and other tokens stand between two clips.
    """
    inputs = dict[str, Any](batch)
    if "input_features" not in batch:
        return inputs
    audio = base.config.audio_config
    per_window = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
    is_audio_BL = batch["input_ids"] == base.config.audio_token_id
    num_windows = len(batch["input_features"])
    if int(is_audio_BL.sum()) == num_windows * per_window:
        return inputs
    keep = _first_positions(is_audio_BL, num_windows, per_window)
    embeddings_BLD = base.get_input_embeddings()(inputs.pop("input_ids"))
    states = base.model.get_audio_features(inputs.pop("input_features"), return_dict=True).pooler_output[keep]
    inputs["inputs_embeds"] = embeddings_BLD.masked_scatter(is_audio_BL[..., None], states.to(embeddings_BLD.dtype))
    return inputs


def _first_positions(is_audio_BL: torch.Tensor, num_windows: int, per_window: int) -> torch.Tensor:
    """Which of the windows' positions have a token: of every clip the first ones.

    Returns:
        bool, shape (num_windows * per_window,).
    """
    begins_BL = is_audio_BL & ~torch.nn.functional.pad(is_audio_BL, (1, 0))[:, :-1]
    clip_of_token = begins_BL.flatten().cumsum(0)[is_audio_BL.flatten()] - 1
    lengths = torch.bincount(clip_of_token)
    padded = (lengths + per_window - 1) // per_window * per_window
    total = num_windows * per_window
    assert int(padded.sum()) == total, f"clips of {lengths.tolist()} audio tokens in {num_windows} windows"
    place = torch.arange(total, device=lengths.device)
    starts, clip = padded.cumsum(0) - padded, torch.repeat_interleave(padded)
    return place - starts[clip] < lengths[clip]
