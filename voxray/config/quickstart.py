"""Settings of jobs/quickstart.py: those of train_multitask, and those of the evaluations before and after it."""

from typing import Annotated

from pydantic import Field

from voxray.config.flags import Flag
from voxray.config.parse import InputFiles
from voxray.config.train import MultitaskSettings


class QuickstartSettings(MultitaskSettings):
    num_workers: Annotated[int, Flag(("nproc",)), Field(ge=1)] = 2  # type: ignore[assignment]
    """Training processes."""
    overwrite: Annotated[bool, Flag(no_effect="this job always starts afresh")] = False
    """Start afresh."""
    base_val_jsonl: Annotated[InputFiles, Flag(path="input")] = ()
    """Held-out rows in the voices the base model was trained on, reported separately."""
    eval_bsz: Annotated[int, Field(ge=1)] = 16
    """Rows generated together in the evaluations before and after."""
