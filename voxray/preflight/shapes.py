"""What the memory of a forward pass depends on: how many rows, tokens and windows are in it, not what they say."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class PackShape:
    """Sizes of one forward pass.

    Attributes:
        num_rows: Rows of the manifest in it.
        num_tokens: Positions of the language model or decoder, padding included.
        longest: Tokens of the longest row.
        num_windows: Windows of audio.
        num_answer_tokens: Positions at which logits are computed.
        packed: Whether the rows stand one after the other, without padding and without a mask.
        even: Whether all rows are equally long, so that nothing is padded.
    """

    num_rows: int
    num_tokens: int
    longest: int
    num_windows: int
    num_answer_tokens: int
    packed: bool = False
    even: bool = False

    @property
    def masked(self) -> bool:
        """Whether attention is given a mask of rows by tokens by tokens."""
        return not (self.packed or self.even)

    def without_mask(self) -> "PackShape":
        return replace(self, even=True)


@dataclass(frozen=True)
class Computing:
    """How it is computed.

    Attributes:
        dtype: Of the frozen weights and of activations.
        on_gpu: Whether on a GPU, whose kernels keep other things than those of a CPU.
        grad_ckpt: Whether activations are computed again in the backward pass.
        quantize: As the flag says.
        label_smoothing: As the flag says.
    """

    dtype: torch.dtype = torch.float32
    on_gpu: bool = False
    grad_ckpt: bool = False
    quantize: str = "none"
    label_smoothing: float = 0.0


def pack_shape(
    rows: Iterable[int], prompts: np.ndarray, targets: np.ndarray, windows: np.ndarray, *, packed: bool
) -> PackShape:
    """The shape of a pack.

    Args:
        rows: Row numbers.
        prompts, targets, windows: Prompt tokens, answer tokens and windows of every row number.
    """
    numbers = np.asarray(list(rows))
    lengths = prompts[numbers] + targets[numbers]
    longest = int(lengths.max())
    return PackShape(
        num_rows=len(numbers),
        num_tokens=int(lengths.sum()) if packed else len(numbers) * longest,
        longest=longest,
        num_windows=int(windows[numbers].sum()),
        num_answer_tokens=int(targets[numbers].sum()),
        packed=packed,
        even=bool((lengths == longest).all()),
    )
