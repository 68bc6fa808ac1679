"""NeMo manifests: JSON Lines with ``audio_filepath`` (relative to the manifest), ``offset``, ``duration``, ``text``.

In a tarred set the clips are in ``audio_N.tar`` beside the manifest, where N is the row's ``shard_id``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow
from voxray.core.source import check_number
from voxray.corpora.importers.embedded import TarIndex
from voxray.corpora.importers.lines import json_lines
from voxray.corpora.importers.row import ImportedRow, ImportFault, Record, find_audio, import_records, keep_keys

_OPTIONAL_KEYS = ("source_lang", "target_lang", "taskname", "pnc", "speaker", "gender", "split")


def rows(path: Path) -> Iterator[ImportedRow | ImportFault]:
    """Read a manifest. Translations (``source_lang`` differs from ``target_lang``) are faults."""
    archives: dict[Path, TarIndex] = {}
    return import_records(json_lines(path), lambda record: _convert(record, archives), ("id", "utt_id"))


def _convert(record: Record, archives: dict[Path, TarIndex]) -> dict[str, Any]:
    """The row of a record.

    Args:
        archives: Indices of the tar files that were opened so far.
    """
    source, target = record.text("source_lang", ""), record.text("target_lang", "")
    if source and target and source != target:
        raise BadRow("unknown_task", f"a translation from {source} to {target}, not a transcript")
    if "audio_filepath" not in record.values:
        raise BadRow("missing_key", "no audio_filepath")
    if "shard_id" in record.values:
        archive = record.folder / f"audio_{record.values['shard_id']}.tar"
        clip = archives.setdefault(archive, TarIndex(archive)).find(record.text("audio_filepath"))
    else:
        clip = {"audio_path": find_audio(record.values["audio_filepath"], record.folder)}
    values: dict[str, Any] = {**clip, "transcript": record.text("text")}
    for key, nemo_key in (("start", "offset"), ("duration", "duration")):
        if record.values.get(nemo_key) is not None:
            values[key] = check_number(record.values[nemo_key], nemo_key)
    language = record.text("lang", "") or source
    optional = keep_keys(record, {key: key for key in _OPTIONAL_KEYS})
    return values | ({"language": language} if language else {}) | optional
