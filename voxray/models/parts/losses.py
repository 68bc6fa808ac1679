"""Cross entropy of the answers in a batch.

Shape letters: B rows, L tokens, N answer tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from voxray.models.interface import IGNORED, Batch

LogitsFn = Callable[[Batch, torch.Tensor], torch.Tensor]
"""The forward pass: (batch without labels and tasks, keep_BL) -> logits_NV (see ``ModelFamily.answer_logits``)."""


def token_losses(logits: LogitsFn, batch: Batch, label_smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of every answer token, including the end-of-text token.

    Args:
        batch: As ``collate_training`` or ``collate_packed`` makes it.
    Returns:
        loss_N, float32, one value per answer token; and keep_BL, True at the positions that predict these tokens, one
        before each.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name not in {"labels", "task"}}
    next_BL = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    keep_BL = next_BL != IGNORED
    logits_NV = logits(inputs, keep_BL).float()
    return F.cross_entropy(logits_NV, next_BL[keep_BL], reduction="none", label_smoothing=label_smoothing), keep_BL
