"""Records of a training run: metrics.jsonl, previews.jsonl, trackers, and the log lines of train.log."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from voxray.batches.plan import Plan
from voxray.core.storage import write_atomically
from voxray.core.tasks import TASKS
from voxray.features.reader import Features
from voxray.metrics.names import headline, higher_is_better
from voxray.training.throughput import epoch_record
from voxray.training.trackers import open_trackers

METRICS, PREVIEWS, LOG = "metrics.jsonl", "previews.jsonl", "train.log"

Publish = Callable[[str, str, float], None]
"""Receives a value to show outside the run: its name, its task ("" for none) and the value."""


class Monitor:
    """Writes the records of a run. On other ranks than 0 it does nothing.

    Args:
        run_dir: The run folder.
        first_step: Steps done so far. Records of later steps, which an interrupted run wrote, are deleted. A record of
            kind ``resume`` then has the number of these steps.
        active: Whether this is rank 0.
        trackers: Programs that show the records, by name (``--report_to``).
        settings: Settings of the run, for these programs.
        publish: Receives every recorded value.
    """

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        *,
        active: bool,
        trackers: Sequence[str] = ("tensorboard",),
        settings: Mapping[str, Any] | None = None,
        publish: Publish | None = None,
    ) -> None:
        self._active, self._run_dir, self._publish = active, run_dir, publish
        if not active:
            return
        steps = [record["step"] for _, record in _records(run_dir / METRICS)]
        self._metrics = _reopen(run_dir / METRICS, first_step)
        self._previews = _reopen(run_dir / PREVIEWS, first_step)
        self._log = open(run_dir / LOG, "a", encoding="utf-8")  # noqa: SIM115  # open for the life of the run
        self._trackers = open_trackers(trackers, run_dir, settings or {}, first_step)
        for tracker in self._trackers:
            self.say(f"charts: {tracker.place}")
        if steps:
            self.record("resume", first_step, {"repeated_steps": max(steps) - first_step})

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write one record ``{"kind", "step", ...values}``. Values that are not finite become null."""
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        self._metrics.flush()
        # the number of an epoch is not a chart
        charts = {name: value for name, value in finite.items() if value is not None and name != kind}
        for tracker in self._trackers if charts else ():
            tracker.log({f"{kind}/{name}": value for name, value in charts.items()}, step)
        if self._publish:
            for name, value in charts.items():
                self._publish(*published_name(kind, name), value)

    def end_step(self, plan: Plan, features: Features, step: int, values: Mapping[str, float]) -> None:
        """Record a training step with the number of epochs done, and a summary of the epoch if the step ends one."""
        epochs = plan.epochs_done(step)
        self.record("train", step, {**values, "epoch": epochs})
        if epochs == int(epochs):
            self._end_epoch(plan, features, step)

    def _end_epoch(self, plan: Plan, features: Features, step: int) -> None:
        """Record and log a summary of the epoch that ends with ``step``."""
        if not self._active:
            return
        record = epoch_record(read_metrics(self._run_dir, "train"), plan, features, step)
        self.record("epoch", step, record)
        loss = f"  loss {record['loss']:.4f}" if "loss" in record else ""
        self.say(f"epoch {record['epoch']:g}: {record['sec']:.1f} s for {record['steps']:g} steps{loss}")

    def show_previews(self, step: int, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write generated answers, one line each, and show them as a table per task."""
        if not self._active or not entries:
            return
        for entry in entries:
            self._previews.write(json.dumps({"step": step, **entry}, ensure_ascii=False) + "\n")
        self._previews.flush()
        for task in dict.fromkeys(entry["task"] for entry in entries):
            lines = ["| prompt | reference | generated |", "| --- | --- | --- |"]
            for entry in entries:
                if entry["task"] == task:
                    lines.append("| " + " | ".join(map(escape_cell, _columns(entry))) + " |")
            for tracker in self._trackers:
                tracker.log_text(f"previews/{task}", "\n".join(lines), step)
        self.say(f"step {step}: {len(entries)} previews in {self._run_dir / PREVIEWS}")

    def best_steps(self, first_step: int = 0) -> dict[str, dict[str, float]]:
        """The step with the best value of every task's headline metric so far; the first one of equal values.

        Args:
            first_step: Validations before this step were on other rows and do not count.
        Returns:
            {"<task>/<metric>": {"step", "value"}}; empty on other ranks than 0, and without validation.
        """
        every = read_metrics(self._run_dir, "validation") if self._active else []
        # the last one of a step, which a resumed run with other validation rows repeats
        records = list({record["step"]: record for record in every if record["step"] >= first_step}.values())
        best_steps: dict[str, dict[str, float]] = {}
        for key in (f"{task}/{headline(task)}" for task in TASKS):
            scored = [record for record in records if record.get(key) is not None]
            if scored:
                best = (max if higher_is_better(key) else min)(scored, key=lambda record: record[key])
                best_steps[key] = {"step": best["step"], "value": best[key]}
        return best_steps

    def say(self, text: str) -> None:
        """Write a log line. The driver shows it on the terminal too."""
        if self._active:
            self._log.write(text + "\n")
            self._log.flush()

    def close(self) -> None:
        if self._active:
            for opened in (self._metrics, self._previews, self._log, *self._trackers):
                opened.close()


def published_name(kind: str, name: str) -> tuple[str, str]:
    """Name and task under which a value is published.

    ``loss/asr`` of a training step becomes ("loss", "asr"), ``asr/cer`` of a validation ("validation_cer", "asr"), and
    ``sec`` of an epoch ("epoch_sec", "").
    """
    parts = name.split("/")
    task = next((part for part in parts if part in TASKS), "")
    words = [part for part in parts if part != task]
    return "_".join(words if kind == "train" else [kind, *words]), task


def _columns(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return entry["prompt"] or "(audio)", entry["reference"], entry["prediction"]


def escape_cell(text: str) -> str:
    """Escape any text for a cell of a Markdown table."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").split())


def _reopen(path: Path, first_step: int) -> TextIO:
    """Delete the records of later steps than ``first_step``, and open the file to append to it."""
    lines = [line + b"\n" for line, record in _records(path) if record["step"] <= first_step]
    write_atomically(path, b"".join(lines))  # a kill here loses no earlier record
    return open(path, "a", encoding="utf-8")  # open for the life of the run


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a file that are records, and what they hold. A kill may have cut off the last line."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append((line, record))
    return records


def read_metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Read all records of one kind, in the order of steps. Damaged lines are left out."""
    records = [record for _, record in _records(run_dir / METRICS) if record.get("kind") == kind]
    return [record for record in records if all(map(_is_value, (record | {"kind": None}).values()))]


def _is_value(value: object) -> bool:
    return value is None or isinstance(value, int | float)
