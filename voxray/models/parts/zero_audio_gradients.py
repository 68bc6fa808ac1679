"""Makes the audio modules take part in batches without audio.

Workers that train together have to compute with the same weights in the same order, whatever their batches contain.

Shape letters: B rows, L tokens, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def zero_audio_gradients(
    embeddings: torch.nn.Module, roles: Sequence[str], silent_audio: Callable[[bool, torch.device], torch.Tensor]
) -> Iterator[None]:
    """Within this context the audio modules are run, and get gradients of zero through the token embeddings.

    Args:
        embeddings: The model's token embedding module. Its output does not change.
        roles: Roles that take part. Without encoder and projector among them this does nothing.
        silent_audio: (whether the encoder takes part, device) -> output of the audio modules for any input.
    """
    if not {"encoder", "projector"} & set(roles):
        yield
        return

    def add_dependency(
        module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], embedded_BLD: torch.Tensor
    ) -> torch.Tensor:
        device = embedded_BLD.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # keeps the later dropout the same
            audio = silent_audio("encoder" in roles, device)
        # Not a product with zero: accumulated float16 gradients overflow, and zero times infinity is NaN.
        never = torch.zeros((), dtype=torch.bool, device=device)
        return torch.where(never, audio.flatten()[0].to(embedded_BLD.dtype), embedded_BLD)

    hook = embeddings.register_forward_hook(add_dependency)
    try:
        yield
    finally:
        hook.remove()
