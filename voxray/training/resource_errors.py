"""Explains errors of a run that lacks memory or disk space.

Such errors have many types and can be raised anywhere. They become one line that says which settings to lower.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from voxray.config.train import TrainSettings
from voxray.core.errors import DISK_FULL, RunError, is_out_of_memory


@contextmanager
def explain_resource_errors(settings: TrainSettings) -> Iterator[None]:
    """Turn errors about missing memory or disk space into a ``RunError`` that says what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise RunError(f"out of memory: {memory_advice(settings)}") from error
        raise
    except OSError as error:
        if error.errno in DISK_FULL:
            path = error.filename or settings.output_dir
            raise RunError(f"{path}: {error.strerror}; free some space, then run the same command again") from error
        raise


def memory_advice(settings: TrainSettings) -> str:
    """Settings that reduce memory, with the cheapest first."""
    if settings.batching == "packed":
        advice = [f"lower --pack_tokens (now {settings.pack_tokens})"]
    else:
        advice = [f"lower --per_device_bsz (now {settings.per_device_bsz}) and raise --grad_accum"]
    if not settings.grad_ckpt:
        advice.append("add --grad_ckpt")
    if settings.tuning != "full" and not (settings.bf16 or settings.fp16):
        advice.append("add --bf16")
    if settings.tuning != "full" and settings.quantize == "none":
        advice.append("--quantize 4bit")
    if not settings.shards_weights:
        advice.append("take several workers with --strategy fsdp")
    elif settings.tuning == "full" and settings.strategy == "fsdp" and not settings.offload_optimizer:
        advice.append("add --offload_optimizer")
    return "; ".join([*advice, f"or lower --max_len (now {settings.max_len})"])
