"""Answers in the making, for language models of transformers that read from left to right: prompts of several lengths
beside each other, rows that leave when they are done, and rows that join.

All rows end in the same column. A shorter one has masked columns at its left, and its positions count its own tokens
only, so what a row is told does not depend on its neighbours.

Shape letters: B rows, L columns, H heads, D width of a head, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64
"""Columns by which a layer's memory grows at a time; the library's own grows, and so copies everything, at every
token."""

Run = Callable[..., torch.Tensor]
"""The model: its inputs by name -> logits_BV after the last column."""


class PreallocatedCacheLayer(DynamicLayer):
    """Keys and values of one layer, views of tensors that have room for more columns."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._take(key_states, value_states)
            return self.keys, self.values
        if end > self._room_keys.shape[2]:
            self._take(self.keys, self.values)
        self._room_keys[:, :, start:end] = key_states
        self._room_values[:, :, start:end] = value_states
        self._look(end)
        return self.keys, self.values

    def select(self, rows: torch.Tensor, first: int) -> None:
        """Keep some rows, and of them the columns from ``first`` on."""
        assert self.keys is not None and self.values is not None
        self._take(self.keys[rows, :, first:], self.values[rows, :, first:])

    def append_rows(self, other: "PreallocatedCacheLayer", length: int) -> None:
        """Put another one's rows below, all with ``length`` columns."""
        self._take(_stacked(self.keys, other.keys, length), _stacked(self.values, other.values, length))

    def _take(self, keys_BHLD: torch.Tensor | None, values_BHLD: torch.Tensor | None) -> None:
        assert keys_BHLD is not None and values_BHLD is not None
        self._room_keys, self._room_values = _roomy(keys_BHLD), _roomy(values_BHLD)
        self._look(keys_BHLD.shape[2])

    def _look(self, end: int) -> None:
        self.keys, self.values = self._room_keys[:, :, :end], self._room_values[:, :, :end]


def _roomy(states_BHLD: torch.Tensor) -> torch.Tensor:
    rows, heads, length, width = states_BHLD.shape
    made = states_BHLD.new_empty(rows, heads, length + ROOM, width)
    made[:, :, :length] = states_BHLD
    return made


def _stacked(first: torch.Tensor | None, second: torch.Tensor | None, length: int) -> torch.Tensor:
    """Rows below each other, filled at the left with zeros: masked or not, no number may be NaN."""
    assert first is not None and second is not None
    padded = [torch.nn.functional.pad(states, (0, 0, length - states.shape[2], 0)) for states in (first, second)]
    return torch.cat(padded)


class CausalDecodeState:
    """The state of some rows; see ``models.interface.DecodeState``.

    Args:
        run: The model.
        mask_BL: True where the prompts, which are padded on the left, have tokens.
    """

    def __init__(self, run: Run, mask_BL: torch.Tensor) -> None:
        self._run, self._cache = run, Cache(layer_class_to_replicate=PreallocatedCacheLayer)
        self._see(mask_BL)
        self._position_B = mask_BL.sum(1)

    @classmethod
    def prefill(cls, run: Run, inputs: dict[str, Any]) -> tuple[Self, torch.Tensor]:
        """Read prompts.

        Args:
            inputs: ``attention_mask`` (B, L) and all that the model takes beside it.
        Returns:
            The state, and logits_BV of the first new token.
        """
        mask_BL = inputs["attention_mask"].bool()
        state = cls(run, mask_BL)
        positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        return state, run(**inputs, position_ids=positions_BL, past_key_values=state._memory)

    def decode_step(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Add a token to every row; returns logits_BV of the next one."""
        self._mask_BL = torch.nn.functional.pad(self._mask_BL, (0, 1), value=True)
        # With four dimensions the library takes the mask as it is; without padding there is none to apply.
        mask = self._mask_BL[:, None, None] if self._is_padded else None
        inputs = {"input_ids": ids_B[:, None], "attention_mask": mask, "position_ids": self._position_B[:, None]}
        logits_BV = self._run(**inputs, past_key_values=self._memory)
        self._position_B = self._position_B + 1
        return logits_BV

    def select_rows(self, rows: Sequence[int]) -> None:
        """Let all other rows go, and the columns that only they had."""
        index = torch.tensor(rows, device=self._mask_BL.device)
        mask_BL = self._mask_BL[index]
        first = int(mask_BL.any(0).int().argmax())
        self._see(mask_BL[:, first:])
        self._position_B = self._position_B[index]
        for layer in self._layers:
            layer.select(index, first)

    def merge(self, other: "CausalDecodeState") -> None:
        """Take another state's rows in, below the own."""
        length = max(self._mask_BL.shape[1], other._mask_BL.shape[1])
        pad = torch.nn.functional.pad
        masks = [pad(mask, (length - mask.shape[1], 0)) for mask in (self._mask_BL, other._mask_BL)]
        self._see(torch.cat(masks))
        self._position_B = torch.cat([self._position_B, other._position_B])
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.append_rows(theirs, length)

    def _see(self, mask_BL: torch.Tensor) -> None:
        self._mask_BL, self._is_padded = mask_BL, not bool(mask_BL.all())

    @property
    def _memory(self) -> Any:
        """What the model is given as ``past_key_values``."""
        return self._cache

    @property
    def _layers(self) -> list[PreallocatedCacheLayer]:
        return self._cache.layers  # type: ignore[return-value]
