"""Where the job scripts, their recipes and the demo's assets are, and how a user starts a job."""

import shlex
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
IN_WHEEL = PACKAGE / "files"
"""setup.py copies the files of the checkout that jobs read to this folder of the wheel."""
PROJECT_FILES = IN_WHEEL if IN_WHEEL.is_dir() else PACKAGE.parent
"""Folder with ``jobs/``, ``jobs/configs/`` and ``tests/assets/``: the checkout, or its copy in an installed package."""


def job_script(job: str) -> Path:
    """The script of a job, such as ``train_text``."""
    return PROJECT_FILES / "jobs" / f"{job}.py"


def job_names() -> list[str]:
    """Names of all jobs, sorted."""
    return sorted(path.stem for path in (PROJECT_FILES / "jobs").glob("*.py"))


def typed_command(job: str, *flags: str) -> str:
    """The command that starts a job, as the user of this process types it: ``voxray JOB`` or ``python jobs/JOB.py``."""
    program = Path(sys.argv[0])
    by_script = PROJECT_FILES != IN_WHEEL and program.name != "voxray" and program.parent.name != "voxray"
    return " ".join([f"python jobs/{job}.py" if by_script else f"voxray {job}", *map(shlex.quote, flags)])
