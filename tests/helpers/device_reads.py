"""Counts the operations of PyTorch, and how often code reads values of a device on the CPU.

On a GPU such a read waits until the GPU has done all that was asked of it. On a CPU the same calls read without
waiting, so they can be counted there.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READING_OPS = frozenset(
    {
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    }
)
INDEXING_OPS = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
READING_METHODS = ("tolist", "cpu", "numpy")


class DeviceReads:
    """Counts within its context.

    Attributes:
        ops: {operator: calls}.
        reads: {operator or method: calls that read values of a device on the CPU}.
        on_cpu: Ids of tensors that are on the CPU on a machine with a GPU too.
    """

    def __init__(self, on_cpu: Iterable[torch.Tensor] = ()) -> None:
        self.ops, self.reads = Counter[str](), Counter[str]()
        self.on_cpu = {id(tensor) for tensor in on_cpu}
        self._is_on = True

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._stack.enter_context(_Methods(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def without_counting(self, function: Any) -> Any:
        """The function, of whose calls nothing is counted."""

        def call(*args: Any, **options: Any) -> Any:
            self._is_on = False
            try:
                return function(*args, **options)
            finally:
                self._is_on = True

        return call

    def see_operator(self, name: str, args: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        self.ops[name] += 1
        by_mask = name in INDEXING_OPS and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        by_counts = name == "repeat_interleave" and isinstance(args[-1], torch.Tensor)
        if name in READING_OPS or by_mask or by_counts:
            self.reads[name] += 1

    def see_method(self, name: str, tensor: torch.Tensor) -> None:
        if self._is_on and id(tensor) not in self.on_cpu:
            self.reads[name] += 1


class _Operators(TorchDispatchMode):
    def __init__(self, counts: DeviceReads) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts.see_operator(func.overloadpacket.__name__, args)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Sees what does not go through an operator: ``tolist``, ``cpu`` and ``numpy``."""

    def __init__(self, counts: DeviceReads) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING_METHODS and args:
            self._counts.see_method(func.__name__, args[0])
        return func(*args, **(kwargs or {}))
