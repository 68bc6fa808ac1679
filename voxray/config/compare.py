"""Settings of jobs/compare.py."""

from typing import Annotated

from pydantic import Field

from voxray.config.flag_groups import OutputFlags
from voxray.config.parse import CommaStrings, Flag


class CompareSettings(OutputFlags):
    runs: Annotated[CommaStrings, Flag(("run",), path="model"), Field(min_length=1)]
    """Folders of evaluations, comma separated, or as words before any flag (compare.py runs/a runs/b); the others are
    compared with the first. A single one gets its report.html."""
    output_dir: Annotated[str, Flag(("out_dir",), path="output")] = ""
    """Folder of comparison.json and comparison.html; runs/compare if empty. A single run's report.html and errors.json
    go into its own folder if empty."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws behind intervals and p-values."""
    num_resamples: Annotated[int, Flag(("num_bootstrap",)), Field(ge=100, le=1_000_000)] = 10_000
    """Draws behind each interval and p-value."""
    top: Annotated[int, Flag(("top_n",)), Field(ge=1, le=1000)] = 20
    """Confusions of each kind, and most changed rows, that are listed."""
    max_rows: Annotated[int, Field(ge=1, le=100_000)] = 10_000
    """Rows that the HTML page holds: those with most errors, or with the largest changes, if there are more."""
    embed_audio_mib: Annotated[int, Field(ge=0, le=1024)] = 16
    """Put the clips of the page's rows into it if they are this small together, in MiB; else the page links to them."""
