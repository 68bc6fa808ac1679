"""Where a row comes from, and which part of a file it is."""

from typing import Any

from voxray.core.errors import BadRow

Segment = tuple[float, float, str]
"""A part of a transcript: when it begins and ends, in seconds from the beginning of the clip, and its text."""


def segment(row: dict[str, Any]) -> tuple[float, float, int]:
    """``start`` (seconds), ``duration`` (seconds) and ``channel`` of a row.

    Only a row with ``start`` is a part of its file; ``duration`` alone is what many manifests say of a whole one.

    Raises:
        BadRow: Not a number (``bad_type``), or negative, infinite or NaN (``bad_segment``).
    """
    values = []
    for key in ("start", "duration", "channel"):
        value = row.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BadRow("bad_type", f"{key} is {type(value).__name__}, not a number")
        if value is not None and not 0 <= value < 1e9:
            raise BadRow("bad_segment", f"{key} is {value}")
        values.append(value)
    start, duration, channel = values
    if channel is not None and channel != int(channel):
        raise BadRow("bad_segment", f"channel is {channel}")
    return (
        float(start or 0),
        float(duration or 0) if start is not None else 0.0,
        -1 if channel is None else int(channel),
    )


def segments(row: dict[str, Any]) -> tuple[Segment, ...]:
    """``segments`` of a row, a list of {start, end, text} in seconds of the clip; else it is passed over.

    Raises:
        BadRow: ``bad_segment``: times that are no numbers, or do not follow each other; a text that is none.
    """
    found = row.get("segments")
    if not isinstance(found, list) or not all(
        isinstance(part, dict) and {"start", "end", "text"} <= set(part) for part in found
    ):
        return ()
    read: list[Segment] = []
    for part in found:
        start, end, text = part["start"], part["end"], part["text"]
        numbers = all(isinstance(at, int | float) and not isinstance(at, bool) for at in (start, end))
        if not numbers or not isinstance(text, str):
            raise BadRow("bad_segment", f"segments: needs numbers and a text, not {part}")
        if not (read[-1][1] if read else 0) <= start < end < 1e9:
            raise BadRow("bad_segment", f"segments: {start} to {end} s does not follow the one before it")
        if text.strip():
            read.append((float(start), float(end), text.strip()))
    return tuple(read)


def split_source(source: str) -> tuple[str, int]:
    """``<manifest>:<line>`` -> (manifest, line); line 0 if it says none."""
    manifest, _, line = source.rpartition(":")
    return manifest, int(line) if line.isdecimal() else 0
