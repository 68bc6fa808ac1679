"""Puts audio embeddings at the placeholder tokens of prompts.

Shape letters: B rows, L tokens, D width.
"""

import torch

from voxray.models.interface import Batch


def put_audio(embeddings_BLD: torch.Tensor, audio: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Replace the embeddings of the placeholder tokens of a batch by those of its audio.

    Args:
        audio: Embeddings for all outputs of all windows, in order; their last dimension is D.
        batch: With the ``audio_positions``, and the ``audio_outputs`` unless all outputs have a token.
    Returns:
        embeds_BLD.
    """
    states = audio.reshape(-1, embeddings_BLD.shape[-1])
    if "audio_outputs" in batch:
        states = states.index_select(0, batch["audio_outputs"])
    positions = batch["audio_positions"]
    assert len(states) == len(positions), f"{len(positions)} audio tokens for {len(states)} positions of audio"
    flat = embeddings_BLD.flatten(0, 1).index_copy(0, positions, states.to(embeddings_BLD.dtype))
    return flat.view_as(embeddings_BLD)
