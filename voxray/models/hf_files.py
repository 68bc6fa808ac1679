"""Files of a model in Hugging Face's layout: configuration, weights by module, and models built without weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from voxray.core.errors import RunError, one_line


def unwrap_peft(model: Any) -> Any:
    """A model without the wrapper that PEFT puts around it, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # peft takes long to import


def build_on_meta(make: Callable[[], Any], model_id: str) -> Any:
    """A frozen model whose parameters lie on PyTorch's meta device: see ``ModelFamily.build_on_meta``."""
    with torch.device("meta"):
        model = make()
    model.config.name_or_path = model.name_or_path = model_id
    kept = model._keep_in_fp32_modules_strict or ()  # what from_pretrained leaves in float32
    for name, parameter in model.named_parameters():
        if any(f".{part}." in f".{name}." for part in kept):
            parameter.data = parameter.data.float()
    return model.requires_grad_(False).eval()


def read_config(model_id: str) -> dict[str, Any]:
    """Read a model's config.json from its folder or the hub."""
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(model_id)[0]
    except (OSError, ValueError) as error:
        reason = one_line(error, 200)
        raise RunError(f"--model_id {model_id}: no usable config.json in this folder or on the hub: {reason}") from None


def model_file(model_id: str, name: str) -> str:
    """Path of one of a model's files, from its folder or through the hub's cache."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(model_id, name)
    except (OSError, ValueError) as error:
        raise RunError(f"--model_id {model_id}: {name} is missing: {one_line(error, 200)}") from None
    assert path is not None
    return path


def weights_below(model_id: str, module: str) -> dict[str, torch.Tensor]:
    """Tensors of one module out of a model's safetensors files, as they are stored, without reading the others.

    Args:
        module: Its name, such as ``audio_tower``.
    Returns:
        {name below the module: tensor}, sorted.
    Raises:
        RunError: Files are missing or hold no such module.
    """
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    for path in _weight_files(model_id, module):
        with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            for name in file.keys():  # noqa: SIM118  # not a dict
                _, at, below = f".{name}".partition(f".{module}.")
                if at:
                    found[below] = file.get_tensor(name)
    if not found:
        raise RunError(f"--model_id {model_id}: its weights hold no {module}")
    return dict(sorted(found.items()))


def _weight_files(model_id: str, module: str) -> list[str]:
    """The files that hold a module: those that the index names, or the only one."""
    try:
        index = json.loads(Path(model_file(model_id, "model.safetensors.index.json")).read_text())
    except RunError:
        return [model_file(model_id, "model.safetensors")]
    files = {file for name, file in index["weight_map"].items() if f".{module}." in f".{name}"}
    return [model_file(model_id, file) for file in sorted(files)]
