"""Flags for own tasks and for the context of transcriptions."""

from typing import Annotated

from pydantic import model_validator

from voxray.config.flags import Flag
from voxray.config.parse import Settings, convert
from voxray.core.context import parse_context_shares


class OwnTaskFlags(Settings):
    tasks_file: Annotated[str, Flag(path="input")] = ""
    """YAML file that defines own tasks beside the built-in ones: the keys of their rows, prompt, answer and metrics
    (docs/data.md). Its contents are part of the features and of a run."""


class RecordedTaskFlags(Settings):
    tasks_file: Annotated[str, Flag(path="input")] = ""
    """YAML file that defines own tasks (docs/data.md). By default they are those that the run or the evaluation
    recorded, if its folder is on this machine."""


class ContextShareFlags(Settings):
    context_shares: Annotated[dict[str, float], convert(parse_context_shares)] = parse_context_shares(
        "true=0.5,false=0.25,none=0.25"
    )
    """How often a transcription row with a context is trained with its own one (true), with terms from other rows that
    its transcript does not have (false), and without any (none). The last two teach the model not to write terms that
    nobody says. Validation uses the rows' own contexts."""


class ContextFlags(Settings):
    context: Annotated[str, Flag(path="input")] = ""
    """Text file of terms, one per line, such as drugs and names. The prompts of all transcriptions have them, instead
    of the contexts of their rows. The metric context_leak is the share of the terms that nobody says and the answers
    have nevertheless."""
    no_context: bool = False
    """Leave the contexts of all rows out of the prompts."""

    @model_validator(mode="after")
    def _one_context(self) -> "ContextFlags":
        if self.context and self.no_context:
            raise ValueError("--context and --no_context: give one of them")
        return self
