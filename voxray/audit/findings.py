"""What an audit can say of a row only once it knows the others: duplicates, leaks between files, outliers, figures.

Works on hashes and numbers, a few dozen bytes per row, so a million rows fit easily.
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
from voxray.core.storage import replacing
from voxray.corpora.prepare.split import TRAIN_NAMES, VALIDATION_NAMES

SPLITS = ("train", "val", "test")
MIN_ROWS_FOR_OUTLIERS = 20
MIN_SPREAD = 0.1  # of the median: where most values are the same, a quartile range of 0 would make all others outliers
PERCENTILES = (50, 90, 95, 99)
UNITS = {"duration_sec": "seconds", "num_tokens": "tokens", "num_chars": "characters", "num_bytes": "bytes"}
UNITS["chars_per_sec"] = "characters per second"
OUTLIERS = {"duration_sec": "duration_outlier", "num_tokens": "length_outlier", "num_chars": "length_outlier"}
OUTLIERS["chars_per_sec"] = "rate_outlier"
RowLocation = tuple[int, int, int]
"""Side, file, line."""


@dataclass(frozen=True)
class Splits:
    """Which files belong together; leaks are what two sides share.

    Attributes:
        names: Name of every side.
        of_file: Number of the side of every file; of two that share a row, the lower one is to lose it.
    """

    names: tuple[str, ...]
    of_file: tuple[int, ...]


def assign_splits(manifests: Sequence[str], compare: str) -> Splits:
    """Sort manifests into sides.

    Args:
        compare: ``auto`` goes by the words in their names, or takes each by itself if no name says anything; ``files``
            takes each by itself; ``none`` puts all on one side.
    """
    if compare == "none":
        return Splits(("all",), (0,) * len(manifests))
    paths = [Path(manifest) for manifest in manifests]
    folders_differ = len({path.parent for path in paths}) > 1
    said = [_side_in_name(path, ask_folder=folders_differ) for path in paths]
    if compare == "files" or not any(said):
        counts = Counter(path.name for path in paths)
        names = (f"{at}. {path.name}" if counts[path.name] > 1 else path.name for at, path in enumerate(paths, 1))
        return Splits(tuple(names), tuple(range(len(paths))))
    return Splits(SPLITS, tuple(SPLITS.index(side or "train") for side in said))


def _side_in_name(path: Path, *, ask_folder: bool) -> str:
    """``train``, ``val`` or ``test`` if a word of the file's name says so, or all of its folder's name, else ""."""
    kinds = {**dict.fromkeys(TRAIN_NAMES, "train"), **dict.fromkeys(VALIDATION_NAMES, "val"), "test": "test"}
    words = [word for word in re.split("[^a-z]+", path.stem.lower()) if word in kinds]
    return kinds[words[-1]] if words else kinds.get(path.parent.name.lower(), "") if ask_folder else ""


@dataclass
class Numbers:
    """Figures of the usable rows of one task."""

    values: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in UNITS})

    def add(self, row: RowMeasurement) -> None:
        """Note a row; 0 is a length of text, anywhere else it stands for what was not measured."""
        for name, values in self.values.items():
            value = getattr(row, name)
            if value or name in {"num_chars", "num_bytes"}:
                values.append(value)

    def summary(self, name: str) -> dict[str, float]:
        """Percentiles (linear between neighbours), maximum, mean and count; empty if nothing was measured."""
        values = np.asarray(self.values[name])
        if not len(values):
            return {}
        shown = {f"p{q}": round(float(np.percentile(values, q)), 3) for q in PERCENTILES}
        whole = {"rows": len(values), "min": float(values.min()), "mean": float(values.mean())}
        return {key: round(value, 3) for key, value in {**whole, **shown, "max": float(values.max())}.items()}

    def usual(self, name: str, spread: float) -> tuple[float, float, float, float] | None:
        """Lower and upper limit of what is no outlier, and the quartiles; None with too few rows to tell."""
        values = np.asarray(self.values[name])
        if len(values) < MIN_ROWS_FOR_OUTLIERS:
            return None
        low, middle, high = map(float, np.percentile(values, (25, 50, 75)))
        width = spread * max(high - low, MIN_SPREAD * middle)
        return low - width, high + width, low, high


class Audit:
    """All rows of an audit with everything that is wrong with them.

    Attributes:
        numbers: Figures by task.
        rows, usable, seconds: Rows, usable rows and seconds of audio, by (file, task).
    """

    def __init__(self, measurements: Measurements, sides: Splits, *, length: str, spread: float) -> None:
        """First pass: gather what rows are compared with.

        Args:
            length: ``num_tokens`` or ``num_chars``, what outliers of length are told by.
            spread: See ``AuditSettings.outlier_spread``.
        """
        self.measurements, self.sides = measurements, sides
        self.numbers: dict[str, Numbers] = defaultdict(Numbers)
        self.rows: Counter[tuple[int, str]] = Counter()
        self.usable: Counter[tuple[int, str]] = Counter()
        self.seconds: dict[tuple[int, str], float] = defaultdict(float)
        self._held: dict[str, dict[bytes, RowLocation]] = {"audio": {}, "text": {}, "speaker": {}}
        first_side = min(sides.of_file)
        for row in measurements:
            cell = row.file, row.task
            self.rows[cell] += 1
            self.usable[cell] += row.usable
            self.seconds[cell] += row.duration_sec
            if row.usable:
                self.numbers[row.task].add(row)
            if row.usable and sides.of_file[row.file] > first_side:
                self._hold(row)
        metrics = ("duration_sec", length, "chars_per_sec")
        self._usual = {
            (task, name): usual
            for task, numbers in self.numbers.items()
            for name in metrics
            if (usual := numbers.usual(name, spread))
        }

    def _hold(self, row: RowMeasurement) -> None:
        """Remember what the row has, at the last side that has it: every side before that one leaks into it."""
        place = (self.sides.of_file[row.file], row.file, row.line)
        for kind, held in self._held.items():
            key = _key(getattr(row, kind))
            if key and (key not in held or held[key][0] < place[0]):
                held[key] = place

    def judged(self) -> Iterator[RowMeasurement]:
        """Second pass: every row in order, its faults and warnings complete."""
        seen: dict[tuple[int, bytes], RowLocation] = {}
        ids: dict[tuple[int, bytes], RowLocation] = {}
        for row in self.measurements:
            if row.usable:
                place = (self.sides.of_file[row.file], row.file, row.line)
                row.faults += self._leaks(row, place[0])
                first = seen.get((place[0], _key(row.key)))
                if first:
                    row.faults.append(("duplicate", f"the same as {self._shown(first)}"))
                first = ids.get((row.file, _key(row.id))) if row.id else None
                if first:
                    row.faults.append(("duplicate_id", f"the id {row.id!r} is that of {self._shown(first)}"))
                if not row.faults:  # a row that is left out anyway takes no other with it
                    seen[place[0], _key(row.key)] = place
                    ids[row.file, _key(row.id)] = place
                row.warnings += self._outliers(row)
            yield row

    def _leaks(self, row: RowMeasurement, side: int) -> Iterator[tuple[str, str]]:
        what = {"audio": "its audio", "text": "its text", "speaker": f"its {row.speaker.replace(':', ' ', 1)}"}
        for kind, held in self._held.items():
            place = held.get(_key(getattr(row, kind)))
            if place and place[0] > side:
                yield f"leak_{kind}", f"{what[kind]} is also at {self._shown(place)} ({self.sides.names[place[0]]})"

    def _outliers(self, row: RowMeasurement) -> Iterator[tuple[str, str]]:
        for name, reason in OUTLIERS.items():
            value, usual = getattr(row, name), self._usual.get((row.task, name))
            if value and usual and not usual[0] <= value <= usual[1]:
                unit = UNITS[name]
                yield reason, f"{value:.4g} {unit}; half of all {row.task} rows have {usual[2]:.4g} to {usual[3]:.4g}"

    def _shown(self, place: RowLocation) -> str:
        return f"{self.measurements.manifests[place[1]]}:{place[2]}"


def _key(value: str) -> bytes:
    """A dictionary key of 12 bytes for a hash, a name or an id; empty for ""."""
    return hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=12).digest() if value else b""


@dataclass
class AuditSummary:
    """What the second pass found, in numbers and examples.

    Attributes:
        faults, warnings: Findings by reason.
        examples: First findings of each reason, as they stand in faults.jsonl and warnings.jsonl.
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
    """Second pass: write faults.jsonl and warnings.jsonl, one finding a line, in the order of the rows."""
    found = AuditSummary()
    with replacing(output_dir / "faults.jsonl") as faults, replacing(output_dir / "warnings.jsonl") as warnings:
        for row in audit.judged():
            if row.faults:
                found.bad_lines[row.file].add(row.line)
            found.num_warned += bool(row.warnings)
            sides = ((row.faults, found.faults, faults), (row.warnings, found.warnings, warnings))
            for findings, counts, file in sides:
                for reason, message in findings:
                    place = {"source_file": audit.measurements.manifests[row.file], "line": row.line, "id": row.id}
                    finding = {**place, "reason": reason, "message": message, "text": row.excerpt}
                    file.write((json.dumps(finding, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
                    if counts[reason] < max_examples:
                        found.examples[reason].append(finding)
                    counts[reason] += 1
    return found
