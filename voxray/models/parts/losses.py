"""Cross entropy of the answers in a batch.

Shape letters: B rows, L tokens, N answer tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from voxray.models.interface import Batch, OutputFn

PassFn = Callable[[Batch, torch.Tensor, OutputFn], torch.Tensor]
"""The forward pass: (batch without labels and tasks, positions_N, output) -> result of ``output`` (see
``ModelFamily.answer_logits``)."""
MAX_LOGITS = 1 << 27
"""Logits that are in memory at a time, 512 MiB in float32. With 131,072 tokens these are 1,024 positions."""


@dataclass(frozen=True)
class TokenLosses:
    """Cross entropy of answer tokens, computed from the output layer and the states before it (see ``OutputFn``).

    More than ``MAX_LOGITS`` logits are computed in chunks, and again in the backward pass: they would take most of a
    step's memory.

    Attributes:
        labels_N: The answer tokens.
        in_chunks: False where all workers have to call the output layer equally often.
    """

    labels_N: torch.Tensor
    label_smoothing: float = 0.0
    in_chunks: bool = True

    def __call__(self, layer: torch.nn.Module, states_ND: torch.Tensor) -> torch.Tensor:
        assert isinstance(layer.out_features, int)  # a sharded weight may have no rows
        size = max(1, MAX_LOGITS // layer.out_features)
        if not self.in_chunks or len(states_ND) <= size:
            return self._losses(layer, states_ND, self.labels_N)
        chunks = zip(states_ND.split(size), self.labels_N.split(size), strict=True)
        recompute = partial(checkpoint, self._losses, layer, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([recompute(*chunk) for chunk in chunks])

    def _losses(self, layer: torch.nn.Module, states_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        logits_NV = layer(states_ND).float()
        return F.cross_entropy(logits_NV, labels_N, reduction="none", label_smoothing=self.label_smoothing)


def token_losses(
    run_pass: PassFn, batch: Batch, label_smoothing: float = 0.0, *, in_chunks: bool = True
) -> torch.Tensor:
    """Cross entropy of every answer token, including the end-of-text token.

    Args:
        batch: As ``collate_training`` or ``collate_packed`` makes it.
        in_chunks: See ``TokenLosses``.
    Returns:
        loss_N, float32, one value per answer token, in the order of ``answer_positions``.
    """
    positions_N = batch["answer_positions"]
    labels_N = batch["labels"].flatten().index_select(0, positions_N + 1)
    return run_pass(pass_inputs(batch), positions_N, TokenLosses(labels_N, label_smoothing, in_chunks))


def pass_inputs(batch: Batch) -> Batch:
    """The tensors of a batch that the forward pass takes: those that describe no answers."""
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "task", "answer_positions")}


def at_positions(states_BLD: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """states_ND of positions that count through all rows (see ``batches.collate``)."""
    return states_BLD.flatten(0, 1).index_select(0, positions_N)
