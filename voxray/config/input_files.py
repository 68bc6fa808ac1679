"""Paths that settings name: each file counts once, none may be a Git LFS pointer, and few may be URLs."""

import os
import re
from collections.abc import Collection, Mapping

from pydantic import BaseModel

from voxray.config.flags import flag_metadata
from voxray.core.lfs import POINTER, find_pointer

TEMPORARY_COPY = "a submitted job runs in a temporary copy; make it absolute, or add --storage_path"
"""What is wrong with a relative output path of a submitted job."""


def unique_files(paths: tuple[str, ...]) -> tuple[str, ...]:
    """The first name of every file: ``a/../m.jsonl`` and links are other names of the same file."""
    names: dict[str, str] = {}
    for path in paths:
        names.setdefault(os.path.realpath(path), path)
    return tuple(names.values())


def pointer_errors(inputs: Mapping[str, str | tuple[str, ...]]) -> list[str]:
    """One line for each flag that names a Git LFS pointer, or a folder that holds one.

    Args:
        inputs: {flag: path or paths}.
    """
    named = [(name, path) for name, value in inputs.items() for path in ((value,) if isinstance(value, str) else value)]
    return [f"--{name}: {pointer}: {POINTER}" for name, path in named if path and (pointer := find_pointer(path))]


def url_errors(settings: BaseModel, accepted: Collection[str]) -> list[str]:
    """One line for each path that is a URL although its flag takes paths only.

    Args:
        accepted: Flags that take URLs.
    """
    errors = []
    for name, field in type(settings).model_fields.items():
        takes_paths = flag_metadata(field).path in {"input", "output"} or name in {"model_id", "storage_path"}
        value = getattr(settings, name) if takes_paths and name not in accepted else ""
        for path in (value,) if isinstance(value, str) else value:
            if re.match(r"[a-z0-9+]+://", path):
                errors.append(f"--{name} {path}: takes a path on a file system that every node mounts, not a URL")
    return errors


def require_absolute(path: str) -> str:
    """A path if it is absolute, a URL or empty.

    Raises:
        ValueError: It is relative.
    """
    if path and not path.startswith("/") and "://" not in path:
        raise ValueError("must be absolute")
    return path


def relative_output_errors(settings: BaseModel) -> list[str]:
    """One line for each relative output path of a job that is to be submitted, if it has no ``storage_path``.

    A submitted job runs in a temporary copy of its folder.
    """
    if getattr(settings, "storage_path", ""):
        return []
    return [
        f"--{name} {getattr(settings, name)}: {TEMPORARY_COPY}"
        for name, field in type(settings).model_fields.items()
        if flag_metadata(field).path == "output"
        and name in settings.model_fields_set
        and not re.match(r"$|/|~|[a-z0-9+]+://", getattr(settings, name))
    ]
