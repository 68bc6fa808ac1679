"""Hugging Face data sets on disk: audiofolders (metadata.csv, .jsonl or .parquet with ``file_name``), Parquet files
with a column audio{bytes, path}, and what ``save_to_disk`` writes.

They are read with pyarrow; ``datasets`` is not needed.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow, RunError, one_line
from voxray.core.manifest import MAX_LINE_BYTES, open_regular
from voxray.corpora.importers.embedded import audio_column
from voxray.corpora.importers.lines import csv_records, json_lines
from voxray.corpora.importers.row import (
    ImportedRow,
    ImportFault,
    Record,
    find_audio,
    import_records,
    keep_keys,
    parse_object,
    split_by_path,
)

SAVED = "state.json"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TEXT_COLUMNS = ("transcript", "transcription", "text", "sentence")
FILE_COLUMNS = ("file_name", "audio_file_name")
_OPTIONAL = {
    "language": "language",
    "locale": "language",
    "speaker": "speaker",
    "speaker_id": "speaker",
    "client_id": "speaker",
    "gender": "gender",
    "split": "split",
}
COLUMNS = {
    "audio": FILE_COLUMNS,
    "text": (*TEXT_COLUMNS, "question", "answer"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "language": ("language", "locale"),
    "split": ("split",),
}
"""{kind of column that a user may choose: columns that are read by default, which it replaces}."""
_READ = {"id", "question", "answer", *TEXT_COLUMNS, *FILE_COLUMNS, *_OPTIONAL}
ROWS_PER_BATCH = 64


def rows(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[ImportedRow | ImportFault]:
    """Read a metadata or Parquet file, or a folder: what ``save_to_disk`` wrote, else all its metadata files at any
    depth, else all its Parquet files.

    The transcript is the first existing column of transcript, transcription, text and sentence. A row with ``question``
    and ``answer`` is an sqa row. A row without an id gets its place in the folder: ``test/data-0.arrow:1``.

    Args:
        columns: {kind of ``COLUMNS``: column} that the user chose; "" chooses none.
    Raises:
        RunError: The folder has no such file, or a column is missing. The message lists the columns.
    """
    chosen = {kind: name for kind, name in (columns or {}).items() if name}
    root = path if path.is_dir() else path.parent
    for file in _files(path):
        split = split_by_path(file, root)
        for item in import_records(_records(file, chosen), _convert, root=root):
            if isinstance(item, ImportedRow):
                item = replace(item, values=split | item.values)  # a column of the row comes first
            yield item


def _records(file: Path, chosen: dict[str, str]) -> Iterator[Record | ImportFault]:
    """The records of a file, with the user's columns under the names that are read by default."""
    if file.name == SAVED:
        records = _saved_records(file, chosen)
    elif file.suffix == ".parquet":
        records = _parquet_records(file, chosen)
    else:
        records = csv_records(file) if file.suffix == ".csv" else json_lines(file)
    replaced = {name for kind in chosen for name in COLUMNS[kind]}
    is_first = True
    for record in records:
        if chosen and isinstance(record, Record):
            if is_first and file.suffix not in (".parquet", ".json"):
                _require_columns(file, list(record.values), chosen)
            is_first = False
            others = {name: value for name, value in record.values.items() if name not in replaced}
            own = {COLUMNS[kind][0]: record.values.get(name) for kind, name in chosen.items()}
            record = record._replace(values=others | own)
        yield record


def _require_columns(file: Path, names: list[str], chosen: Mapping[str, str]) -> None:
    for kind, name in chosen.items():
        if name not in names:
            raise RunError(f"--{kind}_column {name}: {file} has the columns {', '.join(names)}")


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    if saved := sorted(path.rglob(SAVED)):
        yield from saved  # one for each split
        return
    metadata = [Path(folder, name) for folder, _, names in os.walk(path) for name in names if name in METADATA]
    files = sorted(metadata) or sorted(path.rglob("*.parquet"))
    if not files:
        raise RunError(f"{path}: no {', '.join(METADATA)} and no Parquet file")
    yield from files


def _values(record: Record, audio: dict[str, Any]) -> dict[str, Any]:
    optional = keep_keys(record, _OPTIONAL)
    if record.values.get("question") is not None and record.values.get("answer") is not None:
        return audio | {"question": record.text("question"), "answer": record.text("answer")} | optional
    column = next((key for key in TEXT_COLUMNS if record.values.get(key) is not None), None)
    if column is None:
        raise BadRow("missing_key", f"none of {', '.join(TEXT_COLUMNS)}")
    return audio | {"transcript": record.text(column)} | optional


def _columns_to_read(file: Path, schema: Any, chosen: Mapping[str, str]) -> tuple[str | None, list[str]]:
    """The column with embedded clips, None if there is none, and the other columns to read.

    Raises:
        RunError: There is no column of clips or of texts, or not the one that the user chose.
    """
    names = list(schema.names)
    _require_columns(file, names, chosen)
    audio = audio_column(schema, chosen.get("audio", ""))
    seen = f"its columns are {', '.join(names)}"
    if audio is None and not {*FILE_COLUMNS, chosen.get("audio")} & set(names):
        raise RunError(f"{file}: neither a column file_name nor an audio column with bytes and path; {seen}")
    if not {*TEXT_COLUMNS, chosen.get("text")} & set(names) and not {"question", "answer"} <= set(names):
        raise RunError(f"{file}: no column {', '.join(TEXT_COLUMNS)}; {seen}; name that of the texts by --text_column")
    return audio, [name for name in names if (name in _READ or name in chosen.values()) and name != audio]


