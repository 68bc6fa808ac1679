"""Detect repeated ids and keys among millions of rows, with a few dozen bytes of memory per row."""

import hashlib

from voxray.core.source import Source


class UniqueIds:
    """Makes ids unique: the second row with id ``a`` becomes ``a#2``, the third ``a#3``."""

    def __init__(self) -> None:
        self._used: set[int] = set()
        self._counts: dict[int, int] = {}  # only of ids that occurred more than once

    def __call__(self, row_id: str) -> str:
        key, unique_id = _hash60(row_id), row_id
        while _hash60(unique_id) in self._used:
            self._counts[key] = self._counts.get(key, 1) + 1
            unique_id = f"{row_id}#{self._counts[key]}"
        self._used.add(_hash60(unique_id))
        return unique_id


class FirstSeen:
    """Remembers the first row of each key."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}  # hash of the key -> index of its file, times 2**40, plus the line
        self._files: dict[str, int] = {}

    def __call__(self, key: str, source: str) -> str:
        """``<file>:<line>`` of the first row with this key, "" if this one, at ``source``, is the first."""
        first = self._first.get(_hash60(key))
        if first is None:
            file, line = Source.parse(source)
            self._first[_hash60(key)] = (self._files.setdefault(file, len(self._files)) << 40) + line
            return ""
        return f"{list(self._files)[first >> 40]}:{first & (1 << 40) - 1}"


def _hash60(value: str) -> int:
    """60-bit hash. The probability of any collision among ten million texts is 1 in 20,000."""
    return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") >> 4
