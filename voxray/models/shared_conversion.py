"""Weights of a base in another type than the stored one, which the CPU processes of a node map from one file."""

import atexit
import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open

from voxray.core.content_hash import combined_hash
from voxray.core.memory import trim_heap
from voxray.core.units import GIB
from voxray.models.hf_files import model_file, stored_dtype, weight_files
from voxray.models.interface import ModelFamily
from voxray.models.safetensors_files import LazyTensor, write_weights

MIN_BYTES = GIB // 2
"""Converted weights of a smaller base are not shared."""
FILE = "model.safetensors"

_locks_in_use: list[IO[str]] = []
"""Locks that tell the other processes which files this process maps."""


def load_shared(
    family: ModelFamily,
    model_id: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str = "none",
    num_processes: int,
) -> Any:
    """Load a base. On a CPU the processes of a node share the memory of weights that are not quantized.

    PyTorch maps weights that are stored in ``dtype`` from their files, so the processes of a node share them. Others
    are converted. If the job has several processes, the first one of a node writes its converted weights into the
    folder for temporary files. All of them map that file in place of their own weights. They load the base one after
    the other. The file is deleted by the last process, or by a later job if that process was killed.

    Args:
        dtype, device, quantize: See ``ModelFamily.load_model``.
        num_processes: Processes of the job that load this base, on all nodes.
    Raises:
        RunError: Weights are missing or cannot be read.
    """
    load = partial(family.load_model, model_id, dtype=dtype, device=device, quantize=quantize)
    if device.type != "cpu" or quantize != "none" or not shared_bytes(model_id, dtype, num_processes):
        return load()
    with _turn() as folder:
        model = load()
        if folder:
            with suppress(OSError):  # the process then keeps its own weights
                _share(model, folder / _key(model_id, dtype))
    return model


def shared_bytes(model_id: str, dtype: torch.dtype, num_processes: int) -> int:
    """Size of the converted weights that the processes of each node share; 0 if they share none."""
    stored = stored_dtype(model_id)
    if num_processes == 1 or stored in (None, dtype):
        return 0
    assert stored is not None
    in_files = sum(Path(path).stat().st_size for path in weight_files(model_id))
    num_bytes = in_files * dtype.itemsize // stored.itemsize
    has_space = shutil.disk_usage(tempfile.gettempdir()).free > 1.1 * num_bytes
    return num_bytes if num_bytes >= MIN_BYTES and has_space else 0


@contextmanager
def _turn() -> Iterator[Path | None]:
    """Wait for the other processes of the node; yields the folder of all files, or None where none can be used."""
    folder = Path(tempfile.gettempdir(), f"voxray-{platform.node()}-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError
        lock = (folder / "lock").open("a+")
    except OSError:
        yield None
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield None
            return
        yield folder


def _key(model_id: str, dtype: torch.dtype) -> str:
    """Name of a base's converted weights: a hash of their type, and of path, size and time of its files."""
    files = [Path(path).resolve() for path in (model_file(model_id, "config.json"), *weight_files(model_id))]
    stats = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return combined_hash([str(dtype), *stats])[:16]


def _share(model: Any, folder: Path) -> None:
    """Replace a model's weights by those in a folder, which is written if it does not exist."""
    in_use = folder.with_suffix(".lock").open("a+")
    fcntl.flock(in_use, fcntl.LOCK_SH)
    _locks_in_use.append(in_use)
    atexit.register(_delete_if_unused, in_use, folder)
    _delete_unused(folder.parent)
    if not folder.is_dir():
        _write(model, folder)
    with safe_open(folder / FILE, "pt") as file:  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            parameter.data = file.get_tensor(name)
    trim_heap()


def _write(model: Any, folder: Path) -> None:
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    tensors = [
        LazyTensor(name, tuple(parameter.shape), parameter.dtype, parameter.detach)
        for name, parameter in model.named_parameters()
    ]
    try:
        write_weights(unfinished, tensors, max_file_bytes=2**62)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _delete_unused(parent: Path) -> None:
    """Delete what jobs left that were killed."""
    for path in parent.glob("*.lock"):
        with path.open("a+") as lock:
            _delete_if_unused(lock, path.with_suffix(""))


def _delete_if_unused(lock: IO[str], folder: Path) -> None:
    with suppress(OSError):  # another process uses it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in (folder, folder.with_suffix(".unfinished")):
            shutil.rmtree(path, ignore_errors=True)
