"""Names of the files in a run folder, and its list of checkpoints."""

import re
from pathlib import Path

ERROR_FILE, RESULT_FILE = "error.json", "result.json"
FOLDER, MOMENTS, PROGRESS = "checkpoints", "optimizer.pt", "progress.json"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / FOLDER / f"step-{step:06d}"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints of a run, oldest first."""
    found = []
    for path in (run_dir / FOLDER).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / PROGRESS).is_file():
            found.append((int(match[1]), path))
    return sorted(found)
