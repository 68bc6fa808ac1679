"""Names of the files in a run folder, and its list of checkpoints."""

import re
from pathlib import Path

ERROR_FILE, RESULT_FILE = "error.json", "result.json"
CHECKPOINTS_FOLDER, OPTIMIZER_FILE, PROGRESS_FILE = "checkpoints", "optimizer.pt", "progress.json"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run_dir / CHECKPOINTS_FOLDER / f"step-{step:06d}"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints of a run, oldest first."""
    found = []
    for path in (run_dir / CHECKPOINTS_FOLDER).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / PROGRESS_FILE).is_file():
            found.append((int(match[1]), path))
    return sorted(found)
