"""The findings of a preflight: one line each, with a severity."""

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
        level: ``ok``. ``warning``: the run works, but the user should look. ``fix``: the run would fail.
            ``unchecked``: it cannot be checked on this machine.
        about: What was checked, such as data or memory.
        message: The finding, with the flag or file.
    """

    level: Level
    about: str
    message: str


class Findings:
    """The findings of a preflight, without repetitions.

    Attributes:
        all: The findings, in order.
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
        """Turn an error that would end the run into a finding, and continue."""
        try:
            yield
        except (RunError, SettingsError) as error:
            self.add("fix", about, str(error))
