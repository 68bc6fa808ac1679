"""Models in Hugging Face's layout: configuration, files, weights of one module, and models built without weights."""

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from voxray.core.content_hash import folder_hash
from voxray.core.errors import RunError, library_errors, one_line
from voxray.core.lfs import POINTER, find_pointer

OTHER_LAYOUTS = {
    ("model.bin", "vocabulary.*"): ("a CTranslate2 model (as faster-whisper uses)", "ct2"),
    ("params.json", "consolidated*"): ("a model in Mistral's own layout (params.json, consolidated weights)", "vllm"),
}
"""{patterns of files in a folder: what the folder is, and the engine that reads it}."""


LOCK_FILE_NAME = "prefetch.lock.json"
"""File beside a base that ``prefetch`` fetched, which says from where."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def hub_id(model_id: str) -> str:
    """Id on the hub of a base, "" if it is not known.

    Args:
        model_id: A hub id, or a folder. Of a folder the id is known if it is a snapshot in a hub cache, or if prefetch
            fetched it.
    """
    if match := re.search(r"/models--([^/]+)/snapshots/[^/]", f"/{model_id}"):
        return match[1].replace("--", "/")
    folder = Path(model_id)
    if not folder.is_dir():
        return model_id if HUB_ID.fullmatch(model_id) else ""
    try:
        step = json.loads((folder.parent / LOCK_FILE_NAME).read_text(encoding="utf-8"))["steps"]["model"]
        return hub_id(str(step["asked"]["model_id"])) if folder.name == "model" else ""
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""


def unwrap_peft(model: Any) -> Any:
    """Return the base inside a PEFT wrapper, or the model itself if there is no wrapper."""
    # not isinstance, because importing peft is slow
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter belongs to one of the modules, whose names may contain dots."""
    return any(f".{module}." in f".{name}." for module in modules)


def build_on_meta(build: Callable[[], Any], model_id: str) -> Any:
    """Build a frozen model on PyTorch's meta device (see ``ModelFamily.build_on_meta``)."""
    with library_errors(f"--model_id {model_id}: its configuration cannot be used"), torch.device("meta"):
        model = build()
    model.config.name_or_path = model.name_or_path = model_id
    float32_modules = model._keep_in_fp32_modules_strict or ()  # from_pretrained leaves them in float32 too
    for name, parameter in model.named_parameters():
        if is_inside(name, float32_modules):
            parameter.data = parameter.data.float()
    return model.requires_grad_(False).eval()


def library_class(name: str) -> Any:
    """A class of transformers by its name."""
    import transformers

    return getattr(transformers, name)


