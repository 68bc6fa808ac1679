"""What a run writes about itself: metrics.jsonl, TensorBoard, and train.log with the lines a person reads."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS, LOG = "metrics.jsonl", "train.log"


class Monitor:
    """Writes a run's records; on other ranks than the first it does nothing.

    Args:
        run_dir: The run folder.
        first_step: Steps done before; records of later ones, written by a run that was cut off, are dropped, and a
            record of kind ``resume`` says how many steps those were.
        active: Whether this is rank 0.
    """

    def __init__(self, run_dir: Path, first_step: int, *, active: bool) -> None:
        self._active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = run_dir / METRICS
        before = _whole_lines(path)
        kept = [line for line in before if json.loads(line)["step"] <= first_step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115  # open for the life of the run
        self._log = open(run_dir / LOG, "a", encoding="utf-8")  # noqa: SIM115
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

    def say(self, text: str) -> None:
        """A line for people, shown on the driver's terminal too."""
        if self._active:
            self._log.write(text + "\n")
            self._log.flush()

    def close(self) -> None:
        if self._active:
            for file in (self._metrics, self._log, self._board):
                file.close()


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
