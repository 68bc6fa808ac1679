"""Units of memory, disk and time."""

MIB = 2**20
GIB = 2**30


def format_bytes(num_bytes: float) -> str:
    """Human-readable size: ``3.25 GiB``, or ``12.5 MiB`` below one GiB."""
    return f"{num_bytes / GIB:.3g} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.3g} MiB"


def format_duration(seconds: float) -> str:
    """Human-readable amount of audio: ``3.25 h``, ``12.5 min`` below one hour, ``8.2 s`` below one minute."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.2f} {unit}" if unit == "h" else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
