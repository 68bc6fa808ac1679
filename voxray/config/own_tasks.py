"""The tasks of a user's file: ``--tasks_file``, or what the folder of a run or an evaluation recorded."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxray.core.tasks import parse_own_tasks, use_own_tasks
from voxray.core.yaml_file import read_yaml

RECORD = "own_tasks.json"
"""File in the folders of runs and evaluations with the definitions of their own tasks, if they have any."""
MAX_LEVELS = 3
"""A run folder is at most three levels above a checkpoint's adapter."""


def load_own_tasks(values: Mapping[str, Any], folder_flags: Sequence[str] = ()) -> list[str]:
    """Make the own tasks of a job known, before settings that name tasks are checked.

    Args:
        values: Unchecked settings by name. Without ``tasks_file`` the job has the tasks that its folders recorded, or
            else none.
        folder_flags: Settings that name folders of runs and evaluations.
    Returns:
        One line for each mistake.
    """
    use_own_tasks({})
    if path := values.get("tasks_file"):
        if not isinstance(path, str):
            return []  # the field's own check reports it
        try:
            use_own_tasks(parse_own_tasks(read_yaml(Path(path).expanduser())))
        except ValueError as error:
            text = str(error).encode("utf-8", "backslashreplace").decode()  # names may hold half of a surrogate pair
            return [f"--tasks_file {path}: {line}" for line in text.split("\n")]
        return []
    records = [(name, folder) for name in folder_flags for folder in _folders(values.get(name))]
    try:
        recorded = [(name, folder, tasks) for name, folder in records if (tasks := recorded_tasks(Path(folder)))]
        for name, folder, tasks in recorded:
            if tasks != recorded[0][2]:
                other = recorded[0][1]
                return [f"--{name}: {other} and {folder} define their tasks differently; name a file in --tasks_file"]
        use_own_tasks(parse_own_tasks(recorded[0][2]) if recorded else {})
    except ValueError as error:
        return [f"{str(error).partition(chr(10))[0]}; name the file of its tasks in --tasks_file"]
    return []


def _folders(value: Any) -> list[str]:
    """Folders of a flag that takes one, or several separated by commas; URLs are not read here."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
    return [str(part).strip() for part in parts if str(part).strip() and "://" not in str(part)]


def recorded_tasks(folder: Path) -> dict[str, Any]:
    """Definitions that a run or an evaluation recorded, in ``folder`` or a folder above it; {} if it has none.

    Raises:
        ValueError: The record is damaged.
    """
    folder = folder.expanduser().absolute()
    for level in (folder, *folder.parents[:MAX_LEVELS]):
        path = level / RECORD
        try:
            if path.is_file():
                return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise ValueError(f"{path}: damaged") from None
        if (level / "settings.json").is_file():
            break
    return {}
