"""Notes on disk which row a process is working on, to recognise rows that kill their process.

A crash inside a decoder, or a process that the kernel kills for its memory use, leaves no exception to catch, and Ray
would restart the process again and again with the same row.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class CrashLog:
    """The crash log of one unit of work, opened by one process.

    Args:
        file: File descriptor of the log, opened for reading and appending.
        max_crashes: Number of processes that one row may end before it is skipped.
    Attributes:
        crashed_before: Whether an earlier process ended during this work.
    """

    def __init__(self, file: int, max_crashes: int) -> None:
        # One line per process, with the rows that it started. The last of them is the one that it ended at.
        lines = os.read(file, os.fstat(file).st_size).decode().splitlines()
        self._file, self._max_crashes, self.crashed_before = file, max_crashes, bool(lines)
        self._crashes = Counter(int(line.split()[-1]) for line in lines if line.strip())
        os.write(file, b"\n")

    def start_rows(self, rows: Sequence[int]) -> bool:
        """Note the rows that are worked on next. Of several rows none is noted, because none could be blamed alone.

        Returns:
            False if ``rows`` is a row that has ended ``max_crashes`` processes and should be skipped.
        """
        if len(rows) > 1:
            return True
        if self._crashes[rows[0]] >= self._max_crashes:
            return False
        os.write(self._file, f" {rows[0]}".encode())
        return True


@contextmanager
def open_crash_log(path: Path, max_crashes: int) -> Iterator[CrashLog]:
    """Open a crash log and delete it at the end of the block. A process that is killed meanwhile leaves it behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        yield CrashLog(file, max_crashes)
    finally:
        path.unlink(missing_ok=True)
        os.close(file)
