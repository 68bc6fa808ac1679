"""What a run writes about itself: metrics.jsonl, previews.jsonl, TensorBoard, and train.log with lines for people."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from voxray.batches.plan import Plan
from voxray.core.storage import write_atomically
from voxray.core.tasks import TASKS
from voxray.features.reader import Features
from voxray.metrics.names import headline, higher_is_better
from voxray.training.throughput import epoch_record

METRICS, PREVIEWS, LOG = "metrics.jsonl", "previews.jsonl", "train.log"

Publish = Callable[[str, str, float], None]
"""Takes a figure's name, its task ("" for none) and its value, for somebody who watches from outside."""


class Monitor:
    """Writes a run's records; on other ranks than the first it does nothing.

    Args:
        run_dir: The run folder.
        first_step: Steps done before; records of later ones, written by a run that was cut off, are dropped, and a
            record of kind ``resume`` says how many steps those were.
        active: Whether this is rank 0.
        publish: Is given every figure that is recorded.
    """

    def __init__(self, run_dir: Path, first_step: int, *, active: bool, publish: Publish | None = None) -> None:
        self._active, self._run_dir, self._publish = active, run_dir, publish
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        before = _whole_lines(run_dir / METRICS)
        self._metrics = _reopened(run_dir / METRICS, first_step)
        self._previews = _reopened(run_dir / PREVIEWS, first_step)
        self._log = open(run_dir / LOG, "a", encoding="utf-8")  # noqa: SIM115  # open for the life of the run
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        if before:
            last = max(json.loads(line)["step"] for line in before)
            self.record("resume", first_step, {"repeated_steps": last - first_step})

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write one record: ``{"kind", "step", ...values}``; numbers that are not finite become null."""
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        self._metrics.flush()
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(f"{kind}/{name}", value, step)
                if self._publish:
                    self._publish(*published_name(kind, name), value)

    def end_step(self, plan: Plan, features: Features, step: int, values: Mapping[str, float]) -> None:
        """Record a training step with the epochs done by then and, when it ends one, what that epoch came to."""
        epochs = plan.epochs_done(step)
        self.record("train", step, {**values, "epoch": epochs})
        if epochs == int(epochs):
            self._end_epoch(plan, features, step)

    def _end_epoch(self, plan: Plan, features: Features, step: int) -> None:
        """Record what the epoch that ends with ``step`` came to, and say it."""
        if not self._active:
            return
        record = epoch_record(read_metrics(self._run_dir, "train"), plan, features, step)
        self.record("epoch", step, record)
        loss = f"  loss {record['loss']:.4f}" if "loss" in record else ""
        self.say(f"epoch {record['epoch']:g}: {record['sec']:.1f} s for {record['steps']:g} steps{loss}")

    def show_previews(self, step: int, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write generated answers, one line each, and show them in TensorBoard as prompt | reference | generated."""
        if not self._active or not entries:
            return
        for entry in entries:
            self._previews.write(json.dumps({"step": step, **entry}, ensure_ascii=False) + "\n")
        self._previews.flush()
        for task in dict.fromkeys(entry["task"] for entry in entries):
            lines = ["| prompt | reference | generated |", "| --- | --- | --- |"]
            for entry in entries:
                if entry["task"] == task:
                    lines.append("| " + " | ".join(map(_cell, _shown(entry))) + " |")
            self._board.add_text(f"previews/{task}", "\n".join(lines), step)
        self.say(f"step {step}: {len(entries)} previews in {self._run_dir / PREVIEWS} and TensorBoard's text page")

    def best_steps(self) -> dict[str, dict[str, float]]:
        """The step with the best value of every task's headline metric so far, the first of equal ones.

        Returns:
            {"<task>/<metric>": {"step", "value"}}; empty on other ranks, and without validation.
        """
        records = read_metrics(self._run_dir, "validation") if self._active else []
        found: dict[str, dict[str, float]] = {}
        for key in (f"{task}/{headline(task)}" for task in TASKS):
            scored = [record for record in records if record.get(key) is not None]
            if scored:
                best = (max if higher_is_better(key) else min)(scored, key=lambda record: record[key])
                found[key] = {"step": best["step"], "value": best[key]}
        return found

    def say(self, text: str) -> None:
        """A line for people, shown on the driver's terminal too."""
        if self._active:
            self._log.write(text + "\n")
            self._log.flush()

    def close(self) -> None:
        if self._active:
            for file in (self._metrics, self._previews, self._log, self._board):
                file.close()


def published_name(kind: str, name: str) -> tuple[str, str]:
    """A figure's name outside the run, and its task.

    ``loss/asr`` of a training step is ("loss", "asr"), ``asr/cer`` of a validation is ("validation_cer", "asr"), and
    ``sec`` of an epoch is ("epoch_sec", "").
    """
    parts = name.split("/")
    task = next((part for part in parts if part in TASKS), "")
    words = [part for part in parts if part != task]
    return "_".join(words if kind == "train" else [kind, *words]), task


def _shown(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return entry["prompt"] or "(audio)", entry["reference"], entry["prediction"]


def _cell(text: str) -> str:
    """Text as a cell of a Markdown table, whatever is in it."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").split())


def _reopened(path: Path, first_step: int) -> TextIO:
    """A file of records, ready to go on after those of the steps that count."""
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= first_step]
    write_atomically(path, "".join(line + "\n" for line in kept).encode())  # a kill here costs no earlier record
    return open(path, "a", encoding="utf-8")  # open for the life of the run


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file that were written to their end."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [line for line in lines if _is_json(line)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read_metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """All records of one kind, in the order of steps."""
    records = [json.loads(line) for line in _whole_lines(run_dir / METRICS)]
    return [record for record in records if record["kind"] == kind]
