"""Slices of an evaluation set: by data set, language, speaker, domain, clip length and noise level."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow
from voxray.core.languages import language_code
from voxray.core.source import Source
from voxray.metrics.rows import PredictionRow

SAMPLE_RATE_HZ = 16_000  # of ``num_samples``; not imported from audio.logmel, which imports torch
DURATION_EDGES_SEC = (2.0, 5.0, 10.0, 20.0, 30.0)
SNR_EDGES_DB = (0.0, 5.0, 10.0, 15.0, 20.0)
UNKNOWN = "unknown"

Label = tuple[float, str]
"""Sort key and name of a slice."""


def slice_rows(rows: Sequence[PredictionRow]) -> dict[str, dict[str, list[int]]]:
    """Slice rows along every dimension that at least one row has a value for.

    Returns:
        {dimension: {label: indices of its rows}}. Labels are sorted by size, buckets by their bounds. The rows without
        a value come last, as ``unknown``.
    """
    slices = {}
    for dimension, label_row in _DIMENSIONS.items():
        labels = [label_row(row) for row in rows]
        if any(label is not None for label in labels):
            slices[dimension] = _group(labels)
    return slices


def _group(labels: Sequence[Label | None]) -> dict[str, list[int]]:
    groups: dict[Label | None, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)

    def order(label: Label | None) -> tuple[bool, float, int, str]:
        return (label is None, label[0] if label else 0, -len(groups[label]), label[1] if label else "")

    return {label[1] if label else UNKNOWN: groups[label] for label in sorted(groups, key=order)}


def clip_seconds(row: PredictionRow) -> float:
    """Length of a row's clip in seconds; 0 for a row without audio."""
    if row.get("num_samples"):
        return row["num_samples"] / SAMPLE_RATE_HZ
    return float(row.get("duration") or 0)


def _label(value: Any) -> Label | None:
    return (0.0, str(value)) if value not in (None, "") else None


def _dataset(row: PredictionRow) -> Label | None:
    """The data set that the row names, else the name of its manifest without folder and suffix."""
    return _label(row.get("dataset") or Path(Source.parse(str(row.get("source") or "")).file).stem)


def _language(row: PredictionRow) -> Label | None:
    """``en``, ``EN-us`` and ``English`` have the same label; an unknown language is its own label."""
    try:
        return _label(language_code(row.get("language")))
    except BadRow:
        return _label(row["language"])


def _duration(row: PredictionRow) -> Label | None:
    length = clip_seconds(row)
    return _bucket(length, DURATION_EDGES_SEC, "s", lowest=0.0) if length > 0 else None


def _snr(row: PredictionRow) -> Label | None:
    value = row.get("snr_db")
    return None if value is None else _bucket(float(value), SNR_EDGES_DB, "dB")


def _bucket(value: float, edges: Sequence[float], unit: str, lowest: float | None = None) -> Label | None:
    if math.isnan(value):
        return None
    bucket = sum(value >= edge for edge in edges)
    if bucket == len(edges):
        return bucket, f"{edges[-1]:g} {unit} and over"
    lower = edges[bucket - 1] if bucket else lowest
    return bucket, f"under {edges[bucket]:g} {unit}" if lower is None else f"{lower:g}-{edges[bucket]:g} {unit}"


_DIMENSIONS = {
    "dataset": _dataset,
    "language": _language,
    "speaker": lambda row: _label(row.get("speaker")),
    "domain": lambda row: _label(row.get("domain")),
    "duration": _duration,
    "snr": _snr,
}
