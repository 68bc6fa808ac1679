"""The sizes on which the memory of a forward pass depends: numbers of rows, tokens and windows."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch


@dataclass(frozen=True)
class PackShape:
    """Sizes of one forward pass.

    Attributes:
        num_rows: Manifest rows.
        num_tokens: Positions of the language model or decoder, padding included.
        longest: Tokens of the longest row.
        num_windows: Audio windows.
        num_answer_tokens: Positions at which logits are computed.
        packed: Whether the rows are concatenated, without padding and without a mask.
        even: Whether all rows have the same length, so that there is no padding.
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
        """Whether attention uses a mask of shape (rows, tokens, tokens)."""
        return not (self.packed or self.even)

    def without_mask(self) -> "PackShape":
        return replace(self, even=True)


@dataclass(frozen=True)
class ComputeConfig:
    """How a forward and backward pass is computed.

    Attributes:
        dtype: Data type of the frozen weights and of activations.
        on_gpu: Whether it runs on a GPU, whose kernels save other tensors than those of a CPU.
        grad_ckpt: Whether activations are recomputed in the backward pass.
        quantize: Value of ``--quantize``.
        label_smoothing: Value of ``--label_smoothing``.
    """

    dtype: torch.dtype = torch.float32
    on_gpu: bool = False
    grad_ckpt: bool = False
    quantize: str = "none"
    label_smoothing: float = 0.0


def pack_shape(
    rows: Iterable[int], others: np.ndarray, labels: np.ndarray, windows: np.ndarray, *, packed: bool
) -> PackShape:
    """The shape of a pack.

    Args:
        rows: Row numbers.
        others, labels, windows: Tokens without a label, tokens with one, and windows by row number.
        packed: Whether the rows are concatenated instead of padded.
    """
    indices = np.asarray(list(rows))
    lengths = others[indices] + labels[indices]
    longest = int(lengths.max())
    return PackShape(
        num_rows=len(indices),
        num_tokens=int(lengths.sum()) if packed else len(indices) * longest,
        longest=longest,
        num_windows=int(windows[indices].sum()),
        num_answer_tokens=int(labels[indices].sum()),
        packed=packed,
        even=bool((lengths == longest).all()),
    )
