"""Parts of an evaluation set: by data set, language, speaker, domain, length of the clip, and level of noise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxray.core.errors import BadRow
from voxray.core.manifest import language_code

SAMPLE_RATE_HZ = 16_000  # of ``num_samples``; not taken from audio.logmel, which brings torch along
DURATION_EDGES_SEC = (2.0, 5.0, 10.0, 20.0, 30.0)
SNR_EDGES_DB = (0.0, 5.0, 10.0, 15.0, 20.0)
UNKNOWN = "unknown"

PredictionRow = Mapping[str, Any]


def slice_rows(rows: Sequence[PredictionRow]) -> dict[str, dict[str, list[int]]]:
    """Cut rows along every dimension that some of them know.

    Returns:
        {dimension: {label: positions of its rows}}; labels in order of size or, for buckets, of their numbers, the rows
        that do not know come last as ``unknown``.
    """
    found = {}
    for name, label_of in _DIMENSIONS.items():
        labels = [label_of(row) for row in rows]
        if any(label is not None for label in labels):
            found[name] = _grouped(labels)
    return found


def _grouped(labels: Sequence[tuple[float, str] | None]) -> dict[str, list[int]]:
    groups: dict[tuple[float, str] | None, list[int]] = {}
    for at, label in enumerate(labels):
        groups.setdefault(label, []).append(at)

    def order(label: tuple[float, str] | None) -> tuple[bool, float, int, str]:
        return (label is None, label[0] if label else 0, -len(groups[label]), label[1] if label else "")

    return {label[1] if label else UNKNOWN: groups[label] for label in sorted(groups, key=order)}


def clip_seconds(row: PredictionRow) -> float:
    """Length of a row's clip in seconds; 0 for text."""
    if row.get("num_samples"):
        return row["num_samples"] / SAMPLE_RATE_HZ
    return float(row.get("duration") or 0)


def _named(value: Any) -> tuple[float, str] | None:
    return (0.0, str(value)) if value not in (None, "") else None


def _dataset(row: PredictionRow) -> tuple[float, str] | None:
    """The row's own name for it, else its manifest's, without folder and suffix."""
    return _named(row.get("dataset") or Path(str(row.get("source") or "").rpartition(":")[0]).stem)


def _language(row: PredictionRow) -> tuple[float, str] | None:
    """``en``, ``EN-us`` and ``English`` are one; what is no language is shown as it stands."""
    try:
        return _named(language_code(row.get("language")))
    except BadRow:
        return _named(row["language"])


def _duration(row: PredictionRow) -> tuple[float, str] | None:
    length = clip_seconds(row)
    return _bucket(length, DURATION_EDGES_SEC, "s", lowest=0.0) if length > 0 else None


def _snr(row: PredictionRow) -> tuple[float, str] | None:
    value = row.get("snr_db")
    return None if value is None else _bucket(float(value), SNR_EDGES_DB, "dB")


def _bucket(value: float, edges: Sequence[float], unit: str, lowest: float | None = None) -> tuple[float, str] | None:
    if value != value:  # NaN
        return None
    at = sum(value >= edge for edge in edges)
    if at == len(edges):
        return at, f"{edges[-1]:g} {unit} and over"
    below = edges[at - 1] if at else lowest
    return at, f"under {edges[at]:g} {unit}" if below is None else f"{below:g}-{edges[at]:g} {unit}"


_DIMENSIONS = {
    "dataset": _dataset,
    "language": _language,
    "speaker": lambda row: _named(row.get("speaker")),
    "domain": lambda row: _named(row.get("domain")),
    "duration": _duration,
    "snr": _snr,
}
