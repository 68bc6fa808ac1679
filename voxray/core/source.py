"""The manifest line that a row comes from, and the part of the audio file that it covers."""

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from voxray.core.errors import BadRow

Segment = tuple[float, float, str]
"""A part of a transcript: start and end in seconds from the start of the clip, and its text."""


class Source(NamedTuple):
    """A line of a file.

    Attributes:
        file: Path of the file.
        line: Line number, from 1; 0 if there is none.
    """

    file: str
    line: int

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Read ``<file>:<line>``. The file is all before the last colon; it may contain colons itself."""
        file, _, line = text.rpartition(":")
        return cls(file, int(line) if line.isdecimal() else 0)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


def check_number(value: Any, name: str) -> float:
    """Check a time or another number that must not be negative.

    Raises:
        BadRow: It is not a number (``bad_type``), or is negative, infinite or NaN (``bad_segment``).
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow("bad_type", f"{name} is {type(value).__name__}, not a number")
    if not 0 <= value < 1e9:
        raise BadRow("bad_segment", f"{name} is {value}")
    return value


def segment(row: dict[str, Any]) -> tuple[float, float, int]:
    """Read ``start``, ``duration`` and ``channel`` of a row.

    A row covers a part of its file only if it has ``start``. Many manifests give the ``duration`` of the whole file.

    Returns:
        Start in seconds, duration in seconds (0: to the end of the file) and channel (-1: average all channels).
    Raises:
        BadRow: A value is not a number (``bad_type``), or is negative, infinite or NaN (``bad_segment``).
    """
    start, duration, channel = (
        None if row.get(key) is None else check_number(row[key], key) for key in ("start", "duration", "channel")
    )
    if channel is not None and channel != int(channel):
        raise BadRow("bad_segment", f"channel is {channel}")
    return (
        float(start or 0),
        float(duration or 0) if start is not None else 0.0,
        -1 if channel is None else int(channel),
    )


def segments(row: dict[str, Any]) -> tuple[Segment, ...]:
    """Read ``segments`` of a row, a list of {start, end, text}. Values of another shape are ignored.

    Raises:
        BadRow: ``bad_segment``: a time is not a number, a text is not a string, or segments overlap.
    """
    parts = row.get("segments")
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and {"start", "end", "text"} <= set(part) for part in parts
    ):
        return ()
    result: list[Segment] = []
    for part in parts:
        start, end, text = part["start"], part["end"], part["text"]
        numeric = all(isinstance(time, int | float) and not isinstance(time, bool) for time in (start, end))
        if not numeric or not isinstance(text, str):
            raise BadRow("bad_segment", f"segments: needs numbers and a text, not {part}")
        if not (result[-1][1] if result else 0) <= start < end < 1e9:
            raise BadRow("bad_segment", f"segments: {start} to {end} s does not follow the one before it")
        if text.strip():
            result.append((float(start), float(end), text.strip()))
    return tuple(result)


def stretch(parts: Sequence[Segment], factor: float) -> tuple[Segment, ...]:
    """Segments of a clip whose length is multiplied by ``factor``."""
    return tuple((start * factor, end * factor, text) for start, end, text in parts)


def text_matches(parts: Sequence[Segment], text: str) -> bool:
    """Whether the texts of segments say what ``text`` says. Only letters and digits count, regardless of case."""
    return _letters(" ".join(part for *_, part in parts)) == _letters(text)


def _letters(text: str) -> str:
    return "".join(char for char in unicodedata.normalize("NFKC", text).casefold() if char.isalnum())