def check_size(model_class: Any, model_id: str) -> None:
    """Check that the weight files in a folder can hold the weights that its config.json describes.

    Without the check, the library would first allocate the weights that are missing. Files on the hub are not checked,
    because they may not be here yet.

    Raises:
        RunError: The files are too small even for 4 bits per weight.
    """
    folder = Path(model_id)
    files = [*folder.glob("model*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
    if not files:
        return refuse_other_layout(model_id)
    num_bytes = sum(path.stat().st_size for path in files)
    config = model_class.config_class.from_pretrained(model_id)
    model = build_on_meta(lambda: model_class._from_config(config), model_id)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    if num_bytes < num_weights // 2:
        sizes = f"config.json describes {num_weights:,} weights, and its weight files have {num_bytes:,} bytes"
        raise RunError(f"--model_id {model_id}: {sizes}")


def stored_dtype(model_id: str) -> torch.dtype | None:
    """Type of the floating-point weights in a model's safetensors files; None if they have several, or no such file."""
    from safetensors import safe_open

    try:
        paths = weight_files(model_id)
    except RunError:
        return None
    dtypes: set[str] = set()
    for path in paths:
        with library_errors(f"{path}: cannot be read"), safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # not a dict
    known = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return known[dtypes.pop()] if len(dtypes) == 1 and dtypes <= known.keys() else None


def checkpoint_dtype(model_id: str) -> torch.dtype | None:
    """Type of a model's weights by its config.json, or else by its files; None if they have several.

    Raises:
        RunError: The model has no config.json that can be read.
    """
    config = read_config(model_id)
    name = config.get("dtype") or config.get("torch_dtype")
    known = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    return known.get(str(name)) if name else stored_dtype(model_id)


def read_config(model_id: str) -> dict[str, Any]:
    """Read a model's config.json from its folder or the hub.

    Raises:
        RunError: There is none that can be read.
    """
    from transformers import PreTrainedConfig

    if pointer := find_pointer(model_id):
        raise RunError(f"--model_id {pointer}: {POINTER}")
    if "model_type" not in _stored_config(model_id):  # exports have the configuration of transformers as well
        refuse_other_layout(model_id)
    is_path = model_id.startswith(("/", "./", "../", "~")) or model_id.count("/") > 1
    if is_path and not Path(model_id).is_dir():
        raise RunError(f"--model_id {model_id}: no such folder")
    with library_errors(f"--model_id {model_id}: no usable config.json in this folder or on the hub"):
        return dict(PreTrainedConfig.get_config_dict(model_id)[0])


def refuse_other_layout(model_id: str) -> None:
    """Raise a RunError if a folder holds the weights of a model in another layout than that of transformers."""
    for files, (layout, engine) in OTHER_LAYOUTS.items():
        if all(any(Path(model_id).glob(file)) for file in files) and not any(Path(model_id).glob("model*.safetensors")):
            advice = f"voxray reads models in the layout of transformers; exports of its own with --engine {engine}"
            raise RunError(f"--model_id {model_id}: {layout}; {advice}")


def _stored_config(model_id: str) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        config = json.loads((Path(model_id) / "config.json").read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    return {}


def model_file(model_id: str, name: str) -> str:
    """Path of one of a model's files in its folder or the hub's cache.

    Raises:
        RunError: The model has no such file.
    """
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(model_id, name)
    except (OSError, ValueError) as error:
        raise RunError(f"--model_id {model_id}: {name} is missing: {one_line(error, 200)}") from None
    assert path is not None
    return path


def base_hash(model_id: str) -> str:
    """Hash of a base: of the contents of all files in its folder, or the commit of the hub's snapshot.

    Raises:
        RunError: The base has no config.json, or a file cannot be read.
    """
    path = Path(model_id)
    if not path.is_dir():
        return Path(model_file(model_id, "config.json")).parent.name
    try:
        return folder_hash(path)
    except OSError as error:
        raise RunError(f"--model_id {model_id}: cannot read {error.filename}: {error.strerror}") from None


def module_weights(model_id: str, module: str) -> dict[str, torch.Tensor]:
    """Read one module's tensors from a model's safetensors files, in their stored dtype.

    Args:
        module: Name of the module, such as ``audio_tower``.
    Returns:
        {name within the module: tensor}, sorted by name.
    Raises:
        RunError: Files are missing or do not contain the module.
    """
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(model_id, module):
        with library_errors(f"{path}: cannot be read"), safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
            for name in file.keys():  # noqa: SIM118  # not a dict
                _, separator, name_in_module = f".{name}".partition(f".{module}.")
                if separator:
                    tensors[name_in_module] = file.get_tensor(name)
    if not tensors:
        raise RunError(f"--model_id {model_id}: its weights hold no {module}")
    return dict(sorted(tensors.items()))


def weight_files(model_id: str, module: str = "") -> list[str]:
    """Paths of a model's safetensors files, or of those with a module: those in the index, or the single file.

    Raises:
        RunError: A file is missing, or the index is damaged.
    """
    try:
        index = json.loads(Path(model_file(model_id, "model.safetensors.index.json")).read_text())
    except RunError:
        return [model_file(model_id, "model.safetensors")]
    with library_errors(f"--model_id {model_id}: model.safetensors.index.json is damaged"):
        files = {file for name, file in index["weight_map"].items() if not module or is_inside(name, [module])}
    return [model_file(model_id, file) for file in sorted(files)]
