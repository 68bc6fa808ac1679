"""The context of a transcription: terms or a sentence that the prompt tells the model beforehand."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from voxray.core.errors import BadRow

CONTEXT = "context"
"""Key of a manifest row: a text, or a list of terms."""
SEPARATOR = ", "


def join_terms(terms: Iterable[str]) -> str:
    """The text that a prompt has for some terms."""
    return SEPARATOR.join(filter(None, (" ".join(term.split()) for term in terms)))


def split_terms(context: str) -> tuple[str, ...]:
    """The terms of a context: its parts between commas, each once. A comma between digits is part of a number."""
    parts = re.split(r"(?<!\d)[,，、]|[,，、](?!\d)", context)
    return tuple(dict.fromkeys(filter(None, map(str.strip, parts))))


def context_of_row(row: Mapping[str, Any]) -> str:
    """The context of a manifest row as a text in one line; "" if it has none.

    Raises:
        BadRow: It is neither a text nor a list of texts.
    """
    context = row.get(CONTEXT)
    if context is None:
        return ""
    terms = [context] if isinstance(context, str) else context
    if not isinstance(terms, list | tuple) or not all(isinstance(term, str) for term in terms):
        raise BadRow("bad_type", f"{CONTEXT} is neither a text nor a list of texts")
    return join_terms(terms)


SHARES: tuple[str, ...] = ("true", "false", "none")
"""A row's own context, terms of other rows that nobody says in its clip, and no context."""


def parse_context_shares(value: Any) -> dict[str, float]:
    """Read ``true=0.5,false=0.25,none=0.25`` into {name: share}; the shares are relative.

    Raises:
        ValueError: A name is unknown or occurs twice, a number is negative or not finite, or no share is positive.
    """
    if isinstance(value, str):
        pairs = [part.strip().partition("=")[::2] for part in value.split(",") if part.strip()]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        raise ValueError("needs name=share pairs, such as true=0.5,false=0.25,none=0.25")
    shares: dict[str, float] = dict.fromkeys(SHARES, 0.0)
    if unknown := [str(name) for name, _ in pairs if name not in shares]:
        raise ValueError(f"unknown name {unknown[0]!r}; known: {', '.join(SHARES)}")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a name is given twice")
    for name, text in pairs:
        try:
            shares[name] = float(text)
        except (TypeError, ValueError):
            raise ValueError(f"{text!r} is not a number") from None
        if not 0 <= shares[name] < float("inf"):
            raise ValueError(f"the share of {name} must be 0 or more, not {text}")
    if not (total := sum(shares.values())):
        raise ValueError("at least one share must be above 0")
    return {name: share / total for name, share in shares.items()}
