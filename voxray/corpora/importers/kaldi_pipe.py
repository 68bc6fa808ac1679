"""Parse pipes of wav.scp without running them, to find the file that a pure conversion reads."""

import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from voxray.audio.decode import AUDIO_SUFFIXES
from voxray.core.errors import BadRow
from voxray.corpora.importers.row import find_audio

PIPE_SUFFIXES = AUDIO_SUFFIXES | {".wv1", ".wv2"}  # sph2pipe also reads these


class _Program(NamedTuple):
    """Command-line words that change a clip's format (rate, container, loudness) but neither speech nor times."""

    flags: str
    options: str  # followed by a value
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
    """Find the one audio file that a pipe converts, and the channel (from 0) that it selects, if any.

    Known programs are cat, sph2pipe, flac, sox and ffmpeg, alone or in sequence. Variables, patterns and substitutions
    in the path are not expanded.

    Raises:
        BadRow: ``kaldi_pipe``: another program, a word that would change the speech or its times, other shell syntax,
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
            word, value = rest.pop(0), rest[0] if rest else ""
            if word in (program.channel_option, "remix") and word and value.isdecimal() and int(value) > 0:
                if word == "remix" and words[0].rpartition("/")[2] != "sox":
                    raise BadRow("kaldi_pipe", f"pipes are not run, and {word!r} is no known word")
                channel = int(rest.pop(0)) - 1
            elif word in program.options.split():
                if value and word != "-i":  # the value of -i is the audio file
                    rest.pop(0)
            elif word not in _STANDARD_STREAMS and word not in program.flags.split():
                files.append(_file(word, folders))
    if len(files) != 1:
        raise BadRow("kaldi_pipe", f"pipes are not run, and this one names {len(files)} audio files instead of one")
    return files[0], channel


def _stages(command: str) -> list[list[str]]:
    """The command-line words of each program in a pipe."""
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
    if Path(word).suffix.lower() in PIPE_SUFFIXES:
        try:
            return find_audio(word, *folders)
        except BadRow as error:
            raise BadRow("kaldi_pipe", f"pipes are not run, and its file is not there: {error.message}") from None
    raise BadRow("kaldi_pipe", f"pipes are not run, and {word!r} in it is no word of a plain conversion"[:300])
