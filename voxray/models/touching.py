"""Batches without audio, in which what hears audio takes part all the same: workers that train together have to compute
with the same weights in the same order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def depending(embeddings: torch.nn.Module, hear: Callable[[torch.device], torch.Tensor]) -> Iterator[None]:
    """Within it the token embeddings depend on what ``hear`` gives, by nothing: its weights get gradients of zero.

    Args:
        embeddings: The module that gives them.
        hear: Runs what takes part on silence that it makes on the device it is given.
    """

    def depend(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], embedded_BLD: torch.Tensor) -> torch.Tensor:
        device = embedded_BLD.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # for the dropout of what comes after
            heard = hear(device)
        # not times zero: gradients of float16, added up, overflow, and zero times infinity is no number
        never = torch.zeros((), dtype=torch.bool, device=device)
        return torch.where(never, heard.flatten()[0].to(embedded_BLD.dtype), embedded_BLD)

    hook = embeddings.register_forward_hook(depend)
    try:
        yield
    finally:
        hook.remove()
