"""The third pass of prepare: drop duplicates, split by group, detect leaks, and write manifests and ledger."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxray.core.errors import quoted_line
from voxray.core.source import Source
from voxray.core.tasks import detect_task
from voxray.corpora.prepare.check_rows import CheckedRow, checked_path
from voxray.corpora.prepare.fingerprints import duplicate_key
from voxray.corpora.prepare.split import Leaks, choose_split, count_leaks, record_held_out
from voxray.corpora.prepare.unique import FirstSeen, UniqueIds
from voxray.corpora.splits import find_split


def read_checked(paths: list[Path]) -> Iterator[CheckedRow]:
    """Results of the second pass, in the order of the input."""
    for path in paths:
        with open(checked_path(path), encoding="utf-8", errors="surrogatepass") as file:
            for line in file:
                yield CheckedRow(**json.loads(line))


@dataclass
class RowTally:
    """Rows and hours per outcome: train, val, test, or the reason why rows were left out."""

    rows: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, outcome: str, duration_sec: float) -> None:
        self.rows[outcome] += 1
        self.seconds[outcome] = self.seconds.get(outcome, 0.0) + duration_sec

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {
            name: {"rows": count, "hours": round(self.seconds[name] / 3600, 4)}
            for name, count in sorted(self.rows.items())
        }


@dataclass
class PrepareOutcome:
    """Result of the third pass.

    Attributes:
        tally: Rows and hours of train, val, test and every reason.
        leaks: Overlap of training with validation and test.
        first_fault: ``<file>:<line>: <message>`` of the first row left out, "" if there is none.
        notes: {note: rows of the manifests that have it in ``transcript_notes``}.
        short_secs: Durations of the rows that are ``too_short``, in seconds.
        other_splits: {name of a split: rows that are left out because they are of it}.
        num_mixed: Rows that average the channels of a recording of which other rows take one channel.
    """

    tally: RowTally
    leaks: Leaks
    first_fault: str = ""
    notes: Counter[str] = field(default_factory=Counter)
    short_secs: list[float] = field(default_factory=list)
    other_splits: Counter[str] = field(default_factory=Counter)
    num_mixed: int = 0

    def is_usable(self, *, needs_train: bool) -> bool:
        """Whether there are rows to write: training rows if these are needed or leaks took them, else any."""
        lost_to_leaks = any(name.startswith("leak_") for name in self.tally.rows)
        names = ("train",) if needs_train or lost_to_leaks else ("train", "val", "test")
        return any(self.tally.rows[name] for name in names)


class OutputFiles:
    """The output files. All get their final names together, when everything is written."""

    def __init__(self, train: Path, val: Path | None, ledger: Path, test: Path | None = None) -> None:
        paths = {"train": train, "val": val, "test": test, "ledger": ledger}
        self._final = {name: path for name, path in paths.items() if path}
        self._parts = {name: path.with_name(f".{path.name}.part") for name, path in self._final.items()}
        for path in self._final.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        # The ledger escapes file names that are not UTF-8 as \\udcNN, which JSON decodes to Python's form of them.
        self._files = {
            name: open(path, "w", encoding="utf-8", errors="backslashreplace" if name == "ledger" else "strict")  # noqa: SIM115
            for name, path in self._parts.items()
        }

    def write(self, name: str, row: dict[str, Any]) -> None:
        self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self, *, keep: bool) -> None:
        """Close the files. Rename them to their final names, or delete all but the ledger if ``keep`` is false."""
        for name, part in self._files.items():
            part.close()
            if keep or name == "ledger":
                self._parts[name].replace(self._final[name])
            else:
                self._parts[name].unlink()


def write_manifests(
    paths: list[Path],
    outputs: OutputFiles,
    *,
    val_share: float | None,
    with_test: bool = False,
    seed: int,
    duplicates: str,
    leak_policy: str,
) -> PrepareOutcome:
    """Third pass: drop duplicates, split, detect leaks, and write every row to a manifest or to the ledger.

    Args:
        val_share: Share of the training rows for validation, if the corpus has no validation split; None writes no
            validation manifest.
        with_test: Write a manifest of the corpus' own test split.
        duplicates: ``drop`` or ``keep``.
        leak_policy: ``refuse`` (write no manifest if there is a leak), ``scripted`` (the same, but equal texts are no
            leaks), ``drop`` (the training rows) or ``allow``.
    """
    sides = {"with_validation": val_share is not None, "with_test": with_test}
    by_channel: dict[str, set[float]] = {}
    split = choose_split(_note_channels(_unique(paths, duplicates), by_channel), val_share or 0.0, seed, **sides)
    record_held_out(split, _unique(paths, duplicates), texts=leak_policy != "scripted")
    outcome = PrepareOutcome(RowTally(), count_leaks(split, _unique(paths, duplicates)))
    unique_id = UniqueIds()
    for row in _unique(paths, duplicates):
        side = split.side(row)
        if not row.reason and side == "other":
            row.reason, row.message = "other_split", f"it is of the corpus's split {row.split!r}"
            outcome.other_splits[find_split(row.split) or row.split] += 1
        elif not row.reason and side == "train" and leak_policy == "drop" and (leak := split.leak(row)):
            row.reason, row.message = f"leak_{leak}", f"its {leak} is in the {split.held_out} rows as well"
        if row.reason:
            outputs.write("ledger", _ledger_entry(row))
            outcome.short_secs += [row.duration_sec] if row.reason == "too_short" else []
            outcome.first_fault = outcome.first_fault or quoted_line(f"{row.source}: {row.message}")
        else:
            outputs.write(side, {"id": unique_id(row.id), **row.values})
            if isinstance(notes := row.values.get("transcript_notes"), list):
                outcome.notes.update(map(str, notes))
            outcome.num_mixed += row.channel is None and len(by_channel.get(row.recording, ())) > 1
        outcome.tally.add(row.reason or side, row.duration_sec)
    return outcome


def _unique(paths: list[Path], duplicates: str) -> Iterator[CheckedRow]:
    """All rows in order. A row that repeats an earlier one gets the reason ``duplicate``."""
    first_seen = FirstSeen()
    for row in read_checked(paths):
        if not row.reason and duplicates == "drop":
            first = first_seen(duplicate_key(detect_task(row.values), row.audio_hash, row.text_hash), row.source)
            if first:
                row.reason, row.message = "duplicate", f"the same as {first}"
        yield row


def _note_channels(rows: Iterator[CheckedRow], by_channel: dict[str, set[float]]) -> Iterator[CheckedRow]:
    """Pass rows on. The channels that they take of a recording are added to ``by_channel``."""
    for row in rows:
        if not row.reason and row.channel is not None:
            by_channel.setdefault(row.recording, set()).add(row.channel)
        yield row


def _ledger_entry(row: CheckedRow) -> dict[str, Any]:
    file, line = Source.parse(row.source)
    reason = {"reason": row.reason, "message": quoted_line(row.message)}
    return {"source_file": file, "line": line, "id": row.id, **reason}
