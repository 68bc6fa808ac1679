"""Answers as the CSV files of SALMONN's evaluators: ``testset_id,text``, sorted, each id once."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from voxray.core.manifest import chunks, is_id
from voxray.core.storage import write_atomically
from voxray.core.tasks import detect_task
from voxray.corpora.importers import salmonn
from voxray.evaluation.predictions import read_predictions
from voxray.models.salmonn.compat.annotations import is_annotation

NO_TEXT = " "
"""Written for an empty text: the evaluators' validator reads the file with pandas, to which an empty field is NaN."""
LINES_PER_CHUNK = 256


def write_submission(output_dir: Path, mode: str, paths: Sequence[str]) -> list[str]:
    """Write submission.csv or valid.csv: the answers to all rows of the mode's task, in lower case.

    A row without an answer gets a blank text. If several rows have the same id, the first answer is written.

    Args:
        mode: ``submission_asr`` and so on.
        paths: Manifests and annotation files.
    Returns:
        Notes for the user, one line each.
    """
    kind, _, task = mode.partition("_")
    answers = [(row["id"], row["prediction"]) for row in read_predictions(output_dir)]
    texts = dict(reversed(answers))
    input_ids = [row_id for path in paths for row_id, row_task in _ids(path) if row_task == task]
    ids = sorted({*input_ids, *texts})
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(["testset_id", "text"])
    writer.writerows((row_id, texts.get(row_id, "").lower() or NO_TEXT) for row_id in ids)
    write_atomically(output_dir / f"{kind}.csv", content.getvalue().encode())
    notes = []
    if repeated := max(len(input_ids), len(answers)) - len(ids):
        notes.append(f"{repeated} row(s) repeat the id of another one; {kind}.csv holds the first answer to each id")
    if unanswered := len(ids) - len(texts):
        notes.append(f"{unanswered} row(s) without an answer have a blank text in {kind}.csv")
    return notes


def _ids(path: str) -> Iterator[tuple[str, str]]:
    """(id, task) of all rows of a manifest or annotation file, including unusable rows."""
    return salmonn.tasks_by_id(Path(path)) if is_annotation(path) else _manifest_ids(path)


def _manifest_ids(path: str) -> Iterator[tuple[str, str]]:
    for chunk in chunks(path, LINES_PER_CHUNK):
        for number, line in enumerate(chunk.read_bytes().split(b"\n"), chunk.first_line):
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if not isinstance(row, dict):
                    continue
                task = detect_task(row).name
            except (ValueError, RecursionError, TypeError):
                continue  # not a row of any task
            yield (str(row["id"]) if is_id(row.get("id")) else f"{Path(path).name}:{number}"), task
