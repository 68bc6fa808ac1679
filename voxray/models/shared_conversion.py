"""Weights of a base in another type than the stored one, converted once per node and mapped by all of its processes."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from voxray.core.content_hash import combined_hash
from voxray.core.errors import RunError, library_errors
from voxray.core.units import GIB
from voxray.models.hf_files import is_inside, stored_dtype, weight_files
from voxray.models.interface import ModelFamily
from voxray.models.safetensors_files import TYPES, LazyTensor, write_weights

MIN_BYTES = GIB // 2
"""Converted weights of a smaller base are not shared."""
DTYPES = {name: dtype for dtype, name in TYPES.items()}


def load_on_cpu(family: ModelFamily, model_id: str, *, dtype: torch.dtype, num_processes: int) -> Any:
    """Load a base that is not quantized on the CPU, with weights that several processes of a node share.

    Weights that are stored in ``dtype`` are mapped from their files. Others are converted: a process alone does it in
    its own memory. Of several, the first one writes converted files into the folder for temporary files, and all map
    them. The last one that loads them deletes them; their space is free once the processes end.

    Args:
        dtype: Type of the weights and of the computation.
        num_processes: Processes of the job that load this base.
    Raises:
        RunError: Weights are missing or cannot be read.
    """
    device, parent = torch.device("cpu"), Path(tempfile.gettempdir(), f"voxray-{os.getuid()}")
    tensors = _converted(family, model_id, dtype) if num_processes > 1 else []
    if not tensors:
        return family.load_model(model_id, dtype=dtype, device=device)
    parent.mkdir(mode=0o700, exist_ok=True)
    with _shared_folder(parent, model_id, dtype, tensors) as folder:
        model = family.load_model(folder, dtype=dtype, device=device)
    model.config.name_or_path = model.name_or_path = model_id
    return model


def shares_weights(family: ModelFamily, model_id: str, *, dtype: torch.dtype, num_processes: int) -> bool:
    """Whether processes of a node share the weights that ``load_on_cpu`` loads."""
    return stored_dtype(model_id) is dtype or (num_processes > 1 and bool(_converted(family, model_id, dtype)))


def _converted(family: ModelFamily, model_id: str, dtype: torch.dtype) -> list[LazyTensor]:
    """The weights of a base in another type.

    Returns:
        Empty if they have it already, are too small for it, or are in no safetensors files.
    """
    try:
        paths = weight_files(model_id)
    except RunError:
        return []
    in_float32 = family.build_on_meta(model_id, dtype=dtype)._keep_in_fp32_modules_strict or ()
    tensors: list[LazyTensor] = []
    has_other_type = False
    for path in paths:
        with library_errors(f"{path}: cannot be read"), safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            for name in file.keys():  # noqa: SIM118  # not a dict
                part = file.get_slice(name)
                if (stored := DTYPES.get(part.get_dtype())) is None:
                    return []
                is_kept = not stored.is_floating_point or is_inside(name, in_float32)
                new = stored if is_kept else dtype
                has_other_type |= new is not stored
                tensors.append(LazyTensor(name, tuple(part.get_shape()), new, partial(_read, path, name, new)))
    is_large = sum(tensor.num_bytes for tensor in tensors) >= MIN_BYTES
    return tensors if has_other_type and is_large else []


def _read(path: str, name: str, dtype: torch.dtype) -> torch.Tensor:
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        return file.get_tensor(name).to(dtype)


@contextmanager
def _shared_folder(parent: Path, model_id: str, dtype: torch.dtype, tensors: Sequence[LazyTensor]) -> Iterator[str]:
    """Folder of a base with converted weights. It stays while a process is within this block.

    The base itself where the disk has no space for them.
    """
    originals = Path(weight_files(model_id)[0]).parent
    stats = [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(originals.iterdir())]
    folder = parent / f"{combined_hash([str(dtype), *map(str, stats)])[:16]}"
    with open(f"{folder}.users", "w") as users, open(f"{folder}.writer", "w") as writer:
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(writer, fcntl.LOCK_EX)
        is_written = folder.is_dir() or _write(folder, originals, tensors)
        fcntl.flock(writer, fcntl.LOCK_UN)
        try:
            yield str(folder) if is_written else model_id
        finally:
            with suppress(BlockingIOError):  # another process uses the folder, and deletes it
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, originals: Path, tensors: Sequence[LazyTensor]) -> bool:
    """Write the weights, with links to a base's other files; returns False if the disk has no space for them."""
    if shutil.disk_usage(folder.parent).free < 1.05 * sum(tensor.num_bytes for tensor in tensors):
        return False
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    for path in originals.iterdir():
        if not path.name.startswith("model") or "safetensors" not in path.name:
            (unfinished / path.name).symlink_to(path.resolve())
    write_weights(unfinished, tensors)
    unfinished.rename(folder)
    return True
