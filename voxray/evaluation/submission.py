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
"""In the place of an empty text: pandas, by which the evaluators' validator reads, takes an empty field for no text."""
LINES_PER_CHUNK = 256


def write_submission(output_dir: Path, mode: str, paths: Sequence[str]) -> list[str]:
    """Write submission.csv or valid.csv: the answers to all rows of the mode's task, in lower case.

    A row without an answer has a blank text. Of rows with one id the first that is answered counts.

    Args:
        mode: ``submission_asr`` and so on.
        paths: The manifests and annotation files as they were given.
    Returns:
        What is worth saying, in lines.
    """
    kind, _, task = mode.partition("_")
    answers = [(row["id"], row["prediction"]) for row in read_predictions(output_dir)]
    texts = dict(reversed(answers))
    wanted = [name for path in paths for name, known in _ids(path) if known == task]
    names = sorted({*wanted, *texts})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["testset_id", "text"])
    writer.writerows((name, texts.get(name, "").lower() or NO_TEXT) for name in names)
    write_atomically(output_dir / f"{kind}.csv", text.getvalue().encode())
    notes = []
    if repeated := max(len(wanted), len(answers)) - len(names):
        notes.append(f"{repeated} row(s) repeat the id of another one; {kind}.csv holds the first answer to each id")
    if unanswered := len(names) - len(texts):
        notes.append(f"{unanswered} row(s) without an answer have a blank text in {kind}.csv")
    return notes


def _ids(path: str) -> Iterator[tuple[str, str]]:
    """(id, task) of the rows of a manifest or an annotation file, also of those that cannot be used."""
    return salmonn.tasks_by_id(Path(path)) if is_annotation(path) else _manifest_ids(path)


def _manifest_ids(path: str) -> Iterator[tuple[str, str]]:
    for chunk in chunks(path, LINES_PER_CHUNK):
        for number, line in enumerate(chunk.read_bytes().split(b"\n"), chunk.first_line):
            try:
                row = json.loads(line.decode("utf-8-sig"))
                task = detect_task(row).name
            except (ValueError, RecursionError, TypeError):
                continue  # no row of any task
            yield (str(row["id"]) if is_id(row.get("id")) else f"{Path(path).name}:{number}"), task
