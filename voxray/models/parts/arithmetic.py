"""The arithmetic of a process: the type that it computes in, and PyTorch's switches."""

import os
from typing import TypeVar

import torch

from voxray.cluster.session import cluster_has_bfloat16
from voxray.config.flag_groups import PRECISIONS
from voxray.config.parse import Settings
from voxray.models.hf_files import checkpoint_dtype

SettingsT = TypeVar("SettingsT", bound=Settings)


def with_default_dtype(
    settings: SettingsT,
    model_id: str,
    *,
    is_fully_tuned: bool = False,
    on_ray: bool = False,
    has_bfloat16: bool | None = None,
) -> SettingsT:
    """The settings with ``bf16`` if the base is stored in bfloat16, the GPUs compute in it, and no type was chosen.

    Full tuning trains in float32, and so its weights answer in float32.

    Args:
        is_fully_tuned: Whether the model's weights were fully tuned.
        on_ray: Whether the job computes on the cluster at RAY_ADDRESS, if that is set.
        has_bfloat16: Whether the GPUs compute in bfloat16; None asks those of the job.
    Raises:
        RunError: The cluster cannot be reached.
    """
    is_full = is_fully_tuned or getattr(settings, "tuning", "") == "full"
    if is_full or has_bfloat16 is False or chooses_type(settings) or checkpoint_dtype(model_id) is not torch.bfloat16:
        return settings
    if has_bfloat16 is None:
        has_bfloat16 = gpus_have_bfloat16(on_ray=on_ray)
    return settings.model_copy(update={"bf16": True}) if has_bfloat16 else settings


def chooses_type(settings: Settings) -> bool:
    """Whether a flag or a settings file says which type to compute in."""
    return any(name in settings.model_fields_set or getattr(settings, name, False) for name in PRECISIONS)


def gpus_have_bfloat16(*, on_ray: bool) -> bool:
    """Whether there are GPUs, and all of them compute in bfloat16.

    Args:
        on_ray: Whether those of the cluster at RAY_ADDRESS count, if that is set, instead of this machine's.
    """
    if on_ray and os.environ.get("RAY_ADDRESS"):
        return cluster_has_bfloat16()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count > 0 and all(torch.cuda.get_device_capability(number)[0] >= 8 for number in range(count))


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
