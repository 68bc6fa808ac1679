"""Prediction rows: how they lie on disk, how they are read back, how they are scored.

An evaluation writes them in parts, ``predictions/part-00000.parquet`` and so on. Other systems' rows come as JSON
Lines of ``{id, task, reference or references, prediction}`` and whatever else of a row is known.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from voxray.config.flag_groups import ScoreFlags
from voxray.core.errors import BadRow, RunError, one_line
from voxray.core.manifest import chunks
from voxray.core.source import split_source
from voxray.core.tasks import TASKS
from voxray.evaluation.score import read_terms, score
from voxray.evaluation.slices import SAMPLE_RATE_HZ
from voxray.generation.join_chunks import joined_rows
from voxray.metrics.counts import COUNT_NAMES, as_row, compute_metrics
from voxray.metrics.rows import check_row, count_row, row_normalizer

TEXT_COLUMNS = ("id", "task", "language", "source", "prompt", "reference", "prediction")
KNOWN_COLUMNS = ("speaker", "domain", "dataset", "audio_path", "reference_phonetic")
PREDICTION_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in (*TEXT_COLUMNS, *KNOWN_COLUMNS)),
        ("references", pa.list_(pa.string())),
        ("normalizer", pa.string()),
        ("num_samples", pa.int64()),
        ("snr_db", pa.float64()),
        ("sec", pa.float64()),
        ("num_new_tokens", pa.int64()),
        ("hit_max", pa.bool_()),
        ("nll", pa.float64()),
        ("num_tokens", pa.int64()),
        ("chunk_of", pa.string()),
        *((name, pa.int64()) for name in ("chunk", "num_chunks", "whole_samples")),
        ("overlap_share", pa.float64()),
        *((name, pa.int64()) for name in COUNT_NAMES),
    ],
)
"""Speaker, domain, references and noise level are null where the manifest does not say; ``sec`` is the row's share of
the time that its batches took, ``hit_max`` says that the answer was cut off. ``nll`` is -ln p of the reference, over
``num_tokens`` tokens, null where nobody asked. The columns from ``chunk_of`` on are those
of parts of recordings that are too long for the model (see ``long_audio``), null elsewhere."""
LINES_PER_CHUNK = 256

BadPrediction = tuple[str, int, BadRow]
"""File, line, fault."""


def scored(rows: Sequence[dict[str, Any]], how: ScoreFlags) -> dict[str, Any]:
    """The content of metrics.json, scored as the settings say."""
    terms = read_terms(how.terms) if how.terms else ()
    return score(rows, terms=terms, english_spelling=how.english_spelling, caption_jars=how.caption_jars)


def metrics_by_task(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {metric: {"value", "n"}}} of prediction rows."""
    grouped = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    return {task: compute_metrics(task, found) for task, found in grouped.items() if found}


def labelled(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have a text to hold their answer against."""
    return [row for row in rows if is_labelled(row)]


def is_labelled(row: Mapping[str, Any]) -> bool:
    return bool(row.get("references")) or row["reference"] is not None


def with_counts(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction row with the counts that its texts give; without a reference it has none."""
    if not is_labelled(row):
        return dict(row)
    return {**row, "normalizer": row_normalizer(row).name, **as_row(count_row(row))}


def part_path(predictions: Path, part: int) -> Path:
    return predictions / f"part-{part:05d}.parquet"


def part_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Prediction rows as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=PREDICTION_SCHEMA), sink)
    return sink.getvalue().to_pybytes()


def read_predictions(output_dir: Path) -> list[dict[str, Any]]:
    """All prediction rows of an evaluation, ordered by manifest and line; long recordings are one row each."""
    files = sorted((output_dir / "predictions").glob("part-*.parquet"))
    return sorted(_rows_of(files), key=lambda row: split_source(row["source"]))


def _rows_of(files: Iterable[Path]) -> list[dict[str, Any]]:
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return [with_counts(row) if row.get("chunk_of") else row for row in joined_rows(rows)]


