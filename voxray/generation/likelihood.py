"""Log-likelihood of the reference answers, from which loss and perplexity are computed."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from voxray.batches.collate import collate_training, to_device
from voxray.features.reader import FeatureRow
from voxray.models.front_end import FrontEnd
from voxray.models.interface import ModelFamily
from voxray.models.parts.losses import token_losses


@torch.no_grad()
def reference_losses(model: Any, family: ModelFamily, front_end: FrontEnd, rows: Sequence[FeatureRow]) -> list[float]:
    """-ln p of every row's reference answer, by the forward pass of training.

    Args:
        model: In eval mode.
        rows: One batch.
    Returns:
        One sum per row over ``target_ids``, end-of-text token included. Of a chat it is the last answer.
    """
    batch = collate_training([replace(row, prompt_labels=None) for row in rows], front_end)
    row_N = batch["answer_positions"] // batch["input_ids"].shape[1]
    batch = to_device(batch, next(model.parameters()).device)
    loss_N = token_losses(partial(family.answer_logits, model), batch)
    sums = torch.zeros(len(rows), dtype=torch.float64)
    return sums.index_add(0, row_N, loss_N.double().cpu()).tolist()
