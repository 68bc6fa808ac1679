"""Where the job scripts, their recipes and the demo's assets are, and how a user starts a job."""

import shlex
import shutil
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
    """The command that starts a job, as the user of this process types it: ``voxray JOB`` or ``python jobs/JOB.py``.

    Where a shell would not find it, it has the full path.
    """
    program = Path(sys.argv[0])
    if PROJECT_FILES != IN_WHEEL and program.name != "voxray" and program.parent.name != "voxray":
        script = Path("jobs") / f"{job}.py"
        words = ["python", str(script if script.is_file() else job_script(job))]
    else:
        words = [str(program.absolute()) if program.name == "voxray" and not shutil.which("voxray") else "voxray", job]
    return shlex.join([*words, *flags])
