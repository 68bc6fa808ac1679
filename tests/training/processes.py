"""Runs the multitask recipe in several processes over gloo, without Ray."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from voxray.config.train import MultitaskSettings
from voxray.data.features import FeatureRow, Features
from voxray.recipes import multitask
from voxray.training import guard
from voxray.training.engine import Worker
from voxray.training.loop import Watch
from voxray.training.monitor import read_metrics


def run(
    settings: MultitaskSettings,
    data: multitask.Data,
    num_workers: int = 1,
    *,
    first_scale: float = guard.FIRST_SCALE,
    poisoned: Sequence[int] = (),
    stop_after: int = 0,
) -> list[dict[str, Any]]:
    """Train in ``settings.output_dir`` and return the training records of metrics.jsonl.

    Args:
        first_scale: Loss scale that a float16 run begins with.
        poisoned: Rows whose audio is read as NaN.
        stop_after: Ask the run to stop after so many steps; 0 lets it end.
    """
    run_dir, trouble = Path(settings.output_dir), (first_scale, poisoned, stop_after)
    run_dir.mkdir(parents=True, exist_ok=True)
    if num_workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with _trouble(*trouble):
                multitask.train(settings, run_dir, data, Worker())
        finally:
            torch.set_num_threads(threads)
    else:
        mp.spawn(_work, args=(num_workers, settings, run_dir, data, trouble), nprocs=num_workers)
    return read_metrics(run_dir, "train")


def _work(
    rank: int,
    world_size: int,
    settings: MultitaskSettings,
    run_dir: Path,
    data: multitask.Data,
    trouble: tuple[float, Sequence[int], int],
) -> None:
    torch.set_num_threads(1)
    rendezvous = run_dir / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        with _trouble(*trouble):
            multitask.train(settings, run_dir, data, Worker(rank, world_size))
    finally:
        dist.destroy_process_group()
        rendezvous.unlink(missing_ok=True)


@contextmanager
def _trouble(first_scale: float, poisoned: Sequence[int], stop_after: int) -> Iterator[None]:
    read, steps = Features.row, iter(range(1, 1_000_000))

    def row(features: Features, number: int) -> FeatureRow:
        found = read(features, number)
        return replace(found, audio=found.audio * float("nan")) if number in poisoned else found

    def flags(watch: Watch) -> list[float]:
        return [float(next(steps) == stop_after), 0.0]

    with (
        mock.patch.object(Features, "row", row),
        mock.patch.object(guard, "FIRST_SCALE", first_scale),
        mock.patch.object(Watch, "flags", flags),
    ):
        yield
