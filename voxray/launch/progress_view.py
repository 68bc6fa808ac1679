"""What the driver does during a run: show its log lines and progress, and stop it on Ctrl-C."""

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
from voxray.runs.remote_sync import COPIES
from voxray.runs.run_folder import STOP_FILE
from voxray.training.records import LOG, METRICS

RECENT_STEPS = 50


@contextmanager
def stop_on_signal(run_dir: Path) -> Iterator[None]:
    """On the first SIGINT or SIGTERM, save the run and stop it; on the second, stop at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request_stop(number: int, frame: Any) -> None:
        if (run_dir / STOP_FILE).exists():
            raise KeyboardInterrupt
        (run_dir / STOP_FILE).touch()
        name = signal.Signals(number).name
        console.print(f"{name}: saving and stopping after this step; a second signal stops at once")

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        (run_dir / STOP_FILE).unlink(missing_ok=True)


@contextmanager
def show_progress(run_dir: Path) -> Iterator[None]:
    """Show the log lines of rank 0 within the block, and a progress bar from its metrics.

    If rank 0 is on another machine, they come from the copies that ``RemoteSync.copy_files`` makes.
    """
    log, metrics, pace = _Tail(run_dir, LOG), _Tail(run_dir, METRICS), Pace()
    done = threading.Event()

    def show(bar: Bar) -> None:
        lines, records = log.new_lines(), metrics.new_lines()
        for line in lines:
            bar.say(line)
            pace.read_log(line)
        for line in records:
            pace.read_record(line)
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
    """Progress of a run and the time left, from its log lines and records.

    The time left follows from the durations of the last ``RECENT_STEPS`` steps alone. So the estimate of a resumed run
    is as good as that of a new one, and it adapts quickly to steps of another duration, such as those of the next phase
    of a curriculum. Validation and saving are not included.

    Attributes:
        step: Steps done.
        total: Total steps; 0 while unknown.
    """

    def __init__(self) -> None:
        self.step = self.total = 0
        self._loss: float | None = None
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def read_log(self, line: str) -> None:
        """Read the steps from ``starting at step 0 of 120`` or ``resuming from step 60 of 120``; skip other lines."""
        if match := re.fullmatch(r"(?:starting at|resuming from) step (\d+) of (\d+)", line):
            self.step, self.total = int(match[1]), int(match[2])
            self._seconds.clear()

    def read_record(self, line: str) -> None:
        """Read one line of metrics.jsonl. Incomplete lines are skipped."""
        try:
            record = json.loads(line)
        except ValueError:
            return
        if isinstance(record, dict) and record.get("kind") == "train":
            self.step, self._loss = record["step"], record.get("loss")
            self._seconds.append(record.get("sec") or 0.0)

    def seconds_left(self) -> float | None:
        """Estimated seconds until the last step; None before the first step."""
        if not self._seconds:
            return None
        return max(0, self.total - self.step) * sum(self._seconds) / len(self._seconds)

    def note(self) -> str:
        """Loss and time left, for the end of the bar."""
        loss = "" if self._loss is None else f"loss {self._loss:.4f}  "
        left = self.seconds_left()
        return loss + ("" if left is None else f"{clock(left)} left")


def modified_ns(path: Path) -> int:
    """Time of a file's last change; 0 without the file."""
    return path.stat().st_mtime_ns if path.exists() else 0


class _Tail:
    """Reads the lines that were appended to a file of the run folder, or to its copy, since the last call."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._path, self._copy = run_dir / name, run_dir / COPIES / name
        self._before = modified_ns(self._path)
        self._offset = self._path.stat().st_size if self._before else 0

    def new_lines(self) -> list[str]:
        if modified_ns(self._path) == self._before and self._copy.is_file():
            self._path = self._copy  # this machine's file has not changed, so another machine writes it
        if not self._path.is_file():
            return []
        size = self._path.stat().st_size
        self._offset = min(self._offset, size)  # a resumed run first shortens its metrics
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return complete.decode("utf-8", "replace").splitlines()
