"""Files that settings name: each counts once, and none may be a Git LFS pointer."""

import os
from collections.abc import Mapping

from voxray.core.lfs import POINTER, find_pointer


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
