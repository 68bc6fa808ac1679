"""Splits rows that are longer than a model can be trained on at the times of their segments.

No utterance is cut: each part begins and ends with a segment, whose times are preserved.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voxray.audio.logmel import HOP_SAMPLES
from voxray.core.context import CONTEXT
from voxray.core.manifest import Sample, samples_at
from voxray.core.source import Segment, text_matches
from voxray.core.storage import AnyPath, to_jsonl, write_atomically
from voxray.features.reader import Features
from voxray.models.front_end import FrontEnd


def write_parts(folders: Iterable[AnyPath], front_end: FrontEnd, path: Path) -> frozenset[str]:
    """Write a manifest of the parts of all rows with more windows than the model family is trained on.

    Args:
        folders: Feature sets.
        path: The manifest to write. It is deleted if there is no row to split.
    Returns:
        Sources (``<manifest>:<line>``) of the rows that were split. Other long rows have no segments, or segments whose
        text differs from the transcript.
    """
    path.unlink(missing_ok=True)
    if front_end.max_windows is None:
        return frozenset()
    features = Features(folders)
    long_rows = np.flatnonzero(features.num_windows > front_end.max_windows)
    longest_sec = front_end.max_windows * front_end.window_frames * HOP_SAMPLES / front_end.sample_rate_hz
    rows: list[dict[str, Any]] = []
    split_sources = set()
    for sample in samples_at({features.source(int(row)) for row in long_rows}):
        if sample.segments and text_matches(sample.segments, sample.answer):
            rows += split_at_segments(sample, longest_sec)
            split_sources.add(sample.source)
    if rows:
        write_atomically(path, to_jsonl(rows))
    return frozenset(split_sources)


def split_at_segments(sample: Sample, longest_sec: float) -> list[dict[str, Any]]:
    """Manifest rows of a sample's parts, each with as many segments as fit; a longer segment becomes its own part."""
    groups: list[list[Segment]] = []
    for segment in sample.segments:
        if groups and segment[1] - groups[-1][0][0] <= longest_sec:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return [_row(sample, number, group) for number, group in enumerate(groups, 1)]


def _row(sample: Sample, number: int, group: Sequence[Segment]) -> dict[str, Any]:
    begin, end = group[0][0], group[-1][1]
    row = {"id": f"{sample.id}#{number}", "audio_path": sample.audio_path, "language": sample.language}
    row |= {"transcript": " ".join(text for *_, text in group), "part_of": sample.source}
    row |= {"start": round(sample.start_sec + begin, 3), "duration": round(end - begin, 3)}
    row |= {"channel": sample.channel} if sample.channel >= 0 else {}
    row |= {CONTEXT: sample.prompt} if sample.prompt else {}
    shifted = [{"start": round(s - begin, 3), "end": round(e - begin, 3), "text": text} for s, e, text in group]
    return {**row, "segments": shifted}
