"""Memory of this machine: how much is free, and how processes give theirs back."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMINFO, CGROUPS = (
    Path("/proc/meminfo"),
    (
        (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
        (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
    ),
)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
LARGE_BLOCK_BYTES = 1 << 16


def free_memory_bytes() -> int:
    """Free memory of this machine, or of the container that this process runs in if that is less."""
    return min(_machine_free_bytes(), *_container_free_bytes())


def _machine_free_bytes() -> int:
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _container_free_bytes() -> Iterator[int]:
    yield 2**62  # no limit
    for limit, used in CGROUPS:
        try:
            yield max(0, int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue


def trim_heap() -> None:
    """Return all memory that is free now to the system, once, where the C library is glibc's."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def return_freed_memory() -> None:
    """Make this process return large blocks to the system as soon as they are freed, where the C library is glibc's.

    By default glibc keeps freed blocks of up to 32 MiB, in pieces that later tensors do not fit into. A worker that
    gathers one sharded layer after the other would soon have the memory of all of them. Steps get slower by it: with
    whisper-base on a CPU they take 29 % longer and 42 % less memory. So jobs without sharded weights do not call it.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        library.mallopt(M_TRIM_THRESHOLD, 2 * LARGE_BLOCK_BYTES)
