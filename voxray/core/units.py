"""Units of memory and disk."""

MIB = 2**20
GIB = 2**30


def format_bytes(num_bytes: float) -> str:
    """Human-readable size: ``3.25 GiB``, or ``12.5 MiB`` below one GiB."""
    return f"{num_bytes / GIB:.3g} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.3g} MiB"
