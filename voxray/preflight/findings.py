"""What a preflight found: each thing in one line, with how bad it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from voxray.core.errors import RunError, SettingsError, quoted_line

Level = Literal["ok", "warning", "fix", "unchecked"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``ok``; ``warning``: the run will work, but look; ``fix``: the run would fail; ``unchecked``: it could
            not be looked at here.
        about: What was looked at, such as data or memory.
        message: Names the flag or file.
    """

    level: Level
    about: str
    message: str


class Findings:
    """All of them, in order.

    Attributes:
        all: The lines so far.
    """

    def __init__(self) -> None:
        self.all: list[Finding] = []

    def add(self, level: Level, about: str, message: str) -> None:
        finding = Finding(level, about, quoted_line(message))
        if finding not in self.all:
            self.all.append(finding)

    @property
    def to_fix(self) -> list[Finding]:
        return [finding for finding in self.all if finding.level == "fix"]

    @contextmanager
    def caught(self, about: str) -> Iterator[None]:
        """Turn what would end the run into a line, and go on."""
        try:
            yield
        except (RunError, SettingsError) as error:
            self.add("fix", about, str(error))
