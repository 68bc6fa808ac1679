"""Pipes of wav.scp are read, never run: what a pipe that only converts would do is known from its words."""

import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from voxray.core.errors import BadRow
from voxray.corpora.importers.row import find_audio

AUDIO_SUFFIXES = frozenset(
    {".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".sph", ".wv1", ".wv2", ".aif", ".aiff", ".au", ".snd", ".caf"}
    | {".m4a", ".aac", ".mp4", ".webm", ".wma", ".mov", ".mka", ".w64", ".pcm", ".3gp"}
)


class _Program(NamedTuple):
    """The words that change a clip's form (rate, container, loudness) but neither its words nor its times."""

    plain: str
    with_value: str
    channel_option: str = ""


_PROGRAMS = {
    "cat": _Program("", ""),
    "sph2pipe": _Program("-p -u -a", "-f", "-c"),
    "flac": _Program("-d -c -s -f -F -dc -cd -ds -sd -cs -sc -dcs -cds -csd -sdc -scd --decode --stdout --silent", ""),
    "sox": _Program("-G -D -R -S -q -V -V0 -V1 -V2 -V3 --norm norm dither", "-t -r -b -e -c -v rate vol gain channels"),
    "ffmpeg": _Program(
        "-nostdin -hide_banner -nostats -y -vn", "-i -f -ar -ac -acodec -c:a -codec:a -loglevel -v -ab -b:a -sample_fmt"
    ),
}
_STANDARD_STREAMS = {"-", "pipe:", "pipe:0", "pipe:1", "/dev/stdin", "/dev/stdout"}


def pipe_file(command: str, *folders: Path) -> tuple[str, int | None]:
    """Find the one audio file that a pipe converts, and the channel it selects (from 0), if it does.

    Known are cat, sph2pipe, flac, sox and ffmpeg, alone or one after the other. The path is taken as written: no
    variable, pattern or substitution is expanded.

    Raises:
        BadRow: ``kaldi_pipe``: another program, a word that would change what is heard or when, any other shell syntax,
            or not exactly one existing audio file.
    """
    files: list[str] = []
    channel: int | None = None
    for words in _stages(command):
        program = _PROGRAMS.get(os.path.basename(words[0]))
        if program is None:
            raise BadRow("kaldi_pipe", f"pipes are not run, and {words[0]!r} is no known converter"[:300])
        rest = words[1:]
        while rest:
            word, following = rest.pop(0), rest[0] if rest else ""
            if word in (program.channel_option, "remix") and word and following.isdecimal() and int(following) > 0:
                if word == "remix" and words[0].rpartition("/")[2] != "sox":
                    raise BadRow("kaldi_pipe", f"pipes are not run, and {word!r} is no known word")
                channel = int(rest.pop(0)) - 1
            elif word in program.with_value.split():
                if word == "-i":
                    continue
                if following:
                    rest.pop(0)
            elif word not in _STANDARD_STREAMS and word not in program.plain.split():
                files.append(_file(word, folders))
    if len(files) != 1:
        raise BadRow("kaldi_pipe", f"pipes are not run, and this one names {len(files)} audio files instead of one")
    return files[0], channel


def _stages(command: str) -> list[list[str]]:
    """The words of each program in a pipe."""
    command = re.sub(r"\s2>\s*/dev/null(?=\s*\|)", " ", command.strip())
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";&<>()|")
    lexer.whitespace_split, lexer.commenters = True, ""
    stages: list[list[str]] = [[]]
    try:
        for word in lexer:
            if word == "|":
                stages.append([])
            elif word and set(word) <= set(";&<>()|"):
                raise BadRow("kaldi_pipe", f"pipes are not run, and {word!r} in it is more than a conversion")
            else:
                stages[-1].append(word)
    except ValueError as error:
        raise BadRow("kaldi_pipe", f"pipes are not run, and this one cannot be read: {error}") from None
    if stages.pop() or not stages or not all(stages):
        raise BadRow("kaldi_pipe", "pipes are not run, and one of its programs has no words")
    return stages


def _file(word: str, folders: tuple[Path, ...]) -> str:
    if Path(word).suffix.lower() in AUDIO_SUFFIXES:
        try:
            return find_audio(word, *folders)
        except BadRow as error:
            raise BadRow("kaldi_pipe", f"pipes are not run, and its file is not there: {error.message}") from None
    raise BadRow("kaldi_pipe", f"pipes are not run, and {word!r} in it is no word of a plain conversion"[:300])
