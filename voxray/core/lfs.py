"""Git LFS pointers: short text files that stand for large ones in a clone without ``git lfs pull``."""

import os

POINTER_START = b"version https://git-lfs.github.com/spec/"
POINTER = "a Git LFS pointer, not the file itself: run git lfs pull"
MAX_POINTER_BYTES = 1024


def find_pointer(path: str | os.PathLike[str]) -> str:
    """Path of a pointer: the path itself, or the first pointer in that folder; "" if there is none."""
    try:
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                files = sorted(entry.path for entry in entries if entry.is_file())
            return next((file for file in files if _is_pointer(file)), "")
        return os.fspath(path) if _is_pointer(path) else ""
    except OSError:
        return ""


def _is_pointer(path: str | os.PathLike[str]) -> bool:
    if not os.path.isfile(path) or os.path.getsize(path) > MAX_POINTER_BYTES:
        return False
    with open(path, "rb") as file:
        return file.read(len(POINTER_START)) == POINTER_START
