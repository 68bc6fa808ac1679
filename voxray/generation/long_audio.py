"""Recordings longer than a model takes: cut into overlapping chunks, answered like other rows, joined again.

Only speech recognition can be put together from parts. A row of another task stays refused, with its reason.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from voxray.audio.decode import header_seconds
from voxray.core.errors import BadRow
from voxray.core.manifest import Sample, samples_at
from voxray.core.source import split_source
from voxray.core.storage import AnyPath, to_jsonl, write_atomically
from voxray.models.interface import FrontEnd

OVERLAP_SEC = 5.0
MAX_CHUNKS = 1000  # a damaged header may claim years
CHUNK_MANIFEST = "long_audio.jsonl"


def is_too_long(reason: str, sample: Sample) -> bool:
    """Whether a refused row can be answered in chunks."""
    return reason == "audio_too_long" and sample.task.name == "asr"


def split_into_chunks(sample: Sample, front_end: FrontEnd, max_len: int) -> list[Sample]:
    """Parts of a recording, each as long as the model takes, that overlap by ``OVERLAP_SEC`` at least.

    Args:
        max_len: Longest prompt in tokens; chunks keep within it too.
    Raises:
        BadRow: Its length is not known, or not one chunk fits.
    """
    try:
        total_sec = sample.duration_sec or header_seconds(sample.audio_path) - sample.start_sec
    except (OSError, ValueError) as error:
        raise BadRow("audio_unreadable", f"{sample.audio_path}: does not say how long it is: {error}") from None
    chunk_sec = front_end.max_audio_sec
    while len(front_end.prompt_ids(sample, int(chunk_sec * front_end.sample_rate_hz))) > max_len:
        chunk_sec /= 2
        if chunk_sec < 2:
            raise BadRow("too_long", f"not even a chunk of 2 s is within --max_len {max_len}")
    number = max(2, math.ceil((total_sec - overlap_seconds(chunk_sec)) / (chunk_sec - overlap_seconds(chunk_sec))))
    if number > MAX_CHUNKS:
        raise BadRow("audio_too_long", f"{sample.audio_path} lasts {total_sec:.0f} s, over {MAX_CHUNKS} chunks")
    step = (total_sec - chunk_sec) / (number - 1)
    starts = [round(sample.start_sec + place * step, 3) for place in range(number)]
    return [replace(sample, start_sec=start, duration_sec=chunk_sec) for start in starts]


def overlap_seconds(chunk_sec: float) -> float:
    return min(OVERLAP_SEC, chunk_sec / 4)


def overlap_share(parts: Sequence[Sample]) -> float:
    """The share of each chunk that it has in common with the next."""
    return 1 - (parts[1].start_sec - parts[0].start_sec) / parts[0].duration_sec


def whole_samples(sample: Sample, parts: Sequence[Sample], front_end: FrontEnd) -> int:
    """Samples of the recording that the chunks are of."""
    end_sec = parts[-1].start_sec + parts[-1].duration_sec
    return round((end_sec - sample.start_sec) * front_end.sample_rate_hz)


def write_chunk_manifest(folders: Iterable[AnyPath], front_end: FrontEnd, max_len: int, path: Path) -> bool:
    """Write a manifest of the chunks of all recordings that feature sets refused for their length.

    Args:
        folders: The feature sets, whose ledgers name them.
        path: The manifest; gone if there are none.
    Returns:
        Whether there are any.
    """
    rows: list[dict[str, Any]] = []
    for sample in _refused(folders):
        try:
            parts = split_into_chunks(sample, front_end, max_len)
        except BadRow:
            continue  # it stays in the ledger as it is
        share, num_samples = overlap_share(parts), whole_samples(sample, parts, front_end)
        whole = {"chunk_of": sample.source, "whole_reference": sample.answer, "num_chunks": len(parts)}
        whole["whole_samples"] = num_samples
        for number, part in enumerate(parts):
            row = {"id": sample.id, "audio_path": part.audio_path, "language": part.language, "transcript": ""}
            row |= {"start": part.start_sec, "duration": part.duration_sec}
            row |= {"channel": part.channel} if part.channel >= 0 else {}
            rows.append({**row, **whole, "chunk": number, "overlap_share": share})
    if rows:
        write_atomically(path, to_jsonl(rows))
    else:
        path.unlink(missing_ok=True)
    return bool(rows)


def with_recordings(ledger: Iterable[dict[str, Any]], chunk_manifest: Path) -> list[dict[str, Any]]:
    """A ledger that speaks of recordings instead of their chunks.

    Args:
        ledger: Lines of a quarantine.jsonl.
        chunk_manifest: What ``write_chunk_manifest`` wrote.
    Returns:
        The lines, without recordings that are answered in chunks; one of which a chunk was lost stands once, with the
        chunk's reason.
    """
    chunk_rows = [json.loads(line) for line in chunk_manifest.read_text(encoding="utf-8").splitlines()]
    whole, lost = {row["chunk_of"] for row in chunk_rows}, set()
    found = []
    for line in ledger:
        if line["manifest"] == str(chunk_manifest):
            row = chunk_rows[line["line"] - 1]
            if row["chunk_of"] in lost:
                continue
            lost.add(row["chunk_of"])
            manifest, number = split_source(row["chunk_of"])
            message = f"chunk {row['chunk'] + 1} of {row['num_chunks']}: {line['message']}"
            line = {**line, "manifest": manifest, "line": number, "id": row["id"], "message": message}
        elif f"{line['manifest']}:{line['line']}" in whole:
            continue
        found.append(line)
    return found


def _refused(folders: Iterable[AnyPath]) -> list[Sample]:
    refused = []
    for folder in dict.fromkeys(folders):
        for line in map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines()):
            if line["reason"] == "audio_too_long":
                refused.append(f"{line['manifest']}:{line['line']}")
    return [sample for sample in samples_at(refused) if is_too_long("audio_too_long", sample)]
