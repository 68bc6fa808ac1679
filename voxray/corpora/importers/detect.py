"""Detect the format of a corpus (``--format auto``)."""

import itertools
import os
import zlib
from collections import defaultdict
from pathlib import Path

from voxray.core.chat import MESSAGE_KEYS
from voxray.core.errors import BadRow, RunError
from voxray.core.manifest import refuse_old_cache
from voxray.core.tasks import TASKS
from voxray.corpora.importers.clip_index import AUDIO_SUFFIXES
from voxray.corpora.importers.huggingface import FILE_COLUMNS, METADATA, SAVED
from voxray.corpora.importers.lhotse import SHAR_CUTS
from voxray.corpora.importers.librispeech import LISTS
from voxray.corpora.importers.lines import array_objects, open_text, text_lines
from voxray.corpora.importers.row import ImportFault, Record, parse_object
from voxray.corpora.importers.table_file import SUFFIXES, find_table
from voxray.corpora.importers.unknown import describe_unknown

_LINES_TRIED = 100
_FOLDER_ENTRIES_TRIED = 100_000


def detect(path: Path | str) -> str:
    """Detect the name of the format from file names and the first lines.

    Raises:
        RunError: The path does not exist, or matches no format. The message says what was seen and what to do.
    """
    path = Path(path)
    if not path.exists():
        raise RunError(f"{path}: no such file or folder")
    name = _folder_format(path) if path.is_dir() else _file_format(path)
    if name is None:
        raise RunError(f"{path}: {describe_unknown(path)}")
    return name


def _folder_format(path: Path) -> str | None:
    if (path / "wav.scp").is_file():
        return "kaldi"
    if any((path / f"{name}.tsv").is_file() for name in ("train", "dev", "test", "validated")):
        return "commonvoice"
    if next(path.glob("*.trn"), None):
        return "ksponspeech"
    if next(path.glob(SHAR_CUTS), None):
        return "lhotse"
    table = find_table(path)
    if table and table.name in METADATA:
        return _file_format(table)
    entries = ((folder, name) for folder, _, names in os.walk(path) for name in sorted(names))
    suffixes, stems = set(), defaultdict(set)
    for _, name in itertools.islice(entries, _FOLDER_ENTRIES_TRIED):
        if name in METADATA or name == SAVED or name.endswith(".parquet"):
            return "huggingface"
        if name.endswith(LISTS.removeprefix("*")):
            return "librispeech"
        suffixes.add(Path(name).suffix.lower())
        stems[Path(name).stem].add(Path(name).suffix.lower())
    has_pairs = any(".txt" in kinds and kinds & AUDIO_SUFFIXES for kinds in stems.values())
    if table and not has_pairs:
        return "table"
    return "ksponspeech" if ".txt" in suffixes and suffixes & AUDIO_SUFFIXES else None


def _file_format(path: Path) -> str | None:
    suffix = path.suffix.lower()
    by_suffix = {".trn": "ksponspeech", ".tsv": "commonvoice", ".csv": "huggingface", ".parquet": "huggingface"}
    if path.name in ("wav.scp", "segments", "text", "utt2spk") and (path.parent / "wav.scp").is_file():
        return "kaldi"
    if suffix in (".csv", ".tsv"):
        line = next(text_lines(path), None)
        header = "" if isinstance(line, ImportFault | None) else line.text
        names = {name.strip(' "') for name in header.split("\t" if suffix == ".tsv" else ",")}
        is_known = {"client_id", "path"} <= names if suffix == ".tsv" else bool(names & set(FILE_COLUMNS))
        return by_suffix[suffix] if is_known else "table"
    if suffix in by_suffix:
        return by_suffix[suffix]
    if path.name.endswith(LISTS.removeprefix("*")):
        return "librispeech"
    if suffix in SUFFIXES:
        return "table"
    with open_text(path) as file:
        try:
            head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf")
        except (OSError, EOFError, zlib.error):
            return None
    for line in itertools.islice(text_lines(path), _LINES_TRIED):
        if isinstance(line, ImportFault):
            continue
        try:
            row = parse_object(line.text)
        except BadRow:
            continue
        try:
            refuse_old_cache(row)
        except BadRow:
            return "jsonl"  # this importer explains for every row what to do instead
        if name := _format_of_keys(set(row)):
            return name
    if head.lstrip().startswith(b"["):
        first = next(array_objects(path), None)
        return "lhotse" if isinstance(first, Record) and _format_of_keys(set(first.values)) == "lhotse" else None
    return "salmonn" if head.lstrip().startswith(b"{") and b'"annotation"' in head else None


def _format_of_keys(keys: set[str]) -> str | None:
    if "annotation" in keys:
        return "salmonn"
    if "audio_filepath" in keys:
        return "nemo"
    if "supervisions" in keys or {"recording", "duration"} <= keys:
        return "lhotse"
    if keys & set(MESSAGE_KEYS) or any(set(task.keys) <= keys for task in TASKS.values()):
        return "jsonl"
    return "huggingface" if keys & set(FILE_COLUMNS) else None
