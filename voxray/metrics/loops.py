"""Detect predictions that repeat the same piece of text over and over."""

import numpy as np

MIN_TIMES = 4
MIN_CHARS = 16
_GRAM = 4


def has_loop(solid: str) -> bool:
    """Whether a piece of text occurs at least 4 times in a row and the run has at least 16 characters.

    The minimum length excludes what people do say ("네 네 네 네", "하하하하"). The last piece may be incomplete.

    Args:
        solid: A normalised text without spaces.
    """
    # Cheap test first. A run of L characters of a piece of p characters has L - 3 - p repeated 4-grams. With p <= L / 4
    # and L >= 16 these are at least 9.
    num_grams = len(solid) - _GRAM + 1
    num_repeated = num_grams - len({solid[start : start + _GRAM] for start in range(num_grams)})
    if num_repeated < MIN_CHARS - _GRAM + 1 - MIN_CHARS // MIN_TIMES:
        return False
    codes = np.frombuffer(solid.encode("utf-32-le", "surrogatepass"), np.uint32)
    return any(
        _longest_run(codes[size:] == codes[:-size]) + size >= max(MIN_CHARS, MIN_TIMES * size)
        for size in range(1, len(codes) // MIN_TIMES + 1)
    )


def _longest_run(equal: np.ndarray) -> int:
    """Length of the longest run of True values."""
    breaks = np.flatnonzero(~equal)
    edges = np.concatenate(([-1], breaks, [len(equal)]))
    return int(np.diff(edges).max()) - 1
