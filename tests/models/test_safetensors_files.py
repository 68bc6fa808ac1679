"""Files of weights that are written tensor by tensor, read by the library."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from voxray.models.safetensors_files import LazyTensor, write_weights

TENSORS = {
    "b.weight": torch.arange(24, dtype=torch.float32).view(2, 3, 4),
    "a.weight": torch.arange(100).to(torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 3, dtype=torch.float16),
    "mask": torch.tensor([True, False]),
    "transposed": torch.arange(6, dtype=torch.float16).view(2, 3).t(),
}


@pytest.mark.parametrize(("max_file_bytes", "num_files"), [(5 * 10**9, 1), (200, 3), (1, 6)])
def test_the_library_reads_them(tmp_path: Path, max_file_bytes: int, num_files: int) -> None:
    """No file is larger than the limit, unless it holds a single tensor."""
    computed: list[str] = []

    def compute(name: str) -> torch.Tensor:
        computed.append(name)
        return TENSORS[name]

    tensors = [LazyTensor(name, tuple(t.shape), t.dtype, partial(compute, name)) for name, t in TENSORS.items()]
    write_weights(tmp_path, tensors, max_file_bytes)
    assert computed == list(TENSORS), "each is computed once"
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    stored = {name: (tensor, file) for file in files for name, tensor in load_file(file).items()}
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(stored[name][0], tensor) and stored[name][0].dtype == tensor.dtype
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
        assert len(names) == 1 or sum(TENSORS[name].nbytes for name in names) <= max_file_bytes
    if num_files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file.name for name, (_, file) in sorted(stored.items())}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
