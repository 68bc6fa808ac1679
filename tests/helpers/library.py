"""Batches for transformers' own models."""

import torch

NAMES = ("input_ids", "attention_mask", "labels", "input_features")


def library_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a padded batch of voxray that transformers' models know."""
    return {name: batch[name] for name in NAMES if name in batch}
