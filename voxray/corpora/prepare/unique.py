"""What has been met before, of millions of rows: a few dozen bytes are kept of each."""

import hashlib


class UniqueIds:
    """Gives every row an id of its own: the second row called ``a`` becomes ``a#2``, the third ``a#3``."""

    def __init__(self) -> None:
        self._taken: set[int] = set()
        self._counts: dict[int, int] = {}  # of ids met more than once

    def __call__(self, row_id: str) -> str:
        own, found = _bits_of(row_id), row_id
        while _bits_of(found) in self._taken:
            self._counts[own] = self._counts.get(own, 1) + 1
            found = f"{row_id}#{self._counts[own]}"
        self._taken.add(_bits_of(found))
        return found


class FirstSeen:
    """Where each key was met first."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}  # hash of the key -> number of its file, times 2**40, plus the line
        self._files: dict[str, int] = {}

    def __call__(self, key: str, source: str) -> str:
        """``<file>:<line>`` of the row that had this key before this one at ``source``, "" if none had."""
        file, _, line = source.rpartition(":")
        first = self._first.get(_bits_of(key))
        if first is None:
            self._first[_bits_of(key)] = (self._files.setdefault(file, len(self._files)) << 40) + int(line)
            return ""
        return f"{list(self._files)[first >> 40]}:{first & (1 << 40) - 1}"


def _bits_of(value: str) -> int:
    """60 bits: of ten million texts, two share theirs once in 20,000 times."""
    return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") >> 4
