"""The two ways a job ends badly because of what it was given, and how it says so.

Settings that do not hold are reported by ``config.parse`` (exit status 2). Everything that shows only while running (a
missing manifest, no usable row, a damaged checkpoint) is a ``RunError``: one line on the terminal, exit status 1.
"""

import functools
import sys
from collections.abc import Callable

MAX_MESSAGE_CHARS = 1000


class RunError(Exception):
    """A run cannot go on; the message is the one line the user sees and names the file, line or flag."""


class SettingsError(ValueError):
    """Settings that only fail once the data or model is known; exit status 2. The message names the flag."""


class Stopped(Exception):
    """The run saved itself and ended because it was asked to; status 130, so that `train && evaluate` ends too."""


class BadRow(ValueError):
    """A row that cannot be used.

    Attributes:
        reason: Short code that summaries count by, such as ``bad_json`` or ``audio_missing``.
        message: One line of at most 1,000 characters, whatever values of the row it quotes.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = quoted_line(message)

    def __str__(self) -> str:
        return self.message


def one_line(error: object, max_chars: int | None = None) -> str:
    """Text of an error with every run of white space as one space.

    Args:
        max_chars: Cut the text to this many characters; None keeps all of it.
    """
    return " ".join(str(error).split())[:max_chars]


def quoted_line(message: str) -> str:
    """A message that quotes what was read, made fit for one line of a terminal or ledger."""
    short = message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"
    return "\\n".join(short.splitlines())


def job(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a job's ``main`` so that the user's mistakes end in one line and an exit status, not in a traceback."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except RunError as error:
            sys.exit(_say(error, 1))
        except SettingsError as error:
            sys.exit(_say(error, 2))
        except Stopped as stopped:
            print(stopped, flush=True)
            sys.exit(130)
        except KeyboardInterrupt:
            sys.exit(_say("stopped", 130))

    return wrapped


def _say(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return status
