"""Attention for rows that several samples share: each sample sees itself alone.

The library recognises packed rows by positions that start again, and then builds a dense mask of tokens by tokens,
whose cost grows with the square of the pack. Here every sample goes through PyTorch's causal attention by itself, so a
pack costs what its samples cost, and no mask exists. Rows without ``segment_ends`` (padded batches, generation) take
the library's way, mask included.

Shape letters: B rows, H heads, L tokens, D width of a head.
"""

from typing import Any

import torch

PACKED = "voxray_packed"
"""Name under which the attention is known to transformers."""


def use_packed_attention(language_model: Any) -> None:
    """Let a language model of transformers take packed rows: ``segment_ends`` among the arguments of its forward."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _mask)
    language_model.config._attn_implementation = PACKED


def packed_attention(
    module: torch.nn.Module,
    query_BHLD: torch.Tensor,
    key_BHLD: torch.Tensor,
    value_BHLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_ends: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of one packed row.

    Args:
        segment_ends: Place after the last token of every sample; None for rows that are not packed.
    Returns:
        Outputs, shape (B, L, H, D), and no weights.
    """
    if segment_ends is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        inputs = (query_BHLD, key_BHLD, value_BHLD, attention_mask)
        return sdpa_attention_forward(module, *inputs, dropout=dropout, scaling=scaling, **options)
    assert query_BHLD.shape[0] == 1 and query_BHLD.shape[2] == segment_ends[-1] == key_BHLD.shape[2], "one packed row"
    parts, start = [], 0
    for end in segment_ends:
        one = [tensor[:, :, start:end] for tensor in (query_BHLD, key_BHLD, value_BHLD)]
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                *one, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=one[0].shape[1] != one[1].shape[1]
            )
        )
        start = end
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """No mask for a packed row, which is one without a padding mask whose positions start again; else the library's."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and not allow_is_causal_skip and q_length == kv_length > 1:
        return None
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    options |= {"attention_mask": attention_mask, "allow_is_causal_skip": allow_is_causal_skip}
    return sdpa_mask(**sizes, **options)