def read_any(path: str, flag: str) -> tuple[list[dict[str, Any]], list[BadPrediction]]:
    """Prediction rows of an evaluation's folder, or of JSON Lines, each with its counts made anew.

    Args:
        path: The output or predictions folder of an evaluation, or a JSONL file.
        flag: What messages call it.
    Returns:
        The rows, and (file, line, fault) of every line that is none.
    Raises:
        RunError: There is nothing like that, or it cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not folder.exists():
            raise RunError(f"{flag} {path}: no such file or folder")
        return read_jsonl(str(folder.absolute()))
    files = sorted(folder.glob("predictions/part-*.parquet")) or sorted(folder.glob("part-*.parquet"))
    if not files:
        raise RunError(f"{flag} {path}: no predictions/part-*.parquet and no part-*.parquet in this folder")
    try:
        rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{flag} {path}: not the predictions of an evaluation: {one_line(error)}") from None
    for at, row in enumerate(rows, start=1):
        check_row(row, f"{flag} {path}: row {at} ({row.get('id') or row.get('source') or 'no id'})")
        if not split_source(row.setdefault("source", "") or "")[1]:
            raise RunError(f"{flag} {path}: row {at} ({row.get('id') or 'no id'}): source is no <manifest>:<line>")
    return [with_counts(row) for row in joined_rows(rows)], []


def read_jsonl(path: str) -> tuple[list[dict[str, Any]], list[BadPrediction]]:
    """Prediction rows of a JSONL file, and its bad lines (see ``read_any``)."""
    rows: list[dict[str, Any]] = []
    bad: list[BadPrediction] = []
    first_line: dict[tuple[str, str, str], int] = {}
    for chunk in chunks(path, LINES_PER_CHUNK):
        for at, raw in enumerate(chunk.read_bytes().split(b"\n")):
            line = chunk.first_line + at
            if not raw.strip():
                continue
            try:
                row = _parsed(raw, path, line)
                key = (row["dataset"] or "", row["task"], row["id"])
                if key in first_line:
                    raise BadRow("duplicate_id", f"id {row['id']!r} stands in line {first_line[key]} already")
                first_line[key] = line
                rows.append(row)
            except BadRow as error:
                bad.append((path, line, error))
    return rows, bad


def _parsed(raw: bytes, path: str, line: int) -> dict[str, Any]:
    """One line as a prediction row.

    Raises:
        BadRow: It is none.
    """
    try:
        found = json.loads(raw.decode("utf-8-sig"))
        if b"\\u" in raw:  # half of a surrogate pair can be escaped, but not stored: it becomes U+FFFD
            text = json.dumps(found, ensure_ascii=False).encode("utf-16", "surrogatepass")
            found = json.loads(text.decode("utf-16", "replace"))
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", f"not JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise BadRow("bad_json", f"a JSON {type(found).__name__}, not an object")
    task = found.get("task")
    if not isinstance(task, str) or task not in TASKS:
        said = f"task {task!r} is not one of" if "task" in found else "there is no task; it is one of"
        raise BadRow("bad_task", f"{said} {', '.join(TASKS)}")
    if not isinstance(found.get("prediction"), str):
        raise BadRow("no_prediction", "prediction is no text" if "prediction" in found else "there is no prediction")
    references = found.get("references")
    if references is None and isinstance(found.get("reference"), list):
        references = found["reference"]
    if references is not None and not (references and _are_texts(references)):
        raise BadRow("no_reference", "references is not a list of texts with one text at least")
    reference = references[0] if references else found.get("reference")
    if not isinstance(reference, str):
        raise BadRow("no_reference", "reference is no text" if "reference" in found else "there is no reference")
    row_id = known_text(found.get("id"))
    if row_id is None:
        raise BadRow("no_id", "id is neither text nor a number" if "id" in found else "there is no id")
    row: dict[str, Any] = {name: _text(found, name) for name in ("language", "prompt")}
    row |= {name: known_text(found.get(name)) for name in KNOWN_COLUMNS}
    row |= {name: known_number(found.get(name)) for name in ("nll", "snr_db")}
    row |= {name: _known_size(found.get(name)) for name in ("num_samples", "num_tokens")}
    duration = known_number(found.get("duration")) or 0.0
    row["num_samples"] = row["num_samples"] or _known_size(duration * SAMPLE_RATE_HZ // 1)
    row["reference_phonetic"] = row["reference_phonetic"] or known_text(found.get("transcript_phonetic"))
    row |= {"id": row_id, "task": task, "source": f"{path}:{line}"}
    row |= {"prediction": found["prediction"], "reference": reference, "references": references}
    return with_counts(row)


def _known_size(value: Any) -> int | None:
    """A whole number above 0 that Arrow can hold; None for anything else."""
    number = known_number(value) or 0.5
    return int(number) if number.is_integer() and 0 < number < 1 << 63 else None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""


def known_text(value: Any) -> str | None:
    """A name or number as text, 7.0 as "7"; None for anything else and for ""."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value) or None


def known_number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)
