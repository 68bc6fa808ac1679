"""Which row a process is working on, remembered on disk, so that a row that kills its process is found.

A crash inside a decoder, or the kernel ending a process that took too much memory, leaves no exception to catch, and
Ray would start the process again and again with the same row.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CrashLog:
    """One process at work on some rows.

    Attributes:
        again: Whether an earlier process ended while it worked on them.
        deaths: {number of a row: processes that ended at it}.
    """

    def __init__(self, file: int) -> None:
        # One line per process, with the rows that it began: the last of them is where it ended.
        before = os.read(file, os.fstat(file).st_size).decode().splitlines()
        self._file, self.again = file, bool(before)
        self.deaths = Counter(int(begun.split()[-1]) for begun in before if begun.strip())
        os.write(file, b"\n")

    def begin(self, row: int) -> None:
        """Note the row that is worked on next."""
        os.write(self._file, f" {row}".encode())


@contextmanager
def open_crash_log(mark: Path) -> Iterator[CrashLog]:
    """Keep the mark while the rows are worked on; a process that ends meanwhile leaves it behind."""
    mark.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        yield CrashLog(file)
    finally:
        mark.unlink(missing_ok=True)
        os.close(file)
