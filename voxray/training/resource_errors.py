"""Names the two ways in which a machine is too small for a run: memory and disk.

Both come up anywhere, in errors of many types; a run ends with one line that says which settings to lower.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from voxray.config.train import TrainSettings
from voxray.core.errors import RunError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "could not create a primitive")
"""What PyTorch says: its CPU allocator, its CUDA allocator, and cuBLAS and oneDNN when they find no room to work in."""


@contextmanager
def explain_resource_errors(settings: TrainSettings) -> Iterator[None]:
    """Turn lack of memory or of disk into a ``RunError`` that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(f"out of memory: {memory_advice(settings)}") from error
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            where = f"{error.filename}: " if error.filename else f"{settings.output_dir}: "
            raise RunError(f"{where}{error.strerror}; make room, the same command goes on") from error
        raise


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory, of a GPU or of the machine, does not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in NO_MEMORY)


def memory_advice(settings: TrainSettings) -> str:
    """Which settings make a run smaller, those that cost least first."""
    if settings.batching == "packed":
        ways = [f"lower --pack_tokens (now {settings.pack_tokens})"]
    else:
        ways = [f"lower --per_device_bsz (now {settings.per_device_bsz}) and raise --grad_accum"]
    ways += [] if settings.grad_ckpt else ["add --grad_ckpt"]
    ways += [] if settings.bf16 or settings.fp16 or settings.tuning == "full" else ["add --bf16"]
    ways += ["--quantize 4bit"] if settings.quantize == "none" and settings.tuning != "full" else []
    if settings.tuning == "full" and settings.zero_stage < 3:
        ways.append("take several workers with --strategy deepspeed --zero_stage 3")
    return "; ".join([*ways, f"or lower --max_len (now {settings.max_len})"])
