"""The flag for own tasks."""

from typing import Annotated

from voxray.config.flags import Flag
from voxray.config.parse import Settings


class OwnTaskFlags(Settings):
    tasks_file: Annotated[str, Flag(path="input")] = ""
    """YAML file that defines own tasks beside asr, sqa, tqa, aac and ast: the keys of their rows, prompt, answer and
    metrics (docs/data.md). Its contents are part of the features and of a run."""


class RecordedTaskFlags(Settings):
    tasks_file: Annotated[str, Flag(path="input")] = ""
    """YAML file that defines own tasks (docs/data.md). By default they are those that the run or the evaluation
    recorded, if its folder is on this machine."""
