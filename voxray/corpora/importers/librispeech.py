"""LibriSpeech, Zeroth-Korean and corpora with their layout: ``*.trans.txt`` lists of ``id text`` beside the clips."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow, RunError
from voxray.corpora.importers.clip_index import AUDIO_SUFFIXES
from voxray.corpora.importers.lines import HANGUL, text_lines
from voxray.corpora.importers.row import ImportedRow, ImportFault, split_by_path

LISTS = "*.trans.txt"
SUFFIXES = (".flac", ".wav", *sorted(AUDIO_SUFFIXES - {".flac", ".wav"}))


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read a list, or all lists of a folder at any depth. An id begins with the speaker: ``84-121123-0000``.

    Raises:
        RunError: The folder has no list.
    """
    lists = sorted(path.rglob(LISTS)) if path.is_dir() else [path]
    if not lists:
        raise RunError(f"{path}: no {LISTS} in it")
    for file in lists:
        yield from _list_rows(file, path if path.is_dir() else file.parent)


def _list_rows(file: Path, root: Path) -> Iterator[ImportedRow | ImportFault]:
    name = str(file.absolute())
    for line in text_lines(file, korean_code_page=True):
        if isinstance(line, ImportFault):
            yield line
            continue
        clip_id, *rest = line.text.split(maxsplit=1)
        try:
            values = _values(file.absolute().parent, clip_id, rest[0].strip() if rest else "")
            yield ImportedRow(name, line.number, clip_id, values | split_by_path(file, root))
        except BadRow as error:
            yield ImportFault(name, line.number, clip_id, error.reason, error.message)


def _values(folder: Path, clip_id: str, text: str) -> dict[str, Any]:
    path = next((path for suffix in SUFFIXES if os.path.isfile(path := folder / f"{clip_id}{suffix}")), None)
    if path is None or "/" in clip_id:
        raise BadRow("audio_missing", f"no clip {clip_id[:200]}{SUFFIXES[0]} beside the list")
    speaker = re.split("[-_]", clip_id)[0]
    return {"audio_path": str(path), "transcript": text, "speaker": speaker} | (
        {"language": "ko"} if HANGUL.search(text) else {}
    )
