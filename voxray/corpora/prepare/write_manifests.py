"""The third pass of prepare: duplicates, split by group, leaks, and who is written where."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from voxray.core.errors import quoted_line
from voxray.core.tasks import detect_task
from voxray.corpora.prepare.check_rows import CheckedRow, checked_path
from voxray.corpora.prepare.fingerprints import duplicate_key
from voxray.corpora.prepare.split import Leaks, count_leaks, decide, note_held_out
from voxray.corpora.prepare.unique import FirstSeen, UniqueIds


def read_checked(paths: list[Path]) -> Iterator[CheckedRow]:
    """Results of the second pass, in the order of the input."""
    for path in paths:
        with open(checked_path(path), encoding="utf-8", errors="surrogatepass") as file:
            for line in file:
                yield CheckedRow(**json.loads(line))


@dataclass
class RowTally:
    """Rows and hours by what became of them."""

    rows: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, what: str, duration_sec: float) -> None:
        self.rows[what] += 1
        self.seconds[what] = self.seconds.get(what, 0.0) + duration_sec

    def as_dict(self) -> dict[str, dict[str, float]]:
        return {
            name: {"rows": count, "hours": round(self.seconds[name] / 3600, 4)}
            for name, count in sorted(self.rows.items())
        }


@dataclass
class PrepareOutcome:
    """What the third pass decides row by row.

    Attributes:
        tally: Rows and hours of train, val, test and every reason of a loss.
        leaks: What of the validation and test sides is in training.
        first_fault: ``<file>:<line>: <message>`` of the first row left out, "" if there is none.
    """

    tally: RowTally
    leaks: Leaks
    first_fault: str = ""


class OutputFiles:
    """The files being written; they appear under their names together, when all is done."""

    def __init__(self, train: Path, val: Path | None, ledger: Path, test: Path | None = None) -> None:
        named = {"train": train, "val": val, "test": test, "ledger": ledger}
        self._final = {name: path for name, path in named.items() if path}
        self._parts = {name: path.with_name(f".{path.name}.part") for name, path in self._final.items()}
        for path in self._final.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        # The ledger also names files whose names are not UTF-8: as \\udcNN, which JSON reads back as Python has them.
        self._files = {
            name: open(path, "w", encoding="utf-8", errors="backslashreplace" if name == "ledger" else "strict")  # noqa: SIM115
            for name, path in self._parts.items()
        }

    def write(self, name: str, row: dict[str, Any]) -> None:
        self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self, *, keep: bool) -> None:
        """Close the files and put them in place; or drop them, except the ledger."""
        for name, file in self._files.items():
            file.close()
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
    """Third pass: drop duplicates, split, look for leaks, write every row where it belongs.

    Args:
        val_share: Share of the rows for validation; None writes no validation manifest.
        with_test: Write a manifest of what the corpus itself calls its test side.
        duplicates: ``drop`` or ``keep``.
        leak_policy: ``refuse`` (write no manifest if there is a leak), ``drop`` (the training rows) or ``allow``.
    """
    wanted = {"wanted": val_share is not None, "with_test": with_test}
    split = decide(_unique(paths, duplicates), val_share or 0.0, seed, **wanted)
    note_held_out(split, _unique(paths, duplicates))
    outcome = PrepareOutcome(RowTally(), count_leaks(split, _unique(paths, duplicates)))
    unique_id = UniqueIds()
    for row in _unique(paths, duplicates):
        side = split.side(row)
        if not row.reason and side == "other":
            row.reason, row.message = (
                "other_split",
                f"the corpus puts it into {row.split!r}, neither train nor validation",
            )
        elif not row.reason and side == "train" and leak_policy == "drop":
            kind = split.leak(row)
            if kind:
                row.reason, row.message = f"leak_{kind}", f"its {kind} is in the {split.held_out} rows as well"
        if row.reason:
            outputs.write("ledger", _ledger_entry(row))
            outcome.first_fault = outcome.first_fault or quoted_line(f"{row.source}: {row.message}")
        else:
            outputs.write(side, {"id": unique_id(row.id), **row.values})
        outcome.tally.add(row.reason or side, row.duration_sec)
    return outcome


def _unique(paths: list[Path], duplicates: str) -> Iterator[CheckedRow]:
    """All rows in order; a row that repeats an earlier one gets the reason ``duplicate``."""
    first_seen = FirstSeen()
    for row in read_checked(paths):
        if not row.reason and duplicates == "drop":
            first = first_seen(duplicate_key(detect_task(row.values), row.audio_hash, row.text_hash), row.source)
            if first:
                row.reason, row.message = "duplicate", f"the same as {first}"
        yield row


def _ledger_entry(row: CheckedRow) -> dict[str, Any]:
    source_file, _, line = row.source.rpartition(":")
    place = {"source_file": source_file, "line": int(line), "id": row.id}
    return {**place, "reason": row.reason, "message": quoted_line(row.message)}
