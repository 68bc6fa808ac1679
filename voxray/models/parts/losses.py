"""Cross entropy of the answers in a batch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from voxray.models.interface import IGNORED, Batch

Logits = Callable[[Batch, torch.Tensor], torch.Tensor]
"""The forward pass: from a batch without labels and tasks, and where to predict, to logits_NV."""


def token_losses(logits: Logits, batch: Batch, label_smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of every answer token, the end-of-text token included.

    Args:
        batch: As ``collate_training`` or ``collate_packed`` makes it.
    Returns:
        float32, shape (answer tokens,), and keep_BL: True where they are predicted, one place before each.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name not in {"labels", "task"}}
    next_BL = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    keep_BL = next_BL != IGNORED
    logits_NV = logits(inputs, keep_BL).float()
    return F.cross_entropy(logits_NV, next_BL[keep_BL], reduction="none", label_smoothing=label_smoothing), keep_BL
