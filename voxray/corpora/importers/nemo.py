"""NeMo manifests: JSON Lines with ``audio_filepath`` (relative to the manifest), ``offset``, ``duration``, ``text``."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow
from voxray.core.source import check_number
from voxray.corpora.importers.lines import json_lines
from voxray.corpora.importers.row import ImportedRow, ImportFault, Record, find_audio, import_records, keep_keys

_OPTIONAL_KEYS = ("source_lang", "target_lang", "taskname", "pnc", "speaker", "gender", "split")


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read a manifest. Translations (``source_lang`` differs from ``target_lang``) are faults."""
    return import_records(json_lines(path), _convert, ("id", "utt_id"))


def _convert(record: Record) -> dict[str, Any]:
    source, target = record.text("source_lang", ""), record.text("target_lang", "")
    if source and target and source != target:
        raise BadRow("unknown_task", f"a translation from {source} to {target}, not a transcript")
    if "audio_filepath" not in record.values:
        raise BadRow("missing_key", "no audio_filepath")
    values: dict[str, Any] = {
        "audio_path": find_audio(record.values["audio_filepath"], record.folder),
        "transcript": record.text("text"),
    }
    for key, nemo_key in (("start", "offset"), ("duration", "duration")):
        if record.values.get(nemo_key) is not None:
            values[key] = check_number(record.values[nemo_key], nemo_key)
    language = record.text("lang", "") or source
    optional = keep_keys(record, {key: key for key in _OPTIONAL_KEYS})
    return values | ({"language": language} if language else {}) | optional
