"""Runs a recipe in several processes over gloo, without Ray."""

import multiprocessing
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from voxray.batches.rank import Worker
from voxray.config.train import TrainSettings
from voxray.features.reader import FeatureRow, Features
from voxray.recipes import run_stage as stage
from voxray.recipes.registry import RECIPES
from voxray.recipes.training_data import TrainingData
from voxray.training import loss_scaling as guard
from voxray.training.loop import StopSignals, TrainState
from voxray.training.records import read_metrics


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        first_scale: Loss scale that a float16 run begins with.
        poisoned: Rows whose audio is read as NaN.
        stop_after: Ask the run to stop after so many steps; 0 lets it end.
        after: Checkpoint of another run that this one goes on from.
        look: Called on every worker with what was trained, at the end.
    """

    settings: TrainSettings
    data: TrainingData
    first_scale: float = guard.FIRST_SCALE
    poisoned: Sequence[int] = ()
    stop_after: int = 0
    after: Path | None = None
    look: Callable[[TrainSettings, TrainState], None] | None = None


def run(settings: TrainSettings, data: TrainingData, num_workers: int = 1, **trouble: Any) -> list[dict[str, Any]]:
    """Train in ``settings.output_dir`` and return the training records of metrics.jsonl; ``trouble`` as in ``Job``."""
    return run_all([Job(settings, data, **trouble)], num_workers)[0]


def run_all(jobs: Sequence[Job], num_workers: int) -> list[list[dict[str, Any]]]:
    """The same for one run after the other in the same processes, whose start takes longer than a short run."""
    for job in jobs:
        Path(job.settings.output_dir).mkdir(parents=True, exist_ok=True)
    if num_workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for job in jobs:
                _train(job, Worker())
        finally:
            torch.set_num_threads(threads)
    else:
        # Forked from a process that has imported everything once and run nothing: imports take longer than most runs.
        multiprocessing.set_forkserver_preload(["voxray.commands.train"])
        mp.start_processes(_work, args=(num_workers, jobs), nprocs=num_workers, start_method="forkserver")
    return [read_metrics(Path(job.settings.output_dir), "train") for job in jobs]


def _work(rank: int, world_size: int, jobs: Sequence[Job]) -> None:
    torch.set_num_threads(1)
    rendezvous = Path(jobs[0].settings.output_dir) / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        asked = False
        for job in jobs:
            _train(job, Worker(rank, world_size))
            dist.barrier()
            asked = asked or job.settings.strategy == "deepspeed"
            assert ("deepspeed" in sys.modules) == asked, "for those alone who ask for it"
    finally:
        dist.destroy_process_group()
        rendezvous.unlink(missing_ok=True)


def _train(job: Job, worker: Worker) -> None:
    run_dir = Path(job.settings.output_dir)
    if job.after and worker.is_first:
        shutil.copytree(job.after, run_dir / "checkpoints" / job.after.name)
    if job.after and worker.world_size > 1:
        dist.barrier()
    fit = stage.fit

    def watched(trainee: TrainState, *args: Any) -> int:
        steps = fit(trainee, *args)
        if job.look:
            job.look(job.settings, trainee)
        return steps

    with _trouble(job), mock.patch.object(stage, "fit", watched):
        RECIPES[type(job.settings)](job.settings, run_dir, job.data, worker)


@contextmanager
def _trouble(job: Job) -> Iterator[None]:
    read, steps = Features.row, iter(range(1, 1_000_000))

    def row(features: Features, number: int) -> FeatureRow:
        found = read(features, number)
        return replace(found, audio=found.audio * float("nan")) if number in job.poisoned else found

    def flags(watch: StopSignals) -> list[float]:
        return [float(next(steps) == job.stop_after), 0.0]

    with (
        mock.patch.object(Features, "row", row),
        mock.patch.object(guard, "FIRST_SCALE", job.first_scale),
        mock.patch.object(StopSignals, "local", flags),
    ):
        yield
