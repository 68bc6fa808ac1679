"""SALMONN: one JSON file ``{"annotation": [{"path", "text", "task", "Q"?}, ...]}``, read element by element."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from voxray.importers.lines import array_objects
from voxray.importers.row import ImportedRow, ImportFault, Record, find_audio, import_records, keep_keys
from voxray.manifest import BadRow
from voxray.tasks import TASKS

CAPTIONS = ("audiocaption", "audiocaption_v2", "aac")


def rows(path: Path, prefix: str = "") -> Iterator[ImportedRow | ImportFault]:
    """Read an annotation file: ``asr``, ``QA`` with its ``Q``, and ``audiocaption`` (also ``audiocaption_v2``).

    They give asr, sqa and aac rows; other tasks are faults.

    A second clip (``expand_wav``) makes a row a fault, since no task here takes two.

    Args:
        prefix: Folder below which the audio stands, whatever a path begins with.
    """
    return import_records(array_objects(path, "annotation"), partial(_convert, prefix), ("testset_id", "id"))


def _convert(prefix: str, record: Record) -> dict[str, Any]:
    task, text = record.text("task"), record.text("text")
    if record.values.get("expand_wav"):
        raise BadRow("several_audios", "expand_wav adds a second clip")
    if "path" not in record.values:
        raise BadRow("missing_key", "no path")
    found = record.values["path"]
    audio_path = find_audio(f"{prefix}/{found}" if prefix else found, record.folder)
    kept = keep_keys(record, {"language": "language", "speaker": "speaker"})
    if task == "asr":
        return {"audio_path": audio_path, "transcript": text} | kept
    if task in ("QA", "sqa"):
        return {"audio_path": audio_path, "question": record.text("Q"), "answer": text} | kept
    if task in CAPTIONS:
        return {"audio_path": audio_path, "caption": text} | kept
    raise BadRow("unknown_task", f"task {task!r} is none of asr, QA, audiocaption (voxray's tasks: {', '.join(TASKS)})")
