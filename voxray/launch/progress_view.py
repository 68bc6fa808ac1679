"""What the driver does while a run is under way: show its lines and its progress, and pass on the wish to stop."""

import json
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from voxray.core.console import Bar, clock, console, progress_bar
from voxray.runs.run_folder import STOP_FILE
from voxray.training.records import LOG, METRICS

RECENT_STEPS = 50


@contextmanager
def stop_on_signal(run_dir: Path) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM save the run and end it; the second ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if (run_dir / STOP_FILE).exists():
            raise KeyboardInterrupt
        (run_dir / STOP_FILE).touch()
        console.print(f"{signal.Signals(number).name}: saving and stopping after this step; once more stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        (run_dir / STOP_FILE).unlink(missing_ok=True)


@contextmanager
def show_progress(run_dir: Path) -> Iterator[None]:
    """Show meanwhile what the first worker writes: its log lines, and a bar from its metrics."""
    log, metrics, pace = _Tail(run_dir / LOG), _Tail(run_dir / METRICS), Pace()
    done = threading.Event()

    def show(bar: Bar) -> None:
        lines, records = log.new_lines(), metrics.new_lines()
        for line in lines:
            bar.say(line)
            pace.hear(line)
        for line in records:
            pace.record(line)
        if pace.total and (lines or records):
            bar.update(pace.step, pace.total, pace.note())

    def follow(bar: Bar) -> None:
        while not done.wait(0.3):
            show(bar)

    with progress_bar("training", own_eta=True) as bar:
        thread = threading.Thread(target=follow, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            show(bar)


class Pace:
    """Where a run stands and how long it still takes, from its lines and records.

    The time left follows from the seconds of the last steps alone: a run that goes on from step 900 is as sure of it as
    one that began, and steps of another length (a curriculum's next phase) are noticed soon. Validation and saving are
    not in it.

    Attributes:
        step: Steps done.
        total: Steps to do; 0 while it is not known.
    """

    def __init__(self) -> None:
        self.step = self.total = 0
        self._loss: float | None = None
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def hear(self, line: str) -> None:
        """Take note of ``starting at step 0 of 120`` or ``going on from step 60 of 120``."""
        if found := re.fullmatch(r"(?:starting at|going on from) step (\d+) of (\d+)", line):
            self.step, self.total = int(found[1]), int(found[2])
            self._seconds.clear()

    def record(self, line: str) -> None:
        """Take note of one line of metrics.jsonl; half of one is passed over."""
        try:
            record = json.loads(line)
        except ValueError:
            return
        if isinstance(record, dict) and record.get("kind") == "train":
            self.step, self._loss = record["step"], record.get("loss")
            self._seconds.append(record.get("sec") or 0.0)

    def seconds_left(self) -> float | None:
        """None before the first step."""
        if not self._seconds:
            return None
        return max(0, self.total - self.step) * sum(self._seconds) / len(self._seconds)

    def note(self) -> str:
        """Loss and time left, for the end of the bar."""
        loss = "" if self._loss is None else f"loss {self._loss:.4f}  "
        left = self.seconds_left()
        return loss + ("" if left is None else f"{clock(left)} left")


class _Tail:
    """Lines appended to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = path.stat().st_size if path.is_file() else 0

    def new_lines(self) -> list[str]:
        if not self._path.is_file():
            return []
        size = self._path.stat().st_size
        self._place = min(self._place, size)  # a resumed run shortens its metrics first
        with open(self._path, "rb") as file:
            file.seek(self._place)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._place += len(whole)
        return whole.decode("utf-8", "replace").splitlines()
