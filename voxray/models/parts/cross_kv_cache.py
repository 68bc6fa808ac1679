"""Answers in the making, for decoders that look at an encoder's outputs: each row remembers what it heard.

Shape letters: B rows, H heads, P encoder positions, D width of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from voxray.models.parts.kv_cache import CausalDecodeState, Run


class CrossDecodeState(CausalDecodeState):
    """``CausalDecodeState`` for encoder-decoders: rows take their cross-attention keys and values with them."""

    def __init__(self, run: Run, mask_BL: torch.Tensor) -> None:
        super().__init__(run, mask_BL)
        heard = Cache(layer_class_to_replicate=DynamicLayer)
        self._both = EncoderDecoderCache(self._cache, heard)

    def select_rows(self, rows: Sequence[int]) -> None:
        super().select_rows(rows)
        index = torch.tensor(rows, device=self._mask_BL.device)
        for layer in self._heard:
            layer.keys, layer.values = layer.keys[index], layer.values[index]

    def merge(self, other: "CrossDecodeState") -> None:  # type: ignore[override]  # rows of the same model
        super().merge(other)
        for mine, theirs in zip(self._heard, other._heard, strict=True):
            mine.keys = torch.cat([mine.keys, theirs.keys])
            mine.values = torch.cat([mine.values, theirs.values])

    @property
    def _memory(self) -> EncoderDecoderCache:
        return self._both

    @property
    def _heard(self) -> list[Any]:
        return self._both.cross_attention_cache.layers
