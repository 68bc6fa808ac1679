"""Names of the files in a run folder, and its list of checkpoints."""

import re
from pathlib import Path

ERROR_FILE, RESULT_FILE = "error.json", "result.json"
CHECKPOINTS_FOLDER, OPTIMIZER_FILE, PROGRESS_FILE = "checkpoints", "optimizer.pt", "progress.json"
TRAINED_ROWS_FILE, PARAMETERS_FILE, CARD = "trained_rows.json", "parameters.json", "README.md"


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return run_dir / CHECKPOINTS_FOLDER / f"step-{step:06d}"


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints of a run, oldest first."""
    checkpoints = []
    for path in (run_dir / CHECKPOINTS_FOLDER).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / PROGRESS_FILE).is_file():
            checkpoints.append((int(match[1]), path))
    return sorted(checkpoints)


def newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    return max((step for step, _ in list_checkpoints(run_dir)), default=0)
