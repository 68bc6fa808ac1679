"""Cross entropy of the answers in a batch.

Shape letters: B rows, L tokens, N answer tokens, D width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from voxray.models.interface import Batch

LogitsFn = Callable[[Batch, torch.Tensor], torch.Tensor]
"""The forward pass: (batch without labels and tasks, positions_N) -> logits_NV (see ``ModelFamily.answer_logits``)."""


def token_losses(logits: LogitsFn, batch: Batch, label_smoothing: float = 0.0) -> torch.Tensor:
    """Cross entropy of every answer token, including the end-of-text token.

    Args:
        batch: As ``collate_training`` or ``collate_packed`` makes it.
    Returns:
        loss_N, float32, one value per answer token, in the order of ``answer_positions``.
    """
    inputs, positions_N = dict(batch), batch["answer_positions"]
    for name in ("labels", "task", "answer_positions"):
        del inputs[name]
    logits_NV = logits(inputs, positions_N).float()
    labels_N = batch["labels"].flatten().index_select(0, positions_N + 1)
    return F.cross_entropy(logits_NV, labels_N, reduction="none", label_smoothing=label_smoothing)


def at_positions(states_BLD: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """states_ND of positions that count through all rows (see ``batches.collate``)."""
    return states_BLD.flatten(0, 1).index_select(0, positions_N)
