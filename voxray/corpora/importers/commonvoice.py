"""Common Voice: TSV tables beside a folder ``clips``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow, RunError
from voxray.corpora.importers.lines import tab_lines
from voxray.corpora.importers.row import ImportedRow, ImportFault, Record, find_audio, import_records, keep_keys

SPLITS = ("train", "dev", "test")


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read one table, or the train, dev and test tables of a folder, else its ``validated.tsv``.

    ``validated.tsv`` repeats the rows of the three. ``invalidated`` and ``other`` are read only if ``path`` names them.

    Raises:
        RunError: The folder has none of these tables.
    """
    tables = [path]
    if path.is_dir():
        tables = [table for split in SPLITS if (table := path / f"{split}.tsv").is_file()]
        if not tables and (path / "validated.tsv").is_file():
            tables = [path / "validated.tsv"]
    if not tables:
        raise RunError(f"{path}: no train.tsv, dev.tsv, test.tsv or validated.tsv")
    for table in tables:
        yield from import_records(_with_ids(table), _convert)


def _with_ids(table: Path) -> Iterator[Record | ImportFault]:
    """Records whose id is the name of the clip without suffix."""
    for record in tab_lines(table):
        if isinstance(record, Record) and record.values.get("path"):
            record.values["id"] = Path(record.values["path"]).stem
        yield record


def _convert(record: Record) -> dict[str, Any]:
    file, table = record.text("path"), Path(record.file)
    clips = (table.parent / "clips", table.parent)
    try:
        audio_path = find_audio(file, *clips)
    except BadRow as error:  # releases before 2020 omit the suffix
        if error.reason != "audio_missing" or not file or Path(file).suffix:
            raise
        audio_path = find_audio(file + ".mp3", *clips)
    values = {"audio_path": audio_path, "transcript": record.text("sentence")}
    if table.stem in SPLITS:
        values["split"] = table.stem
    return values | keep_keys(record, {"client_id": "speaker", "locale": "language", "gender": "gender"})
