"""Answers of a model to stored rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from voxray.data.collate import collate_prompts
from voxray.data.features import FeatureRow, Features
from voxray.models.family import Family, FrontEnd


def length_batches(features: Features, rows: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Group rows of similar prompt and clip length, the longest first, so that little is padded."""
    order = sorted(rows, key=lambda row: (-int(features.num_prompt_tokens[row]), -int(features.num_samples[row]), row))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.inference_mode()
def answers(
    model: Any,
    family: Family,
    front_end: FrontEnd,
    rows: Sequence[FeatureRow],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Generate the answers to a batch of rows.

    Args:
        max_new_tokens: Longest answer.
        temperature: 0 takes the most likely token each time; else tokens are drawn, seeded by ``seed``.
        top_p: Draw among the likeliest tokens that have this probability together; 1 draws among all.
    Returns:
        One text per row, without control tokens.
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate_prompts(rows, front_end).items()}
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(int(np.random.SeedSequence([seed]).generate_state(1)[0]))
        # transformers would draw among 50 tokens unless told that top_k is off
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    ids_BL = family.generate(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        pad_token_id=front_end.pad_id,
        eos_token_id=front_end.eos_id,
        **sampling,
    )
    return [front_end.decode(_until(ids, front_end.eos_id)).strip() for ids in ids_BL.tolist()]


def _until(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
