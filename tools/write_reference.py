"""Write docs/reference: one page for each job, with all flags of its settings.

python tools/write_reference.py
"""

import contextlib
import io
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from voxray.cli import main as voxray  # noqa: E402
from voxray.core.project_files import job_names  # noqa: E402

FOLDER = ROOT / "docs" / "reference"


def page(job: str) -> str:
    """The page of a job, as ``voxray reference`` prints it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        voxray(["reference", job])
    return printed.getvalue()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for job in job_names():
        (FOLDER / f"{job}.md").write_text(page(job), encoding="utf-8")
