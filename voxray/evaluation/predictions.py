"""Write, read and score prediction rows.

An evaluation writes them in parts, ``predictions/part-00000.parquet`` and so on. Rows of other systems are read from
JSON Lines of ``{id, task, reference or references, prediction}`` and optional keys (see ``metrics.rows``).
"""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from voxray.config.flag_groups import ScoreFlags
from voxray.core.console import console
from voxray.core.context import context_of_row
from voxray.core.errors import BadRow, RunError, library_errors
from voxray.core.manifest import chunks
from voxray.core.source import Source
from voxray.core.tasks import TASKS
from voxray.evaluation.score import score
from voxray.evaluation.slices import SAMPLE_RATE_HZ
from voxray.generation.join_chunks import join_chunk_rows
from voxray.metrics.counts import COUNT_NAMES, as_row, compute_metrics
from voxray.metrics.names import is_transcript
from voxray.metrics.rows import check_row, count_row, row_normalizer
from voxray.metrics.terms import read_terms
from voxray.text.normalize import BASIC_V2, WHISPER_EN, Normalizers, normalizers_from

TEXT_COLUMNS = ("id", "task", "language", "source", "prompt", "reference", "prediction")
METADATA_COLUMNS = ("speaker", "domain", "dataset", "audio_path", "reference_phonetic")
PREDICTION_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in (*TEXT_COLUMNS, *METADATA_COLUMNS)),
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
"""Speaker, domain, references and noise level are null if the manifest has none. ``sec`` is the row's share of the
time that its batches took. ``normalizer`` is the one of the row's counts; metrics.json names the one of its rates.
``hit_max`` marks an answer that was cut off. ``nll`` is -ln p of the reference over
``num_tokens`` tokens, null if it was not computed. The columns from ``chunk_of`` to ``overlap_share`` are null except
for chunks of recordings that are too long for the model (see ``long_audio``)."""
LINES_PER_CHUNK = 256

BadPrediction = tuple[str, int, BadRow]
"""File, line, error."""


def score_predictions(rows: Sequence[dict[str, Any]], flags: ScoreFlags) -> dict[str, Any]:
    """Score rows with the options of the settings; returns the content of metrics.json."""
    terms = read_terms(flags.terms) if flags.terms else ()
    normalizers = normalizers_from(flags.normalizer, flags.english_spelling)
    for warning in unused_normalizers(rows, flags, normalizers):
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    return score(rows, terms=terms, normalizers=normalizers, caption_jars=flags.caption_jars)


def unused_normalizers(rows: Sequence[dict[str, Any]], flags: ScoreFlags, normalizers: Normalizers) -> Iterator[str]:
    """What the rows are that ``--normalizer`` and ``--english_spelling`` have no effect on, one line per flag."""
    rest = Counter[tuple[str, str]]()
    for row in rows:
        name = row_normalizer(row, normalizers).name
        rest[name, f"in {row.get('language') or 'no language'}" if is_transcript(row["task"]) else "answers"] += 1
    if flags.normalizer != BASIC_V2:
        others = {key: count for key, count in rest.items() if key[0] != flags.normalizer}
        if others:
            shown = ", ".join(f"{count} {kind} ({name})" for (name, kind), count in others.items())
            total = f"{sum(others.values())} of {len(rows)} rows"
            yield f"--normalizer {flags.normalizer} has no effect on {total}: {shown}"
    if flags.english_spelling and not any(name == WHISPER_EN for name, _ in rest):
        yield "--english_spelling has no effect: no row is an English transcript"


