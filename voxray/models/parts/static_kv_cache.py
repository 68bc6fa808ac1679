"""KV-cache state of fixed size, so that the step that decodes a token is the same computation every time.

On a GPU the step is captured as a CUDA graph: a token then costs one launch instead of some thousand. On a CPU
``torch.compile`` compiles it. A row has a slot of the cache, and its tokens begin at column 0. A row that leaves frees
its slot, and the next row is copied into a free one. No other row moves.

Shape letters: S slots, B rows being generated, L columns, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from voxray.core.errors import RunError, one_line
from voxray.models.interface import DecodeState
from voxray.models.parts.cross_kv_cache import pad_right
from voxray.models.parts.kv_cache import CausalDecodeState

PAGE = 128
"""Columns by which the cache grows. The step is captured, or compiled, again when it has grown."""
WARMUP_STEPS = 2
"""Steps before a capture, in which libraries choose their kernels and allocate memory."""
_ATTRIBUTE = "voxray_static_state"


class _SlotLayer(DynamicLayer):
    """Keys and values of one layer for all slots. ``column_S`` is the column of each slot's next token."""

    def __init__(self, column_S: torch.Tensor) -> None:
        super().__init__()
        self._column_S, self._slot_S = column_S, torch.arange(len(column_S), device=column_S.device)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Write one token of every slot; returns all columns."""
        assert self.keys is not None and self.values is not None
        self.keys[self._slot_S, :, self._column_S] = key_states[:, :, 0]
        self.values[self._slot_S, :, self._column_S] = value_states[:, :, 0]
        return self.keys, self.values


class StaticDecodeState:
    """Rows being generated in the slots of a cache (see ``models.interface.DecodeState``).

    Args:
        like: State of the first rows. Its model computes all steps.
        num_slots: Rows at a time.
    """

    def __init__(self, like: CausalDecodeState, num_slots: int) -> None:
        self.num_slots, self._forward = num_slots, like.forward
        self._slots: list[int] = []
        self._lengths: list[int] = []
        self._ids_S = torch.zeros(num_slots, dtype=torch.int64, device=like.mask_BL.device)
        self._column_S, self._is_used_S = torch.zeros_like(self._ids_S), torch.zeros_like(self._ids_S)
        self._slot_B = self._ids_S[:0]
        self._layers = [_SlotLayer(self._column_S) for _ in like.layers]
        self._cross_layers = [DynamicLayer() for _ in like.cross_layers]
        self._row_inputs: dict[str, torch.Tensor] = {}
        self._cache: Any = Cache(layers=[*self._layers])
        if self._cross_layers:
            self._cache = EncoderDecoderCache(self._cache, Cache(layers=[*self._cross_layers]))
            self._cache.is_updated = dict.fromkeys(range(len(self._layers)), True)
        self._run: Callable[[], torch.Tensor] | None = None

    def restart(self, state: CausalDecodeState) -> None:
        """Free all slots, and begin with the rows of a state that ``prefill`` made."""
        self._set_rows([], [])
        self.merge(state)

    def decode_step(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Append one token to every row; returns logits_BV of the next one.

        Raises:
            RunError: The step cannot be captured or compiled.
        """
        for layer in self._layers:
            self._resize(layer, max(self._lengths) + 1)
        self._ids_S.index_copy_(0, self._slot_B, ids_B)
        if self._run is None:
            self._run = self._capture() if self._ids_S.is_cuda else _compiled(self._step)
        logits_SV = self._run()
        self._column_S += self._is_used_S
        self._lengths = [length + 1 for length in self._lengths]
        return logits_SV.index_select(0, self._slot_B)

    def select_rows(self, rows: Sequence[int]) -> None:
        """Keep only these rows. The slots of the others are free."""
        self._set_rows([self._slots[row] for row in rows], [self._lengths[row] for row in rows])

    def merge(self, other: CausalDecodeState) -> None:
        """Copy the rows of a state that ``prefill`` made into free slots."""
        num_rows, num_columns = other.mask_BL.shape
        slots = [slot for slot in range(self.num_slots) if slot not in self._slots][:num_rows]
        slot_B, length_B = torch.tensor(slots, device=self._ids_S.device), other.mask_BL.sum(1)
        # Prompts are padded on the left, and slots begin at column 0. What follows a row in its slot is masked.
        column_BL = torch.arange(num_columns, device=slot_B.device) + num_columns - length_B[:, None]
        source_B1L1 = column_BL.clamp(max=num_columns - 1)[:, None, :, None]
        for layer, source in zip(self._layers, other.layers, strict=True):
            assert source.keys is not None and source.values is not None
            aligned = (tensor.take_along_dim(source_B1L1, dim=2) for tensor in (source.keys, source.values))
            self._write(layer, slot_B, *aligned, page=PAGE)
        row_inputs = other.row_inputs()
        page = PAGE if row_inputs else 1  # without a mask, all positions of the encoder count
        for layer, source in zip(self._cross_layers, other.cross_layers, strict=True):
            self._write(layer, slot_B, source.keys, source.values, page=page)
        for name, rows in row_inputs.items():
            self._row_inputs[name] = self._written(self._row_inputs.get(name), slot_B, rows, dim=3, page=page)
        self._set_rows(self._slots + slots, self._lengths + length_B.tolist())

    def _write(self, layer: DynamicLayer, slot_B: torch.Tensor, keys: Any, values: Any, *, page: int) -> None:
        layer.keys = self._written(layer.keys, slot_B, keys, dim=2, page=page)
        layer.values = self._written(layer.values, slot_B, values, dim=2, page=page)
        layer.is_initialized = True

    def _written(
        self, tensor_S: torch.Tensor | None, slot_B: torch.Tensor, rows_B: torch.Tensor, *, dim: int, page: int
    ) -> torch.Tensor:
        """A tensor of all slots with rows written into some. Both are padded with zeros to whole pages of ``dim``."""
        if tensor_S is None:
            tensor_S = rows_B.new_zeros(self.num_slots, *rows_B.shape[1:])
        tensor_S = self._padded(tensor_S, rows_B.shape[dim], dim, page)
        tensor_S[slot_B] = pad_right(rows_B, tensor_S.shape[dim], dim)
        return tensor_S

    def _resize(self, layer: DynamicLayer, num_columns: int) -> None:
        """Give a layer at least so many columns."""
        assert layer.keys is not None and layer.values is not None
        layer.keys, layer.values = (self._padded(tensor, num_columns, 2, PAGE) for tensor in (layer.keys, layer.values))

    def _padded(self, tensor_S: torch.Tensor, size: int, dim: int, page: int) -> torch.Tensor:
        """The tensor with whole pages of ``dim``, at least ``size``. A captured step has the tensor that it was."""
        size = -(-max(size, tensor_S.shape[dim]) // page) * page
        if size > tensor_S.shape[dim]:
            self._run = None
        return pad_right(tensor_S, size, dim)

    def _set_rows(self, slots: list[int], lengths: list[int]) -> None:
        self._slots, self._lengths = slots, lengths
        self._slot_B = self._ids_S.new_tensor(slots)
        self._column_S.zero_().index_copy_(0, self._slot_B, self._ids_S.new_tensor(lengths))  # 0 for free slots
        self._is_used_S.zero_().index_fill_(0, self._slot_B, 1)

    def _step(self) -> torch.Tensor:
        """logits_SV of the tokens after ``_ids_S``. Repeating it changes nothing."""
        assert self._layers[0].keys is not None
        column_L = torch.arange(self._layers[0].keys.shape[2], device=self._ids_S.device)
        inputs = {"input_ids": self._ids_S[:, None], "position_ids": self._column_S[:, None], **self._row_inputs}
        # transformers applies a mask of four dimensions as it is
        inputs["attention_mask"] = (column_L <= self._column_S[:, None])[:, None, None]
        return self._forward(**inputs, past_key_values=self._cache)

    def _capture(self) -> Callable[[], torch.Tensor]:
        """Capture the step as a CUDA graph; returns a function that runs it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                logits_SV = self._step()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RunError(f"--static_cache: this step cannot be captured: {one_line(error, 200)}") from error

        def run() -> torch.Tensor:
            graph.replay()
            return logits_SV

        return run


def _compiled(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    from torch._dynamo.exc import TorchDynamoException

    compiled = torch.compile(step)

    def run() -> torch.Tensor:
        try:
            return compiled()
        except TorchDynamoException as error:
            raise RunError(f"--static_cache: this step cannot be compiled: {one_line(error, 200)}") from error

    return run


def take_static_state(model: Any, state: DecodeState, num_slots: int) -> StaticDecodeState:
    """The rows of a state that ``prefill`` made, in the cache that an earlier call gave back, or in a new one.

    The model does not hold the cache meanwhile. So a second user gets its own, and after an error it is not used again.

    Raises:
        RunError: A family of another package has a state of its own.
    """
    if not isinstance(state, CausalDecodeState):
        raise RunError(f"--static_cache: {type(state).__name__} of this model has no cache that voxray knows")
    static: StaticDecodeState | None = vars(model).pop(_ATTRIBUTE, None)
    if static is None or static.num_slots < num_slots:
        static = StaticDecodeState(state, num_slots)
    static.restart(state)
    return static


def give_back(model: Any, static: StaticDecodeState) -> None:
    """Keep a cache for the next rows of the same model."""
    setattr(model, _ATTRIBUTE, static)
