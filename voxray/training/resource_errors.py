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
    """Settings that reduce memory and that the others allow, with the cheapest first."""
    is_dora, is_full = settings.tuning == "dora", settings.tuning == "full"
    takes_fsdp = not (settings.quantize == "8bit" or settings.compile or (is_dora and settings.quantize != "none"))
    takes_4bit = not (is_full or settings.zero_stage == 3 or (is_dora and settings.strategy == "fsdp"))
    if settings.batching == "packed":
        advice = [f"lower --pack_tokens (now {settings.pack_tokens})"]
    else:
        advice = [f"lower --per_device_bsz (now {settings.per_device_bsz}) and raise --grad_accum"]
    if not settings.grad_ckpt:
        advice.append("add --grad_ckpt")
    if not (is_full or settings.bf16 or settings.fp16):
        advice.append("replace --fp32 by --bf16" if settings.fp32 else "add --bf16")
    if takes_4bit and settings.quantize == "none":
        advice.append("--quantize 4bit")
    if takes_fsdp and not settings.shards_weights:
        advice.append("take several workers with --strategy fsdp")
    elif is_full and settings.strategy == "fsdp" and not settings.offload_optimizer:
        advice.append("add --offload_optimizer")
    return "; ".join([*advice, f"or lower --max_len (now {settings.max_len})"])