def metrics_by_task(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{task: {metric: {"value", "n"}}} of prediction rows."""
    grouped = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    return {task: compute_metrics(task, task_rows) for task, task_rows in grouped.items() if task_rows}


def labelled_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have a reference."""
    return [row for row in rows if is_labelled(row)]


def is_labelled(row: Mapping[str, Any]) -> bool:
    return bool(row.get("references")) or row["reference"] is not None


def with_counts(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prediction row with its counts added, by the default normaliser of its language, which the row names.

    A row without a reference is returned unchanged.
    """
    if not is_labelled(row):
        return dict(row)
    return {**row, "normalizer": row_normalizer(row).name, **as_row(count_row(row))}


def with_language(rows: Iterable[Mapping[str, Any]], language: str) -> list[dict[str, Any]]:
    """The rows; those of audio that name no language get this one."""
    return [
        {**row, "language": language} if TASKS[row["task"]].has_audio and not row.get("language") else dict(row)
        for row in rows
    ]


def part_path(predictions: Path, part: int) -> Path:
    return predictions / f"part-{part:05d}.parquet"


def part_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Prediction rows as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist([dict(row) for row in rows], schema=PREDICTION_SCHEMA), sink, write_page_checksum=True
    )
    return sink.getvalue().to_pybytes()


def read_predictions(output_dir: Path) -> list[dict[str, Any]]:
    """All prediction rows of an evaluation, ordered by manifest and line; a long recording is one row.

    All counts are by the default normalisers: rows that another version counted by others are counted again. Rows that
    name no language have that of the evaluation's settings, which --score_only may change.
    """
    files = sorted((output_dir / "predictions").glob("part-*.parquet"))
    rows = with_language(join_chunk_rows(_read_parts(files)), _language_in_settings(output_dir))
    rows = [with_counts(row) if row.get("chunk_of") or _has_other_counts(row) else row for row in rows]
    return sorted(rows, key=lambda row: Source.parse(row["source"]))


def _language_in_settings(output_dir: Path) -> str:
    try:
        language = json.loads((output_dir / "settings.json").read_text(encoding="utf-8")).get("language")
    except (OSError, ValueError, AttributeError):
        return ""
    return _text_or_empty(language)


def _has_other_counts(row: Mapping[str, Any]) -> bool:
    return row.get("normalizer") not in (None, row_normalizer(row).name)


def _read_parts(files: Iterable[Path]) -> list[dict[str, Any]]:
    return [row for file in files for row in read_part(file)]


def read_part(file: Path) -> list[dict[str, Any]]:
    """Rows of one prediction file.

    Raises:
        RunError: It is damaged.
    """
    with library_errors(f"{file}: not the predictions of an evaluation, or damaged"):
        return pq.read_table(file, page_checksum_verification=True).to_pylist()


def read_folder_or_jsonl(path: str, flag: str, language: str = "") -> tuple[list[dict[str, Any]], list[BadPrediction]]:
    """Read prediction rows from an evaluation's folder or from JSON Lines, and count them again.

    Args:
        path: The output or predictions folder of an evaluation, or a JSONL file.
        flag: Name of the flag in error messages.
        language: Code of the language of audio rows that name none.
    Returns:
        The rows, and (file, line, error) of every bad line.
    Raises:
        RunError: The path does not exist, has no predictions, or cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not folder.exists():
            raise RunError(f"{flag} {path}: no such file or folder")
        rows, bad = read_jsonl(str(folder.absolute()))
        return ([with_counts(row) for row in with_language(rows, language)] if language else rows), bad
    files = sorted(folder.glob("predictions/part-*.parquet")) or sorted(folder.glob("part-*.parquet"))
    if not files:
        raise RunError(f"{flag} {path}: no predictions/part-*.parquet and no part-*.parquet in this folder")
    rows = _read_parts(files)
    for number, row in enumerate(rows, start=1):
        check_row(row, f"{flag} {path}: row {number} ({row.get('id') or row.get('source') or 'no id'})")
        if not Source.parse(row.setdefault("source", "") or "").line:
            raise RunError(f"{flag} {path}: row {number} ({row.get('id') or 'no id'}): source is not <manifest>:<line>")
    return [with_counts(row) for row in with_language(join_chunk_rows(rows), language)], []


def read_jsonl(path: str) -> tuple[list[dict[str, Any]], list[BadPrediction]]:
    """Prediction rows of a JSONL file, and its bad lines (see ``read_folder_or_jsonl``)."""
    rows: list[dict[str, Any]] = []
    bad: list[BadPrediction] = []
    first_line: dict[tuple[str, str, str], int] = {}
    for chunk in chunks(path, LINES_PER_CHUNK):
        for line, raw in enumerate(chunk.read_bytes().split(b"\n"), chunk.first_line):
            if not raw.strip():
                continue
            try:
                row = _parse_row(raw, path, line)
                key = (row["dataset"] or "", row["task"], row["id"])
                if key in first_line:
                    raise BadRow("duplicate_id", f"id {row['id']!r} is already in line {first_line[key]}")
                first_line[key] = line
                rows.append(row)
            except BadRow as error:
                bad.append((path, line, error))
    return rows, bad


def _parse_row(raw: bytes, path: str, line: int) -> dict[str, Any]:
    """Parse one line as a prediction row.

    Raises:
        BadRow: The line is not a prediction row.
    """
    entry = _parse_object(raw)
    task = entry.get("task")
    if not isinstance(task, str) or task not in TASKS:
        problem = f"task {task!r} is not one of" if "task" in entry else "there is no task; it is one of"
        raise BadRow("bad_task", f"{problem} {', '.join(TASKS)}")
    if not isinstance(entry.get("prediction"), str):
        raise BadRow("no_prediction", "prediction is not text" if "prediction" in entry else "there is no prediction")
    references = entry.get("references")
    if references is None and isinstance(entry.get("reference"), list):
        references = entry["reference"]
    if references is not None and not (references and _are_texts(references)):
        raise BadRow("no_reference", "references is not a list of texts with one text at least")
    reference = references[0] if references else entry.get("reference")
    if not isinstance(reference, str):
        raise BadRow("no_reference", "reference is not text" if "reference" in entry else "there is no reference")
    row_id = text_or_none(entry.get("id"))
    if row_id is None:
        raise BadRow("no_id", "id is neither text nor a number" if "id" in entry else "there is no id")
    row: dict[str, Any] = {name: _text_or_empty(entry.get(name)) for name in ("language", "prompt")}
    if TASKS[task].template == "transcription":  # the prompt of another system is a request
        row["prompt"] = context_of_row(entry)
    row |= {name: text_or_none(entry.get(name)) for name in METADATA_COLUMNS}
    row |= {name: number_or_none(entry.get(name)) for name in ("nll", "snr_db")}
    row |= {name: _size_or_none(entry.get(name)) for name in ("num_samples", "num_tokens")}
    duration = number_or_none(entry.get("duration")) or 0.0
    row["num_samples"] = row["num_samples"] or _size_or_none(duration * SAMPLE_RATE_HZ // 1)
    row["reference_phonetic"] = row["reference_phonetic"] or text_or_none(entry.get("transcript_phonetic"))
    row |= {"id": row_id, "task": task, "source": f"{path}:{line}"}
    row |= {"prediction": entry["prediction"], "reference": reference, "references": references}
    return with_counts(row)


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(raw.decode("utf-8-sig"))
        if b"\\u" in raw:  # half of a surrogate pair can be escaped but not stored: replace it by U+FFFD
            text = json.dumps(entry, ensure_ascii=False).encode("utf-16", "surrogatepass")
            entry = json.loads(text.decode("utf-16", "replace"))
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", f"not JSON: {str(error)[:200]}") from None
    if not isinstance(entry, dict):
        raise BadRow("bad_json", f"a JSON {type(entry).__name__}, not an object")
    return entry


def _size_or_none(value: Any) -> int | None:
    """A whole number above 0 that Arrow can hold; None for anything else."""
    number = number_or_none(value) or 0.5
    return int(number) if number.is_integer() and 0 < number < 1 << 63 else None


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _text_or_empty(value: Any) -> str:
    return value if isinstance(value, str) else ""


def text_or_none(value: Any) -> str | None:
    """A name or number as text, 7.0 as "7"; None for anything else and for ""."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value) or None


def number_or_none(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


def set_aside_predictions(predictions: Path) -> None:
    """Move the parts of another evaluation to ``predictions-earlier``, and delete what was computed from them."""
    if any(predictions.glob("part-*.parquet")):
        earlier = predictions.with_name("predictions-earlier")
        shutil.rmtree(earlier, ignore_errors=True)
        predictions.rename(earlier)
        console.print(
            f"{predictions.parent} holds answers to other rows or settings; these are in {earlier.name} now",
            markup=False,
        )
    for path in (*predictions.glob("part-*"), *predictions.glob(".attempts-*")):
        path.unlink()
    for name in ("metrics.json", "report.html", "errors.json", "submission.csv", "valid.csv"):
        (predictions.parent / name).unlink(missing_ok=True)
