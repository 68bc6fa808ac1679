"""Reads the files of an adapter folder, and refuses what would be ignored or would give wrong answers.

PEFT has many kinds of adapters. Only LoRA is supported, without the options of ``UNSUPPORTED``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from voxray.core.content_hash import CHECKSUMS, damaged_files
from voxray.core.errors import RunError, one_line
from voxray.core.lfs import POINTER, find_pointer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLED_WEIGHTS = "adapter_model.bin"
FULL = "full"
LORA = "LORA"
UNSUPPORTED = ("trainable_token_indices", "alora_invocation_tokens", "arrow_config")
"""Options of PEFT's LoRA that change more than the weights of whole layers."""


def weights_file(folder: Path) -> Path:
    """The file of an adapter's weights: ``adapter_model.safetensors``, or PyTorch's file of older versions of PEFT.

    Raises:
        RunError: There is none.
    """
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        if find_pointer(folder / name):
            raise RunError(f"{folder / name}: {POINTER}")
        if (folder / name).is_file():
            return folder / name
    raise RunError(f"{folder / WEIGHTS}: is missing, so this is not a complete adapter")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors to the CPU.

    Raises:
        RunError: They cannot be read, are damaged according to the folder's checksums, or are not finite.
    """
    path = weights_file(folder)
    if damaged_files(folder, [path.name]):
        raise RunError(f"{path}: damaged: its content is not what {CHECKSUMS} says")
    try:
        is_pickled = path.name != WEIGHTS
        tensors = dict(torch.load(path, weights_only=True, map_location="cpu") if is_pickled else load_file(path))
    except Exception as error:  # safetensors and PyTorch raise their own types for a damaged file
        raise RunError(f"{path}: cannot read the adapter: {one_line(error, 200)}") from None
    check_finite(tensors, path)
    return tensors


def check_finite(tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Refuse weights with which a model would answer nonsense.

    Args:
        path: Their file or folder, for the message.
    Raises:
        RunError: A tensor has values that are infinite or not a number.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise RunError(f"{path}: {name} has values that are infinite or not a number; its training has failed")


def tensor_names(folder: Path) -> list[str]:
    """Names of an adapter's tensors.

    Raises:
        RunError: It cannot be read.
    """
    path = weights_file(folder)
    if path.name != WEIGHTS:
        return list(read_tensors(folder))
    try:
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            return list(file.keys())
    except Exception as error:  # safetensors raises its own types for a damaged file
        raise RunError(f"{path}: cannot read the adapter: {one_line(error, 200)}") from None


def is_fully_tuned(adapter: Path | None) -> bool:
    """Whether a folder holds fully tuned weights instead of LoRA; False without one."""
    return adapter is not None and read_adapter_config(adapter).get("tuning") == FULL


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read an adapter's configuration.

    Raises:
        RunError: It cannot be read, is of another kind than LoRA, or has an option of ``UNSUPPORTED``.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise RunError(f"{folder / CONFIG}: cannot read the adapter's configuration")
    kind = config.get("peft_type") or LORA
    if kind != LORA:
        raise RunError(f"{folder}: is an adapter of the kind {kind}; only {LORA} is supported")
    for option in UNSUPPORTED:
        if config.get(option):
            raise RunError(f"{folder}: the adapter was trained with {option}, which is not supported")
    return config
