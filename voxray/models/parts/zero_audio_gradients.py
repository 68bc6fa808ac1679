"""Batches without audio, in which what hears audio takes part all the same: workers that train together have to compute
with the same weights in the same order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def zero_audio_gradients(
    embeddings: torch.nn.Module, roles: Sequence[str], silence: Callable[[bool, torch.device], torch.Tensor]
) -> Iterator[None]:
    """Within it the token embeddings depend on what hears audio, by nothing: its weights get gradients of zero.

    Args:
        embeddings: The module that gives them.
        roles: Those that take part; nothing is done if neither encoder nor projector is among them.
        silence: Whether the encoder takes part, and the device -> what they make of nothing.
    """
    if not {"encoder", "projector"} & set(roles):
        yield
        return

    def depend(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], embedded_BLD: torch.Tensor) -> torch.Tensor:
        device = embedded_BLD.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # for the dropout of what comes after
            heard = silence("encoder" in roles, device)
        # not times zero: gradients of float16, added up, overflow, and zero times infinity is no number
        never = torch.zeros((), dtype=torch.bool, device=device)
        return torch.where(never, heard.flatten()[0].to(embedded_BLD.dtype), embedded_BLD)

    hook = embeddings.register_forward_hook(depend)
    try:
        yield
    finally:
        hook.remove()
