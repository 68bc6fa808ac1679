"""PyTorch's switches for the arithmetic of a process."""

import os

import torch


def set_tf32(enabled: bool) -> None:
    """Allow or forbid TF32 in float32 matrix products and in cuDNN's convolutions, which allow it by default."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def set_deterministic(enabled: bool) -> None:
    """Make PyTorch use kernels on GPUs whose results are equal in every run, or raise an error where it has none.

    Call it before the first computation on the GPU. On CPUs the same seed gives the same results anyway.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if enabled:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.benchmark = False
