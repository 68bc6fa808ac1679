"""Predictions that got stuck: the same piece of text over and over."""

import numpy as np

MIN_TIMES = 4
MIN_CHARS = 16
_GRAM = 4


def has_loop(solid: str) -> bool:
    """Whether some piece of a text stands in it at least 4 times in a row, filling 16 characters or more.

    The length leaves out what people do say ("네 네 네 네", "하하하하"); what fills it up may be a piece cut off.

    Args:
        solid: A normalised text without its spaces.
    """
    # A piece of p characters that fills L of them repeats L - 3 - p grams; with p <= L / 4, and L >= 16, that is 9.
    grams = len(solid) - _GRAM + 1
    if grams - len({solid[at : at + _GRAM] for at in range(grams)}) < MIN_CHARS - _GRAM + 1 - MIN_CHARS // MIN_TIMES:
        return False
    codes = np.frombuffer(solid.encode("utf-32-le", "surrogatepass"), np.uint32)
    return any(
        _longest_run(codes[size:] == codes[:-size]) + size >= max(MIN_CHARS, MIN_TIMES * size)
        for size in range(1, len(codes) // MIN_TIMES + 1)
    )


def _longest_run(equal: np.ndarray) -> int:
    """Length of the longest run of True."""
    breaks = np.flatnonzero(~equal)
    edges = np.concatenate(([-1], breaks, [len(equal)]))
    return int(np.diff(edges).max()) - 1
