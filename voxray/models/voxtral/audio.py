"""How audio enters Voxtral's language model: trimmed, already encoded, or absent from a batch.

Shape letters: B rows, L tokens, N audio positions of a batch, D width, W windows, P encoder positions of a window, T
mel frames of a window, F mel bins.
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


def embed_trimmed_audio(base: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Replace token ids by embeddings if a batch has fewer audio tokens than its windows have positions.

    transformers itself accepts only one token for every position. The length of each clip is read from the prompt: the
    audio tokens of a clip are contiguous, and other tokens separate two clips.
    """
    inputs = dict[str, Any](batch)
    if "input_features" not in batch:
        return inputs
    audio = base.config.audio_config
    positions_per_window = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
    is_audio_BL = batch["input_ids"] == base.config.audio_token_id
    num_windows = len(batch["input_features"])
    if int(is_audio_BL.sum()) == num_windows * positions_per_window:
        return inputs
    keep_N = _positions_with_token(is_audio_BL, num_windows, positions_per_window)
    embeddings_BLD = base.get_input_embeddings()(inputs.pop("input_ids"))
    states_ND = base.model.get_audio_features(inputs.pop("input_features"), return_dict=True).pooler_output[keep_N]
    inputs["inputs_embeds"] = embeddings_BLD.masked_scatter(is_audio_BL[..., None], states_ND.to(embeddings_BLD.dtype))
    return inputs


def _positions_with_token(is_audio_BL: torch.Tensor, num_windows: int, positions_per_window: int) -> torch.Tensor:
    """Which positions of the windows have a token in the prompt: the first ones of every clip.

    Returns:
        bool, shape (num_windows * positions_per_window,).
    """
    is_start_BL = is_audio_BL & ~torch.nn.functional.pad(is_audio_BL, (1, 0))[:, :-1]
    clip_of_token = is_start_BL.flatten().cumsum(0)[is_audio_BL.flatten()] - 1
    lengths = torch.bincount(clip_of_token)
    padded = (lengths + positions_per_window - 1) // positions_per_window * positions_per_window
    total = num_windows * positions_per_window
    assert int(padded.sum()) == total, f"clips of {lengths.tolist()} audio tokens in {num_windows} windows"
    index_N = torch.arange(total, device=lengths.device)
    starts, clip_N = padded.cumsum(0) - padded, torch.repeat_interleave(padded)
    return index_N - starts[clip_N] < lengths[clip_N]
