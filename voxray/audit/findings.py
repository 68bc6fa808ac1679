"""Findings that compare rows with each other: duplicates, leaks between splits, outliers, and statistics.

Works on hashes and numbers, a few dozen bytes per row, so a million rows easily fit in memory.
"""

import hashlib
import json
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from voxray.audit.measure_rows import Measurements, RowMeasurement
from voxray.core.storage import atomic_writer
from voxray.corpora.splits import TRAIN_NAMES, VALIDATION_NAMES

SPLITS = ("train", "val", "test")
MIN_ROWS_FOR_OUTLIERS = 20
MIN_SPREAD = 0.1  # of the median; if most values are equal, a quartile range of 0 would make all others outliers
PERCENTILES = (50, 90, 95, 99)
UNITS = {"duration_sec": "seconds", "num_tokens": "tokens", "num_chars": "characters", "num_bytes": "bytes"}
UNITS["chars_per_sec"] = "characters per second"
OUTLIERS = {"duration_sec": "duration_outlier", "num_tokens": "length_outlier", "num_chars": "length_outlier"}
OUTLIERS["chars_per_sec"] = "rate_outlier"
RowLocation = tuple[int, int, int]
"""Split, file, line."""


@dataclass(frozen=True)
class Splits:
    """Assignment of files to splits. Rows that two splits share are leaks.

    Attributes:
        names: Name of every split.
        by_file: Number of each file's split. Of two splits that share a row, the lower one should lose it.
    """

    names: tuple[str, ...]
    by_file: tuple[int, ...]


def assign_splits(manifests: Sequence[str], compare: str) -> Splits:
    """Assign manifests to splits.

    Args:
        compare: ``auto`` reads the split from the names, or, if no name contains one, makes each file a split of its
            own; ``files`` makes each file a split of its own; ``none`` puts all files into one split.
    """
    if compare == "none":
        return Splits(("all",), (0,) * len(manifests))
    paths = [Path(manifest) for manifest in manifests]
    folders_differ = len({path.parent for path in paths}) > 1
    named = [_split_in_name(path, use_folder=folders_differ) for path in paths]
    if compare == "files" or not any(named):
        counts = Counter(path.name for path in paths)
        names = (f"{n}. {path.name}" if counts[path.name] > 1 else path.name for n, path in enumerate(paths, 1))
        return Splits(tuple(names), tuple(range(len(paths))))
    return Splits(SPLITS, tuple(SPLITS.index(split or "train") for split in named))


def _split_in_name(path: Path, *, use_folder: bool) -> str:
    """``train``, ``val`` or ``test`` if a word of the file name or the whole folder name means it, else ""."""
    kinds = {**dict.fromkeys(TRAIN_NAMES, "train"), **dict.fromkeys(VALIDATION_NAMES, "val"), "test": "test"}
    words = [word for word in re.split("[^a-z]+", path.stem.lower()) if word in kinds]
    return kinds[words[-1]] if words else kinds.get(path.parent.name.lower(), "") if use_folder else ""


@dataclass
class RowStatistics:
    """Measurements of usable rows, such as those of one task."""

    values: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in UNITS})

    def add(self, row: RowMeasurement) -> None:
        """Add a row. A value of 0 means not measured, except for text lengths."""
        for name, values in self.values.items():
            value = getattr(row, name)
            if value or name in {"num_chars", "num_bytes"}:
                values.append(value)

    def summary(self, name: str) -> dict[str, float]:
        """Count, minimum, mean, percentiles (linear interpolation) and maximum; empty if nothing was measured."""
        values = np.asarray(self.values[name])
        if not len(values):
            return {}
        summary = {"rows": len(values), "min": float(values.min()), "mean": float(values.mean())}
        summary |= {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}
        return {key: round(value, 3) for key, value in {**summary, "max": float(values.max())}.items()}

    def outlier_limits(self, name: str, spread: float) -> tuple[float, float, float, float] | None:
        """Lower and upper limit beyond which a value is an outlier, and the quartiles; None with too few rows."""
        values = np.asarray(self.values[name])
        if len(values) < MIN_ROWS_FOR_OUTLIERS:
            return None
        low, middle, high = map(float, np.percentile(values, (25, 50, 75)))
        width = spread * max(high - low, MIN_SPREAD * middle)
        return low - width, high + width, low, high


