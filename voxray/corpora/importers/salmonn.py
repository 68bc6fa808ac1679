"""SALMONN: one JSON file ``{"annotation": [{"path", "text", "task", "Q"?}, ...]}``, read element by element."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow
from voxray.core.manifest import UNLABELLED
from voxray.core.tasks import TASKS
from voxray.corpora.importers.lines import array_objects
from voxray.corpora.importers.row import ImportedRow, ImportFault, Record, find_audio, import_records, keep_keys

TASK_NAMES = {"asr": ("asr",), "sqa": ("QA", "sqa"), "aac": ("audiocaption", "audiocaption_v2", "aac")}
"""Our tasks, and what annotation files call them."""
OTHER_CAPTION_REQUEST = "Please write down what your hear in the audio."  # word for word as in SALMONN's prompts
"""What rows of ``audiocaption_v2`` are asked."""
ID_KEYS = ("testset_id", "id")


def rows(path: Path, prefix: str = "", *, needs_text: bool = True) -> Iterator[ImportedRow | ImportFault]:
    """Read an annotation file: ``asr``, ``QA`` with its ``Q``, and ``audiocaption`` (also ``audiocaption_v2``).

    They give asr, sqa and aac rows; an entry that names no task is asr, other tasks are faults.

    A second clip (``expand_wav``) makes a row a fault, since no task here takes two.

    Args:
        prefix: Folder below which the audio stands, whatever a path begins with.
        needs_text: Whether an entry has to have a text. Else one without, or with an empty one, is a row that is only
            to be answered, and says so (``unlabelled``).
    """
    return import_records(array_objects(path, "annotation"), partial(_convert, prefix, needs_text), ID_KEYS)


def tasks_by_id(path: Path) -> Iterator[tuple[str, str]]:
    """(id, task) of every entry of a known task, also of those that give no row."""
    for record in array_objects(path, "annotation"):
        task = record.values.get("task") or "asr" if isinstance(record, Record) else ""
        name = next((ours for ours, theirs in TASK_NAMES.items() if task in theirs), "")
        if name and isinstance(record, Record):
            yield record.record_id(ID_KEYS), name


def _convert(prefix: str, needs_text: bool, record: Record) -> dict[str, Any]:
    task, text = record.text("task", "asr"), record.text("text", None if needs_text else "")
    if record.values.get("expand_wav"):
        raise BadRow("several_audios", "expand_wav adds a second clip")
    if "path" not in record.values:
        raise BadRow("missing_key", "no path")
    found = record.values["path"]
    audio_path = find_audio(f"{prefix}/{found}" if prefix else found, record.folder)
    kept = keep_keys(record, {"language": "language", "speaker": "speaker"})
    kept |= {} if needs_text or text.strip() else {UNLABELLED: True}
    if task in TASK_NAMES["asr"]:
        return {"audio_path": audio_path, "transcript": text} | kept
    if task in TASK_NAMES["sqa"]:
        return {"audio_path": audio_path, "question": record.text("Q"), "answer": text} | kept
    if task in TASK_NAMES["aac"]:
        asked = {"question": OTHER_CAPTION_REQUEST} if task == "audiocaption_v2" else {}
        return {"audio_path": audio_path, "caption": text} | asked | kept
    raise BadRow("unknown_task", f"task {task!r} is none of asr, QA, audiocaption (voxray's tasks: {', '.join(TASKS)})")
