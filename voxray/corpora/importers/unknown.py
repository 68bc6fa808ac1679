"""Say what a corpus of unknown format looks like, and what to do."""

import itertools
import json
import os
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow
from voxray.corpora.importers.clip_index import AUDIO_SUFFIXES
from voxray.corpora.importers.lines import open_text
from voxray.corpora.importers.row import parse_object

HEAD_BYTES = 1 << 16
FILES_COUNTED = 100_000
CUTS = "lhotse cut simple -r recordings.jsonl.gz -s supervisions.jsonl.gz cuts.jsonl.gz"
NAME_IT = "if the format is one of those that --format lists, name it"


def describe_unknown(path: Path) -> str:
    """What a file or folder looks like and what makes it readable, in one line."""
    return _describe_folder(path) if path.is_dir() else _describe_file(path)


def _describe_folder(folder: Path) -> str:
    names = (name for _, _, names in os.walk(folder) for name in names)
    suffixes = Counter(Path(name).suffix.lower() for name in itertools.islice(names, FILES_COUNTED))
    counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in suffixes.most_common(4))
    num_clips = sum(count for suffix, count in suffixes.items() if suffix in AUDIO_SUFFIXES)
    if not suffixes:
        return "the folder has no files"
    if num_clips:
        return (
            f"the folder has {num_clips} clips ({counts}) and no transcripts: name their table with --input "
            "and this folder with --audio_dir, or put a .txt file beside each clip"
        )
    return f"no corpus is in the folder ({counts}); {NAME_IT}"


def _describe_file(path: Path) -> str:
    try:
        with open_text(path) as file:
            head = file.read(HEAD_BYTES)
    except (OSError, EOFError, zlib.error):
        return "the file cannot be read, it is damaged or not a file"
    if not head.strip():
        return "the file is empty"
    if head.startswith(b"\xd0\xcf\x11\xe0"):
        return "an Excel file of before 2007 (.xls); save it as .xlsx or CSV"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[:200]:
        return f"UTF-16 or binary data; convert text with: iconv -f UTF-16 -t UTF-8 {path.name} > rows.jsonl"
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").lstrip()
    first = text.splitlines()[0].strip()
    if text.startswith("["):
        return f"a JSON list; one object a line is read: jq -c '.[]' {path.name} > rows.jsonl"
    if _object(first.removesuffix(",")) and first.endswith(","):
        return f"commas behind the objects; remove them: sed 's/,[[:space:]]*$//' {path.name} > rows.jsonl"
    if text.startswith("{"):
        values = _object(first) or _first_object(text)
        if values is None:
            return "the first line is not a whole JSON object"
        if {"recording_id", "text"} <= set(values) or {"sources", "sampling_rate"} <= set(values):
            return f"supervisions or recordings of lhotse, and the cuts made of both are needed: {CUTS}"
        if not values:
            return "an empty JSON object"
        if not _object(first):
            return f"a JSON object over several lines; one object a line is read: jq -c . {path.name} > rows.jsonl"
        keys = ", ".join(map(str, list(values)[:8]))
        return f"objects with the keys {keys}; rename them to audio_path and transcript; {NAME_IT}"
    return f"text that is neither JSON nor a table: {first[:80]!r}; {NAME_IT}"


def _object(line: str) -> dict[str, Any] | None:
    try:
        return parse_object(line)
    except BadRow:
        return None


def _first_object(text: str) -> dict[str, Any] | None:
    """The object at the start of a text, over any number of lines."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
