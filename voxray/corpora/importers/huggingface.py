"""Hugging Face data sets on disk: audiofolders (metadata.csv, .jsonl or .parquet with ``file_name``), Parquet files
with a column audio{bytes, path}, and what ``save_to_disk`` writes.

They are read with pyarrow; ``datasets`` is not needed.
"""

import os
from collections.abc import Iterator
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
_COLUMNS = {"id", "question", "answer", *TEXT_COLUMNS, *FILE_COLUMNS, *_OPTIONAL}
ROWS_PER_BATCH = 64


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read a metadata or Parquet file, or a folder: what ``save_to_disk`` wrote, else all its metadata files at any
    depth, else all its Parquet files.

    The transcript is the first existing column of transcript, transcription, text and sentence. A row with ``question``
    and ``answer`` is an sqa row.

    Raises:
        RunError: The folder has no such file, or a Parquet file has neither ``file_name`` nor an audio column.
    """
    root = path if path.is_dir() else path.parent
    for file in _files(path):
        split = split_by_path(file, root)
        for item in _rows_of_file(file):
            if isinstance(item, ImportedRow):
                item = replace(item, values=split | item.values)  # a column of the row comes first
            yield item


def _rows_of_file(file: Path) -> Iterator[ImportedRow | ImportFault]:
    if file.name == SAVED:
        yield from _saved_rows(file)
    elif file.suffix == ".parquet":
        yield from _parquet_rows(file)
    else:
        yield from import_records(csv_records(file) if file.suffix == ".csv" else json_lines(file), _from_file)


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


def _from_file(record: Record) -> dict[str, Any]:
    name = next((record.values[key] for key in FILE_COLUMNS if record.values.get(key)), None)
    if name is None:
        raise BadRow("missing_key", "no file_name")
    return _values(record, {"audio_path": find_audio(name, record.folder)})


def _values(record: Record, audio: dict[str, Any]) -> dict[str, Any]:
    optional = keep_keys(record, _OPTIONAL)
    if record.values.get("question") is not None and record.values.get("answer") is not None:
        return audio | {"question": record.text("question"), "answer": record.text("answer")} | optional
    column = next((key for key in TEXT_COLUMNS if record.values.get(key) is not None), None)
    if column is None:
        raise BadRow("missing_key", f"none of {', '.join(TEXT_COLUMNS)}")
    return audio | {"transcript": record.text(column)} | optional


def _parquet_rows(file: Path) -> Iterator[ImportedRow | ImportFault]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        open_regular(file).close()
        with pq.ParquetFile(file) as parquet:
            audio = audio_column(parquet.schema_arrow)
            names = parquet.schema_arrow.names
            if audio is None and not any(name in names for name in FILE_COLUMNS):
                raise RunError(f"{file}: neither a column file_name nor an audio column with bytes and path")
            num_rows = parquet.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        yield ImportFault(str(file.absolute()), 1, "", "damaged_file", one_line(error, 300))
        return
    yield from import_records(_parquet_records(file, audio, num_rows), _from_parquet)


def _saved_rows(state: Path) -> Iterator[ImportedRow | ImportFault]:
    """The rows of the Arrow files that a ``state.json`` lists."""
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
            yield from import_records(_arrow_records(file), _from_parquet)
        except (pa.ArrowException, OSError, ValueError) as error:
            yield ImportFault(str(file.absolute()), 1, "", "damaged_file", one_line(error, 300))


def _arrow_records(file: Path) -> Iterator[Record | ImportFault]:
    """The rows of an Arrow file without their audio bytes.

    Raises:
        RunError: It has no audio column.
    """
    import pyarrow as pa

    name, number = str(file.absolute()), 0
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
        audio = audio_column(stream.schema)
        if audio is None and not any(column in stream.schema.names for column in FILE_COLUMNS):
            raise RunError(f"{file}: neither a column file_name nor an audio column with bytes and path")
        columns = [column for column in stream.schema.names if column in _COLUMNS and column != audio]
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
                    values |= {"audio_in_file": number - 1 if is_embedded else None, "clip_path": path}
                yield Record(name, number, values)


def _parquet_records(file: Path, audio: str | None, num_rows: int) -> Iterator[Record | ImportFault]:
    """The rows without their audio bytes. Whether a row has bytes follows from the file's statistics if possible."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, number = str(file.absolute()), 0
    with pq.ParquetFile(file) as parquet:
        columns = [column for column in parquet.schema_arrow.names if column in _COLUMNS and column != audio]
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
                            values |= {"audio_in_file": number - 1 if embedded else None, "clip_path": clip.get("path")}
                        yield Record(name, number, values)
            except (pa.ArrowException, OSError) as error:
                message = one_line(error, 300)
                end = first + parquet.metadata.row_group(group).num_rows
                yield from (ImportFault(name, row + 1, "", "damaged_file", message) for row in range(number, end))
                number = end
    if number < num_rows:
        message = f"the file says that it has {num_rows} rows, and holds {number}"
        yield ImportFault(name, number + 1, "", "damaged_file", message)


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


def _from_parquet(record: Record) -> dict[str, Any]:
    if "audio_in_file" not in record.values:
        return _from_file(record)
    row, path = record.values["audio_in_file"], record.values["clip_path"]
    if row is not None:
        name = {"audio_name": path} if path else {}  # the suffix decides which decoder is tried first
        return _values(record, {"audio_path": "", "audio_bytes_from": {"file": record.file, "row": row} | name})
    if not path:
        raise BadRow("audio_missing", "neither bytes nor a path")
    return _values(record, {"audio_path": find_audio(path, record.folder)})