class Audit:
    """All rows of an audit with everything that is wrong with them.

    Attributes:
        numbers: Statistics by task.
        rows, usable, seconds: Rows, usable rows and seconds of audio, by (file, task).
    """

    def __init__(
        self, measurements: Measurements, splits: Splits, *, length: str, spread: float, scripted: bool = False
    ) -> None:
        """First pass: collect the values with which rows are compared.

        Args:
            length: ``num_tokens`` or ``num_chars``, the measure of length outliers.
            spread: See ``AuditSettings.outlier_spread``.
            scripted: Whether equal texts are no leaks.
        """
        self.measurements, self.splits = measurements, splits
        self.numbers: dict[str, RowStatistics] = defaultdict(RowStatistics)
        self.rows: Counter[tuple[int, str]] = Counter()
        self.usable: Counter[tuple[int, str]] = Counter()
        self.seconds: dict[tuple[int, str], float] = defaultdict(float)
        kinds = ("audio", "speaker") if scripted else ("audio", "text", "speaker")
        self._locations: dict[str, dict[bytes, RowLocation]] = {kind: {} for kind in kinds}
        first_split = min(splits.by_file)
        for row in measurements:
            cell = row.file, row.task
            self.rows[cell] += 1
            self.usable[cell] += row.usable
            self.seconds[cell] += row.duration_sec
            if row.usable:
                self.numbers[row.task].add(row)
            if row.usable and splits.by_file[row.file] > first_split:
                self._add_locations(row)
        metrics = ("duration_sec", length, "chars_per_sec")
        self._limits = {
            (task, name): limits
            for task, numbers in self.numbers.items()
            for name in metrics
            if (limits := numbers.outlier_limits(name, spread))
        }

    def _location(self, row: RowMeasurement) -> RowLocation:
        return self.splits.by_file[row.file], row.file, row.line

    def _add_locations(self, row: RowMeasurement) -> None:
        """Store where the row's audio, text and speaker occur. The last split counts: all splits before it leak."""
        location = self._location(row)
        for kind, locations in self._locations.items():
            key = _key(getattr(row, kind))
            if key and (key not in locations or locations[key][0] < location[0]):
                locations[key] = location

    def rows_with_findings(self) -> Iterator[RowMeasurement]:
        """Second pass: yield every row in order, with all its faults and warnings."""
        seen: dict[tuple[int, bytes], RowLocation] = {}
        ids: dict[tuple[int, bytes], RowLocation] = {}
        for row in self.measurements:
            if row.usable:
                location = self._location(row)
                split = location[0]
                row.faults += self._leaks(row, split)
                if first := seen.get((split, _key(row.key))):
                    row.faults.append(("duplicate", f"the same as {self._show(first)}"))
                if first := ids.get((row.file, _key(row.id))) if row.id else None:
                    row.faults.append(("duplicate_id", f"the id {row.id!r} is that of {self._show(first)}"))
                if not row.faults:  # rows that are left out anyway make no other row a duplicate
                    seen[split, _key(row.key)] = location
                    ids[row.file, _key(row.id)] = location
                row.warnings += self._outliers(row)
            yield row

    def _leaks(self, row: RowMeasurement, split: int) -> Iterator[tuple[str, str]]:
        names = {"audio": "its audio", "text": "its text", "speaker": f"its {row.speaker.replace(':', ' ', 1)}"}
        for kind, locations in self._locations.items():
            location = locations.get(_key(getattr(row, kind)))
            if location and location[0] > split:
                where = f"{self._show(location)} ({self.splits.names[location[0]]})"
                yield f"leak_{kind}", f"{names[kind]} is also at {where}"

    def _outliers(self, row: RowMeasurement) -> Iterator[tuple[str, str]]:
        for name, reason in OUTLIERS.items():
            value, limits = getattr(row, name), self._limits.get((row.task, name))
            if value and limits and not limits[0] <= value <= limits[1]:
                unit = UNITS[name]
                yield reason, f"{value:.4g} {unit}; half of all {row.task} rows have {limits[2]:.4g} to {limits[3]:.4g}"

    def _show(self, location: RowLocation) -> str:
        _, file, line = location
        return f"{self.measurements.manifests[file]}:{line}"


def _key(value: str) -> bytes:
    """Hash of 12 bytes for a hash, a name or an id; empty for ""."""
    return hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=12).digest() if value else b""


@dataclass
class AuditSummary:
    """Counts and examples of the findings.

    Attributes:
        faults, warnings: Number of findings by reason.
        examples: First findings of each reason, as in faults.jsonl and warnings.jsonl.
        bad_lines: Lines with a fault, by file.
        num_warned: Rows with a warning.
    """

    faults: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    bad_lines: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    num_warned: int = 0

    @property
    def num_bad(self) -> int:
        return sum(map(len, self.bad_lines.values()))


def write_findings(audit: Audit, output_dir: Path, max_examples: int) -> AuditSummary:
    """Second pass: write faults.jsonl and warnings.jsonl, one finding per line, in the order of the rows."""
    summary = AuditSummary()
    with atomic_writer(output_dir / "faults.jsonl") as faults, atomic_writer(output_dir / "warnings.jsonl") as warnings:
        for row in audit.rows_with_findings():
            if row.faults:
                summary.bad_lines[row.file].add(row.line)
            summary.num_warned += bool(row.warnings)
            kinds = ((row.faults, summary.faults, faults), (row.warnings, summary.warnings, warnings))
            for findings, counts, file in kinds:
                for reason, message in findings:
                    source = {"source_file": audit.measurements.manifests[row.file], "line": row.line, "id": row.id}
                    finding = {**source, "reason": reason, "message": message, "text": row.excerpt}
                    file.write((json.dumps(finding, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
                    if counts[reason] < max_examples:
                        summary.examples[reason].append(finding)
                    counts[reason] += 1
    return summary
