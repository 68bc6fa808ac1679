"""Errors caused by a user's settings or data, and the exit status of a job for each.

``config.parse`` reports invalid settings (exit status 2). Errors that appear only at run time (a missing manifest, no
usable row, a damaged checkpoint) are ``RunError``: one line on the terminal, exit status 1.
"""

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MAX_MESSAGE_CHARS, MAX_VALUE_CHARS = 1000, 200
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "could not create a primitive")
"""Texts in PyTorch's errors: of its CPU allocator, its CUDA allocator, cuBLAS without a workspace, and oneDNN."""


class RunError(Exception):
    """A run cannot continue. The message is the one line that the user sees. It names the file, line or flag."""


class SettingsError(ValueError):
    """Settings that fail only once the data or the model is known. Exit status 2. The message names the flag."""


class Stopped(Exception):
    """A stop was requested, and the run saved its state and ended. Exit status 130, so `train && evaluate` ends too."""


class BadRow(ValueError):
    """A row that cannot be used.

    Attributes:
        reason: Short code such as ``bad_json`` or ``audio_missing``. Summaries count rows by it.
        message: One line of at most 1,000 characters, even if it quotes values of the row.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = quoted_line(message)

    def __str__(self) -> str:
        return self.message


def one_line(error: object, max_chars: int | None = None) -> str:
    """Text of an error on one line: every run of white space becomes one space.

    Args:
        max_chars: Cut the text to this many characters. None keeps all of it.
    """
    return " ".join(str(error).split())[:max_chars]


def quoted_line(message: str) -> str:
    """Cut a message that quotes a file's content to 1,000 characters, and escape its line ends."""
    short = message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"
    return "\\n".join(short.splitlines())


def is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the GPU or of the machine was exhausted."""
    is_torchs = type(error).__name__ == "OutOfMemoryError"  # torch is not imported here, since that takes seconds
    return is_torchs or isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY)


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn whatever a library raises about a user's file into a ``RunError``; lack of memory stays as it is.

    Args:
        what: Beginning of the message: the flag or file, and what cannot be done with it.
    """
    try:
        yield
    except (RunError, SettingsError, BadRow):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RunError(f"{what}: {one_line(error, 300) or type(error).__name__}") from error


def print_page(text: str) -> None:
    """Print a long text, also into a pipe that its reader closes early, such as ``head``."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python writes the rest at its end, and would print a traceback there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def job(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a job's ``main``: a user's mistake ends in a one-line message and an exit status, not in a traceback."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except RunError as error:
            sys.exit(_print_error(error, 1))
        except SettingsError as error:
            sys.exit(_print_error(error, 2))
        except Stopped as stopped:
            print(stopped, flush=True)
            sys.exit(130)
        except KeyboardInterrupt:
            sys.exit(_print_error("stopped", 130))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            advice = "take smaller batches, --bf16 or --quantize as far as the job has them, or a larger machine"
            sys.exit(_print_error(f"out of memory: {advice}; {one_line(error, 200)}", 1))
        except OSError as error:
            if error.filename is None and error.errno not in DISK_FULL:
                raise
            advice = "; free some space" if error.errno in DISK_FULL else ""
            path = one_line(error.filename or "the disk", MAX_VALUE_CHARS)
            sys.exit(_print_error(f"{path}: {error.strerror}{advice}", 1))

    return wrapped


def _print_error(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr, flush=True)
    return status


def is_utf8_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
