"""Rows that are longer than a model can be trained on, divided at the times of their segments.

Nothing is cut in the middle of what is said: parts begin and end with a segment, and keep its times.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from voxray.audio.logmel import HOP_SAMPLES
from voxray.core.manifest import Sample, samples_at
from voxray.core.source import Segment
from voxray.core.storage import AnyPath, to_jsonl, write_atomically
from voxray.features.reader import Features
from voxray.models.interface import FrontEnd


def write_parts(folders: Iterable[AnyPath], front_end: FrontEnd, path: Path) -> frozenset[str]:
    """Write a manifest of the parts of all rows that have more windows than the family is trained on.

    Args:
        folders: Feature sets.
        path: The manifest; gone if there is no such row.
    Returns:
        Sources (``<manifest>:<line>``) of the rows that stand in it. The others have no segments, or segments that say
        something else than the transcript.
    """
    path.unlink(missing_ok=True)
    if front_end.max_windows is None:
        return frozenset()
    features = Features(folders)
    longer = np.flatnonzero(features.num_windows > front_end.max_windows)
    longest_sec = front_end.max_windows * front_end.window_frames * HOP_SAMPLES / front_end.sample_rate_hz
    rows: list[dict[str, Any]] = []
    divided = set()
    for sample in samples_at({features.source(int(row)) for row in longer}):
        if sample.segments and _letters(" ".join(text for *_, text in sample.segments)) == _letters(sample.answer):
            rows += split_at_segments(sample, longest_sec)
            divided.add(sample.source)
    if rows:
        write_atomically(path, to_jsonl(rows))
    return frozenset(divided)


def split_at_segments(sample: Sample, longest_sec: float) -> list[dict[str, Any]]:
    """Manifest rows of a sample's parts, as many segments in each as fit; a segment that does not is one by itself."""
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
    shifted = [{"start": round(s - begin, 3), "end": round(e - begin, 3), "text": text} for s, e, text in group]
    return {**row, "segments": shifted}


def _letters(text: str) -> str:
    """What two spellings of one text have in common."""
    return "".join(char for char in text.casefold() if char.isalnum())
