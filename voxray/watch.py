"""What the driver does while a run is under way: show its lines and its progress, and pass on the wish to stop."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from voxray.terminal import Bar, console, progress_bar
from voxray.training.loop import STOP_FILE
from voxray.training.monitor import LOG, METRICS


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
def watched(run_dir: Path) -> Iterator[None]:
    """Show meanwhile what the first worker writes: its log lines, and a bar from its metrics."""
    log, metrics = _Tail(run_dir / LOG), _Tail(run_dir / METRICS)
    total, done = 0, threading.Event()

    def show(bar: Bar) -> None:
        nonlocal total
        for line in log.new_lines():
            bar.say(line)
            total = _total_steps(line) or total
        for line in metrics.new_lines():
            record = json.loads(line)
            if record["kind"] == "train" and total:
                bar.update(record["step"], total)

    def follow(bar: Bar) -> None:
        while not done.wait(0.3):
            show(bar)

    with progress_bar("training") as bar:
        thread = threading.Thread(target=follow, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            show(bar)


def _total_steps(line: str) -> int:
    """The number of steps in ``starting at step 0 of 120``."""
    words = line.split()
    return int(words[-1]) if words[:1] and words[0] in {"starting", "going"} and words[-1].isdigit() else 0


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