def _saved_records(state: Path, chosen: Mapping[str, str]) -> Iterator[Record | ImportFault]:
    """The records of the Arrow files that a ``state.json`` lists."""
    import pyarrow as pa

    name = str(state.absolute())
    try:
        with open_regular(state) as file:
            content = parse_object(file.read(MAX_LINE_BYTES).decode())
        files = [state.parent / entry["filename"] for entry in content["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield ImportFault(name, 1, "", "damaged_file", f"not what save_to_disk writes: {one_line(error, 200)}")
        return
    for file in files:
        try:
            open_regular(file).close()
            yield from _arrow_records(file, chosen)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield ImportFault(str(file.absolute()), 1, "", "damaged_file", one_line(error, 300))


def _arrow_records(file: Path, chosen: Mapping[str, str]) -> Iterator[Record | ImportFault]:
    """The records of an Arrow file without their audio bytes.

    Raises:
        RunError: A column is missing.
    """
    import pyarrow as pa

    name, number = str(file.absolute()), 0
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
        audio, columns = _columns_to_read(file, stream.schema, chosen)
        for batch in stream:
            batch.validate(full=True)  # else damaged offsets end the process
            texts = batch.select(columns)
            for index in range(batch.num_rows):
                number += 1
                values = _row_values(texts, index)
                if isinstance(values, str):
                    yield ImportFault(name, number, "", "bad_encoding", values)
                    continue
                if audio:
                    clips = batch.column(audio)  # a clip that is null has empty fields in Arrow
                    is_embedded = clips[index].is_valid and clips.field("bytes")[index].is_valid
                    path = clips.field("path")[index].as_py() if clips[index].is_valid else None
                    values |= _clip(number - 1 if is_embedded else None, path, chosen)
                yield Record(name, number, values)


def _parquet_records(file: Path, chosen: Mapping[str, str]) -> Iterator[Record | ImportFault]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        open_regular(file).close()
        with pq.ParquetFile(file) as parquet:
            audio, columns = _columns_to_read(file, parquet.schema_arrow, chosen)
            num_rows = parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        yield ImportFault(str(file.absolute()), 1, "", "damaged_file", one_line(error, 300))
        return
    yield from _records_of_groups(file, audio, columns, num_rows, chosen)


def _records_of_groups(
    file: Path, audio: str | None, columns: list[str], num_rows: int, chosen: Mapping[str, str]
) -> Iterator[Record | ImportFault]:
    """The records without their audio bytes. Whether a row has bytes follows from the file's statistics if possible."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, number = str(file.absolute()), 0
    with pq.ParquetFile(file) as parquet:
        for group in range(parquet.num_row_groups):
            has_bytes = _has_bytes(parquet.metadata.row_group(group), audio)
            audio_columns = [] if audio is None else [f"{audio}.path"] if has_bytes is not None else [audio]
            first = number
            try:
                for batch in parquet.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns + audio_columns):
                    for index in range(batch.num_rows):
                        values = _row_values(batch, index)
                        number += 1
                        if isinstance(values, str):
                            yield ImportFault(name, number, "", "bad_encoding", values)
                            continue
                        clip = (values.pop(audio, None) or {}) if audio else {}
                        embedded = has_bytes if has_bytes is not None else clip.get("bytes") is not None
                        if audio:
                            values |= _clip(number - 1 if embedded else None, clip.get("path"), chosen)
                        yield Record(name, number, values)
            except (pa.ArrowException, OSError) as error:
                message = one_line(error, 300)
                end = first + parquet.metadata.row_group(group).num_rows
                yield from (ImportFault(name, row + 1, "", "damaged_file", message) for row in range(number, end))
                number = end
    if number < num_rows:
        message = f"the file says that it has {num_rows} rows, and holds {number}"
        yield ImportFault(name, number + 1, "", "damaged_file", message)


def _clip(row: int | None, path: str | None, chosen: Mapping[str, str]) -> dict[str, Any]:
    """Values of a record about its clip: its row if the bytes are in the file, its path, and the user's column."""
    return {"audio_in_file": row, "clip_path": path, "clip_column": chosen.get("audio")}


def _row_values(batch: Any, row: int) -> dict[str, Any] | str:
    """One row of a batch, or an error message: Arrow does not check whether text and times in a file are valid."""
    try:
        return {name: batch.column(name)[row].as_py() for name in batch.schema.names}
    except (ValueError, OverflowError) as error:
        return one_line(error)


def _has_bytes(group: Any, audio: str | None) -> bool | None:
    """Whether all (True) or none (False) of a row group's clips are embedded; None if the statistics do not tell."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema == f"{audio}.bytes":
            statistics = column.statistics
            if statistics is None or not statistics.has_null_count:
                return None
            return {0: True, group.num_rows: False}.get(statistics.null_count)
    return None


def _convert(record: Record) -> dict[str, Any]:
    if "audio_in_file" not in record.values:
        name = next((record.values[key] for key in FILE_COLUMNS if record.values.get(key)), None)
        if name is None:
            raise BadRow("missing_key", "no file_name")
        return _values(record, {"audio_path": find_audio(name, record.folder)})
    row, path = record.values["audio_in_file"], record.values["clip_path"]
    if row is not None:
        place = {"file": record.file, "row": row, "column": record.values["clip_column"]}
        place |= {"audio_name": path}  # its suffix decides which decoder is tried first
        present = {key: value for key, value in place.items() if value not in (None, "")}
        return _values(record, {"audio_path": "", "audio_bytes_from": present})
    if not path:
        raise BadRow("audio_missing", "neither bytes nor a path")
    return _values(record, {"audio_path": find_audio(path, record.folder)})
