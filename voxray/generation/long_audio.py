"""Recordings longer than the model takes: split into overlapping chunks that are answered like other rows and joined.

Only transcripts can be joined. A row of another task stays refused, with its reason.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from voxray.audio.decode import header_seconds
from voxray.core.context import CONTEXT
from voxray.core.errors import BadRow
from voxray.core.manifest import Sample, samples_at
from voxray.core.source import Source
from voxray.core.storage import AnyPath, to_jsonl, write_atomically
from voxray.features.context import sample_with_context
from voxray.models.front_end import FrontEnd

OVERLAP_SEC = 5.0
MIN_STEP_SEC = 0.01
MAX_CHUNKS = 1000  # a damaged header may claim years
CHUNK_MANIFEST = "long_audio.jsonl"


def can_answer_in_chunks(reason: str, sample: Sample) -> bool:
    """Whether a refused row can be answered in chunks."""
    return reason == "audio_too_long" and sample.task.name == "asr"


def split_into_chunks(sample: Sample, front_end: FrontEnd, max_len: int, language: str = "") -> list[Sample]:
    """Split a recording into chunks as long as the model takes, which overlap by at least ``OVERLAP_SEC``.

    Args:
        max_len: Longest prompt in tokens, for chunks too.
        language: Language of a recording that names none, "" if unknown.
    Raises:
        BadRow: The length of the recording is unknown, its file is cut off, its header states a length that the model
            takes in one piece, or not even a short chunk fits.
    """
    try:
        total_sec = sample.duration_sec or header_seconds(sample.audio_path) - sample.start_sec
    except BadRow:
        raise
    except (OSError, ValueError) as error:
        raise BadRow("audio_unreadable", f"{sample.audio_path}: does not say how long it is: {error}") from None
    chunk_sec = front_end.max_audio_sec
    if total_sec <= chunk_sec:
        message = f"is longer than {chunk_sec:g} s, but its header states {total_sec:.2f} s: encode it again"
        raise BadRow("audio_too_long", f"{sample.audio_path} {message}")
    sample = replace(sample, segments=())  # their times are those of the whole recording
    prompted = replace(sample, language=sample.language or language)
    while len(front_end.prompt_ids(prompted, int(chunk_sec * front_end.sample_rate_hz))) > max_len:
        chunk_sec /= 2
        if chunk_sec < 2:
            raise BadRow("too_long", f"not even a chunk of 2 s is within --max_len {max_len}")
    overlap_sec = min(OVERLAP_SEC, chunk_sec / 4)
    num_chunks = max(2, math.ceil((total_sec - overlap_sec) / (chunk_sec - overlap_sec)))
    if num_chunks > MAX_CHUNKS:
        raise BadRow("audio_too_long", f"{sample.audio_path} lasts {total_sec:.0f} s, over {MAX_CHUNKS} chunks")
    step_sec = max(MIN_STEP_SEC, (total_sec - chunk_sec) / (num_chunks - 1))
    starts = [round(sample.start_sec + chunk * step_sec, 3) for chunk in range(num_chunks)]
    return [replace(sample, start_sec=start, duration_sec=chunk_sec) for start in starts]


def overlap_share(chunks: Sequence[Sample]) -> float:
    """Share of each chunk that overlaps with the next."""
    return 1 - (chunks[1].start_sec - chunks[0].start_sec) / chunks[0].duration_sec


def recording_num_samples(sample: Sample, chunks: Sequence[Sample], front_end: FrontEnd) -> int:
    """Audio samples of the whole recording."""
    end_sec = chunks[-1].start_sec + chunks[-1].duration_sec
    return round((end_sec - sample.start_sec) * front_end.sample_rate_hz)


def write_chunk_manifest(
    folders: Iterable[AnyPath],
    front_end: FrontEnd,
    max_len: int,
    path: Path,
    *,
    language: str = "",
    context: str | None = None,
) -> bool:
    """Write a manifest of the chunks of all recordings that feature sets refused for their length.

    Args:
        folders: The feature sets, whose ledgers list the recordings.
        path: The manifest; deleted if there are no chunks.
        language: Language of recordings that name none.
        context: Context of all recordings, "" for none; None for their own.
    Returns:
        Whether there are any chunks.
    """
    rows: list[dict[str, Any]] = []
    for sample in _refused_recordings(folders):
        if context is not None:
            sample = sample_with_context(sample, context)
        try:
            chunks = split_into_chunks(sample, front_end, max_len, language)
        except BadRow:
            continue  # the ledger keeps its line
        recording = {
            "chunk_of": sample.source,
            "whole_reference": sample.answer,
            "num_chunks": len(chunks),
            "whole_samples": recording_num_samples(sample, chunks, front_end),
        }
        share = overlap_share(chunks)
        for number, chunk in enumerate(chunks):
            row = {"id": sample.id, "audio_path": chunk.audio_path, "language": chunk.language, "transcript": ""}
            row |= {"start": chunk.start_sec, "duration": chunk.duration_sec}
            row |= {"channel": chunk.channel} if chunk.channel >= 0 else {}
            row |= {CONTEXT: chunk.prompt} if chunk.prompt else {}
            rows.append({**row, **recording, "chunk": number, "overlap_share": share})
    if rows:
        write_atomically(path, to_jsonl(rows))
    else:
        path.unlink(missing_ok=True)
    return bool(rows)


def restore_recordings(ledger: Iterable[dict[str, Any]], chunk_manifest: Path) -> list[dict[str, Any]]:
    """Replace chunks by their recordings in a ledger.

    Args:
        ledger: Lines of a quarantine.jsonl.
        chunk_manifest: File that ``write_chunk_manifest`` wrote.
    Returns:
        The lines without the recordings that were answered in chunks. A recording that lost chunks has one line, with
        the reason of the first lost chunk.
    """
    chunk_rows = [json.loads(line) for line in chunk_manifest.read_text(encoding="utf-8").splitlines()]
    split_recordings, with_lost_chunk = {row["chunk_of"] for row in chunk_rows}, set()
    lines = []
    for line in ledger:
        if line["manifest"] == str(chunk_manifest):
            row = chunk_rows[line["line"] - 1]
            if row["chunk_of"] in with_lost_chunk:
                continue
            with_lost_chunk.add(row["chunk_of"])
            manifest, number = Source.parse(row["chunk_of"])
            message = f"chunk {row['chunk'] + 1} of {row['num_chunks']}: {line['message']}"
            line = {**line, "manifest": manifest, "line": number, "id": row["id"], "message": message}
        elif f"{line['manifest']}:{line['line']}" in split_recordings:
            continue
        lines.append(line)
    return lines


def _refused_recordings(folders: Iterable[AnyPath]) -> list[Sample]:
    sources = []
    for folder in dict.fromkeys(folders):
        for line in map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines()):
            if line["reason"] == "audio_too_long":
                sources.append(f"{line['manifest']}:{line['line']}")
    return [sample for sample in samples_at(sources) if can_answer_in_chunks("audio_too_long", sample)]
