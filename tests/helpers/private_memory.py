"""Private memory of this process: that which is mapped from no file."""

import threading
from collections.abc import Callable
from pathlib import Path


def private_bytes() -> int:
    """Memory of this process that is mapped from no file."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Anonymous:"))


class Peak:
    """Largest private memory within a block, looked at every 50 ms.

    Args:
        read: Returns the private memory.
    """

    def __init__(self, read: Callable[[], int] = private_bytes) -> None:
        self._read = read

    def __enter__(self) -> "Peak":
        self.num_bytes, self._ends = self._read(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(0.05):
            self.num_bytes = max(self.num_bytes, self._read())
