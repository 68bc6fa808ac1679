"""Write docs/reference, one page for each job with all flags of its settings, and the tables of docs/trainer.md.

python tools/write_reference.py
"""

import contextlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from voxray.cli import main as voxray  # noqa: E402
from voxray.config import other_names  # noqa: E402
from voxray.core.project_files import job_names  # noqa: E402

FOLDER = ROOT / "docs" / "reference"
TRAINER = ROOT / "docs" / "trainer.md"


def page(job: str) -> str:
    """The page of a job, as ``voxray reference`` prints it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        voxray(["reference", job])
    return printed.getvalue()


def with_tables(text: str) -> str:
    """docs/trainer.md with the tables of ``other_names`` between its marks."""

    def table(match: re.Match[str]) -> str:
        rows = other_names.table_rows(getattr(other_names, match[1]))
        return "\n".join(
            [f"<!-- names: {match[1]} -->", "| name | here | note |", "| --- | --- | --- |", *rows, "<!-- end -->"]
        )

    return re.sub(r"<!-- names: (\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for job in job_names():
        (FOLDER / f"{job}.md").write_text(page(job), encoding="utf-8")
    TRAINER.write_text(with_tables(TRAINER.read_text(encoding="utf-8")), encoding="utf-8")
