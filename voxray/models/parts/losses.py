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

ABOUT_ANSWERS = ("labels", "task", "answer_positions", "is_replayed")
"""Tensors of a batch that the forward pass does not take."""
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

    With ``base_states_ND``, the result is losses_2N: the cross entropies, and KL(base || model) of the distributions
    of every token, in nats. Distillation from the base is the loss of "Learning without Forgetting" (Li and Hoiem,
    2016) on the rows of the training.

    Attributes:
        labels_N: The answer tokens.
        in_chunks: False where all workers have to call the output layer equally often.
        base_states_ND: States of the base without the adapter. The output layer, which has none, is shared.
    """

    labels_N: torch.Tensor
    label_smoothing: float = 0.0
    in_chunks: bool = True
    base_states_ND: torch.Tensor | None = None

    def __call__(self, layer: torch.nn.Module, states_ND: torch.Tensor) -> torch.Tensor:
        assert isinstance(layer.out_features, int)  # a sharded weight may have no rows
        size = max(1, MAX_LOGITS // layer.out_features)
        columns = [states_ND, self.labels_N] + ([] if self.base_states_ND is None else [self.base_states_ND])
        if not self.in_chunks or len(states_ND) <= size:
            return self._losses(layer, *columns)
        chunks = zip(*(column.split(size) for column in columns), strict=True)
        recompute = partial(checkpoint, self._losses, layer, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([recompute(*chunk) for chunk in chunks], dim=-1)

    def _losses(
        self,
        layer: torch.nn.Module,
        states_ND: torch.Tensor,
        labels_N: torch.Tensor,
        base_states_ND: torch.Tensor | None = None,
    ) -> torch.Tensor:
        logits_NV = layer(states_ND).float()
        loss_N = F.cross_entropy(logits_NV, labels_N, reduction="none", label_smoothing=self.label_smoothing)
        if base_states_ND is None:
            return loss_N
        with torch.no_grad():
            target_NV = layer(base_states_ND).float().log_softmax(-1)
        divergence_NV = F.kl_div(logits_NV.log_softmax(-1), target_NV, reduction="none", log_target=True)
        return torch.stack([loss_N, divergence_NV.sum(-1)])


def token_losses(
    run_pass: PassFn,
    batch: Batch,
    label_smoothing: float = 0.0,
    *,
    in_chunks: bool = True,
    base_states_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of every answer token, including the end-of-text token.

    Args:
        batch: As ``collate_training`` or ``collate_packed`` makes it.
        in_chunks, base_states_ND: See ``TokenLosses``.
    Returns:
        loss_N, float32, one value per answer token, in the order of ``answer_positions``; or losses_2N.
    """
    positions_N = batch["answer_positions"]
    labels_N = batch["labels"].flatten().index_select(0, positions_N + 1)
    output = TokenLosses(labels_N, label_smoothing, in_chunks, base_states_ND)
    return run_pass(pass_inputs(batch), positions_N, output)


@torch.no_grad()
def answer_states(run_pass: PassFn, batch: Batch) -> torch.Tensor:
    """states_ND before the output layer, at the positions that predict the answer tokens."""
    return run_pass(pass_inputs(batch), batch["answer_positions"], lambda layer, states_ND: states_ND)


def pass_inputs(batch: Batch) -> Batch:
    """The tensors of a batch that the forward pass takes: those that describe no answers."""
    return {name: tensor for name, tensor in batch.items() if name not in ABOUT_ANSWERS}


def at_positions(states_BLD: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """states_ND of positions that count through all rows (see ``batches.collate``)."""
    return states_BLD.flatten(0, 1).index_select(0, positions_N)
