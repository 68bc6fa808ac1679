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
"""{our task: its names in annotation files}."""
OTHER_CAPTION_REQUEST = "Please write down what your hear in the audio."  # word for word as in SALMONN's prompts
"""The prompt of ``audiocaption_v2`` rows."""
ID_KEYS = ("testset_id", "id")


def rows(path: Path, prefix: str = "", *, needs_text: bool = True) -> Iterator[ImportedRow | ImportFault]:
    """Read an annotation file: ``asr``, ``QA`` with its ``Q``, and ``audiocaption`` (also ``audiocaption_v2``).

    They give asr, sqa and aac rows. An entry without a task is asr; other tasks are faults. An entry with a second clip
    (``expand_wav``) is a fault, since no task has two.

    Args:
        prefix: Folder that all audio paths are relative to, even absolute ones.
        needs_text: Whether an entry must have a text. Otherwise an entry without text, or with an empty one, becomes a
            row without a reference (``unlabelled``).
    """
    return import_records(array_objects(path, "annotation"), partial(_convert, prefix, needs_text), ID_KEYS)


def tasks_by_id(path: Path) -> Iterator[tuple[str, str]]:
    """(id, task) of every entry of a known task, including entries that give no row."""
    for record in array_objects(path, "annotation"):
        if isinstance(record, Record):
            name = record.values.get("task") or "asr"
            for task, names in TASK_NAMES.items():
                if name in names:
                    yield record.record_id(ID_KEYS), task


def _convert(prefix: str, needs_text: bool, record: Record) -> dict[str, Any]:
    task, text = record.text("task", "asr"), record.text("text", None if needs_text else "")
    if record.values.get("expand_wav"):
        raise BadRow("several_audios", "expand_wav adds a second clip")
    if "path" not in record.values:
        raise BadRow("missing_key", "no path")
    path = record.values["path"]
    audio_path = find_audio(f"{prefix}/{path}" if prefix else path, record.folder)
    optional = keep_keys(record, {"language": "language", "speaker": "speaker"})
    optional |= {} if needs_text or text.strip() else {UNLABELLED: True}
    if task in TASK_NAMES["asr"]:
        return {"audio_path": audio_path, "transcript": text} | optional
    if task in TASK_NAMES["sqa"]:
        return {"audio_path": audio_path, "question": record.text("Q"), "answer": text} | optional
    if task in TASK_NAMES["aac"]:
        question = {"question": OTHER_CAPTION_REQUEST} if task == "audiocaption_v2" else {}
        return {"audio_path": audio_path, "caption": text} | question | optional
    raise BadRow("unknown_task", f"task {task!r} is none of asr, QA, audiocaption (voxray's tasks: {', '.join(TASKS)})")
