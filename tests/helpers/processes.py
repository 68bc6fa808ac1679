"""Train in several processes over gloo, without Ray."""

import itertools
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
from voxray.recipes import run_stage
from voxray.recipes.run_context import RunContext
from voxray.recipes.training_data import TrainingData
from voxray.training import loss_scaling
from voxray.training.loop import StopSignals, TrainState
from voxray.training.records import read_metrics

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"strategy": "fsdp"},
    "zero2": {"strategy": "deepspeed"},
    "zero3": {"strategy": "deepspeed", "zero_stage": 3},
}
"""{name: settings} of all ways to train in several processes."""
SHARDINGS = [STRATEGIES[name] for name in ("fsdp", "zero2", "zero3")]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        first_scale: Initial loss scale of a float16 run.
        poisoned: Rows whose audio is read as NaN.
        stop_after: Stop the run after this many steps; 0 does not stop it.
        after: Checkpoint of another run to resume from.
        inspect: Called on every worker with the settings and the trained state, at the end.
    """

    settings: TrainSettings
    data: TrainingData
    first_scale: float = loss_scaling.FIRST_SCALE
    poisoned: Sequence[int] = ()
    stop_after: int = 0
    after: Path | None = None
    inspect: Callable[[TrainSettings, TrainState], None] | None = None


def run(settings: TrainSettings, data: TrainingData, num_workers: int = 1, **options: Any) -> list[dict[str, Any]]:
    """Train in ``settings.output_dir`` and return the training records of metrics.jsonl; ``options`` as in ``Job``."""
    return run_all([Job(settings, data, **options)], num_workers)[0]


def run_all(jobs: Sequence[Job], num_workers: int) -> list[list[dict[str, Any]]]:
    """``run`` for several jobs, in the same processes, because starting processes takes longer than a short run."""
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
        # processes are forked from one that has imported everything, because imports take longer than most runs
        multiprocessing.set_forkserver_preload(["voxray.commands.train"])
        mp.start_processes(_work, args=(num_workers, jobs), nprocs=num_workers, start_method="forkserver")
    return [read_metrics(Path(job.settings.output_dir), "train") for job in jobs]


def _work(rank: int, world_size: int, jobs: Sequence[Job]) -> None:
    torch.set_num_threads(1)
    rendezvous = Path(jobs[0].settings.output_dir) / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        needs_deepspeed = False
        for job in jobs:
            _train(job, Worker(rank, world_size))
            dist.barrier()
            needs_deepspeed = needs_deepspeed or job.settings.strategy == "deepspeed"
            assert ("deepspeed" in sys.modules) == needs_deepspeed, "imported only if needed"
    finally:
        dist.destroy_process_group()
        rendezvous.unlink(missing_ok=True)


def _train(job: Job, worker: Worker) -> None:
    run_dir = Path(job.settings.output_dir)
    if job.after and worker.is_first:
        shutil.copytree(job.after, run_dir / "checkpoints" / job.after.name)
    if job.after and worker.world_size > 1:
        dist.barrier()
    fit = run_stage.fit

    def watched(state: TrainState, *args: Any) -> int:
        steps = fit(state, *args)
        if job.inspect:
            job.inspect(job.settings, state)
        return steps

    with _faults(job), mock.patch.object(run_stage, "fit", watched):
        run_stage.train(RunContext.create(job.settings, run_dir=run_dir, worker=worker), job.data)


@contextmanager
def _faults(job: Job) -> Iterator[None]:
    """Patch the initial loss scale, poisoned rows and the stop after some steps."""
    read_row, steps = Features.row, itertools.count(1)

    def poisoned_row(features: Features, number: int) -> FeatureRow:
        row = read_row(features, number)
        return replace(row, audio=row.audio * float("nan")) if number in job.poisoned else row

    def local_votes(signals: StopSignals) -> list[float]:
        return [float(next(steps) == job.stop_after), 0.0]

    with (
        mock.patch.object(Features, "row", poisoned_row),
        mock.patch.object(loss_scaling, "FIRST_SCALE", job.first_scale),
        mock.patch.object(StopSignals, "local", local_votes),
    ):
        yield
