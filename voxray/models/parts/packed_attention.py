"""Attention for packs: each of the rows in a pack attends to itself only.

transformers recognises packs by position ids that start again, and then builds a dense mask of tokens by tokens, whose
cost grows with the square of the pack. Here there is no mask, and a pack costs what its rows cost: one call of the
variable-length flash kernel where available (GPUs from Ampere on, half precision), else one call of PyTorch's causal
attention per row.

Batches without ``segments`` (padded batches, generation) use transformers' attention. On a GPU PyTorch chooses the
kernel for them: flash if no row is padded, else the memory-efficient one, because flash takes no mask. In training the
mask is made here, because transformers first reads on the CPU whether a row is padded, which waits for the GPU.

Shape letters: B rows, H heads, L tokens, D width of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch

from voxray.models.parts.layer_compile import exclude_from_compile, is_compiled

PACKED = "voxray_packed"
"""Name under which the attention is registered with transformers."""
MAX_HEAD_DIM = 256  # of the flash kernel, which also requires a multiple of 8


@dataclass(frozen=True)
class Segments:
    """Boundaries of the rows in a pack.

    Attributes:
        ends: For every row, the index after its last token.
        bounds: 0 and the ends, int32, on the model's device.
    """

    ends: tuple[int, ...]
    bounds: torch.Tensor

    @classmethod
    def of(cls, segment_ends: torch.Tensor, device: torch.device) -> "Segments":
        """Segments on the model's device, from their ends on the CPU."""
        ends = tuple(segment_ends.tolist())
        return cls(ends, torch.tensor([0, *ends], dtype=torch.int32).to(device, non_blocking=True))

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in zip((0, *self.ends), self.ends, strict=False)]


def use_training_attention(language_model: Any, inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Prepare a language model, and its inputs, for a pass of training. Nothing is read from the device.

    Args:
        inputs: With ``segment_ends`` of a pack, ``attention_mask`` (B, L) of padded rows, or neither.
        device: The model's device.
    Returns:
        The inputs, with ``segments`` for a pack, and with a mask that transformers applies as it is.
    """
    use_packed_attention(language_model)
    inputs = dict(inputs)
    if "segment_ends" in inputs:
        inputs["segments"] = Segments.of(inputs.pop("segment_ends"), device)
    mask_BL = inputs.get("attention_mask")
    window = getattr(language_model.config, "sliding_window", None)
    if mask_BL is None:
        inputs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    elif not window or mask_BL.shape[1] <= window:
        inputs["attention_mask"] = _causal_mask(mask_BL)
    return inputs


def _causal_mask(mask_BL: torch.Tensor) -> torch.Tensor:
    """Which tokens every token attends to: itself and those before, without padding. Shape (B, 1, L, L)."""
    index_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    return (index_L <= index_L[:, None]) & mask_BL.bool()[:, None, None]


def use_packed_attention(language_model: Any) -> None:
    """Make a transformers language model accept ``segments`` as an argument of ``forward``, for packed rows."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    attention = exclude_from_compile(packed_attention) if is_compiled(language_model) else packed_attention
    AttentionInterface.register(PACKED, attention)
    AttentionMaskInterface.register(PACKED, _mask)
    language_model.config._attn_implementation = PACKED


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of one packed row.

    Args:
        query, key, value: Shape (B, H, L, D); keys and values may have fewer heads. transformers gives them by name.
        attention_mask: True for tokens to attend to. A mask of one element stands for causal attention without mask.
        segments: None for rows that are not packed.
    Returns:
        Outputs, shape (B, L, H, D), and None in place of attention weights.
    """
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        if attention_mask is not None and attention_mask.numel() == 1:
            attention_mask = None
            options.pop("is_causal", None)  # some layers say False if there is a mask
        inputs = (query, key, value, attention_mask)
        return sdpa_attention_forward(module, *inputs, dropout=dropout, scaling=scaling, **options)
    assert query.shape[0] == 1 and query.shape[2] == segments.ends[-1] == key.shape[2], "one packed row"
    options = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    if takes_flash(query.device, query.dtype, query.shape[-1], dropout):
        from torch.nn.attention.varlen import varlen_attn  # imported here: it loads torch's compiler

        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (L, H, D)
        bounds, longest = segments.bounds, max(segments.lengths)
        causal = (-1, 0)  # all tokens before, none after
        output_LHD: Any = varlen_attn(
            query, key, value, bounds, bounds, longest, longest, window_size=causal, **options
        )
        return output_LHD[None], None
    # split, not slices: the gradient of each slice would be a tensor as long as the whole row
    samples = zip(*(tensor.split(segments.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    outputs = [attend(*sample, dropout_p=dropout, is_causal=True, **options) for sample in samples]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def takes_flash(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> bool:
    """Whether PyTorch's variable-length flash kernel can be used; it supports no dropout."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    supported = (
        dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM and not dropout
    )
    available = torch.backends.cuda.is_flash_attention_available()
    return supported and available and torch.cuda.get_device_capability(device) >= (8, 0)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> torch.Tensor | None:
    """None for a packed row (no padding mask, and position ids that start again), else transformers' mask."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and not allow_is_causal_skip and q_length == kv_length > 1:
        return None
    sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    options |= {"attention_mask": attention_mask, "allow_is_causal_skip": allow_is_causal_skip}
    return sdpa_mask(**sizes, **options)
