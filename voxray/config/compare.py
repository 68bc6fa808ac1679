"""Settings of jobs/compare.py."""

from typing import Annotated, ClassVar

from pydantic import Field

from voxray.config.flag_groups import OutputFlags
from voxray.config.flags import Flag
from voxray.config.parse import CommaStrings
from voxray.config.task_flags import RecordedTaskFlags


class CompareSettings(OutputFlags, RecordedTaskFlags):
    task_folders: ClassVar[tuple[str, ...]] = ("runs",)
    runs: Annotated[CommaStrings, Flag(("run",), path="model"), Field(min_length=1)]
    """Evaluation folders, comma separated, or as arguments before any flag (compare.py runs/a runs/b); all others are
    compared with the first. For a single folder the job writes a report.html instead."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output")] = ""
    """Folder for comparison.json and comparison.html; runs/compare if empty. For a single evaluation: folder for
    report.html and errors.json; the evaluation's own folder if empty."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the resampling for confidence intervals and p-values."""
    num_resamples: Annotated[int, Flag(("num_bootstrap",)), Field(ge=100, le=1_000_000)] = 10_000
    """Resamples for each confidence interval and p-value."""
    top: Annotated[int, Flag(("top_n",)), Field(ge=1, le=1000)] = 20
    """Number of confusions of each kind, and of most changed rows, to list."""
    max_rows: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    """Maximum rows in the HTML page; if there are more, those with the most errors or the largest changes."""
    embed_audio_mib: Annotated[int, Field(ge=0, le=1024)] = 16
    """Embed the audio of the page's rows if it is at most this large in total, in MiB; otherwise the page links to the
    files."""
