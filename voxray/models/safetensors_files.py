"""Writes the weights of a model tensor by tensor, in several files of limited size, as transformers reads them."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

MAX_FILE_BYTES = 5 * 10**9
TYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""{type: its name in a file}."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written.

    Attributes:
        shape, dtype: What ``compute`` returns.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path, tensors: Iterable[LazyTensor], max_file_bytes: int = MAX_FILE_BYTES, *, stem: str = "model"
) -> None:
    """Write ``model.safetensors``, or several files and ``model.safetensors.index.json``.

    Args:
        stem: Begin of the names of the files.
        max_file_bytes: Largest file; a tensor that is larger has a file of its own.
    """
    groups: list[list[LazyTensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(each.num_bytes for each in groups[-1]) + tensor.num_bytes > max_file_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        _write_file(folder / f"{stem}.safetensors", groups[0])
        return
    names = [f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        _write_file(folder / name, group)
    total = sum(tensor.num_bytes for group in groups for tensor in group)
    files = {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_file(path: Path, tensors: Sequence[LazyTensor]) -> None:
    """Write one file: the length of the header, the header, and the tensors one after the other.

    Source: the format's description in the README of huggingface/safetensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {"dtype": TYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            value = tensor.compute().contiguous()
            assert (tuple(value.shape), value.dtype) == (tensor.shape, tensor.dtype), tensor.name
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
