"""Runs the multitask recipe in several processes over gloo, without Ray."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from voxray.config.train import MultitaskSettings
from voxray.recipes import multitask
from voxray.training.engine import Worker
from voxray.training.monitor import read_metrics


def run(settings: MultitaskSettings, data: multitask.Data, num_workers: int = 1) -> list[dict[str, Any]]:
    """Train in ``settings.output_dir`` and return the training records of metrics.jsonl."""
    run_dir = Path(settings.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if num_workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            multitask.train(settings, run_dir, data, Worker())
        finally:
            torch.set_num_threads(threads)
    else:
        mp.spawn(_work, args=(num_workers, settings, run_dir, data), nprocs=num_workers)
    return read_metrics(run_dir, "train")


def _work(rank: int, world_size: int, settings: MultitaskSettings, run_dir: Path, data: multitask.Data) -> None:
    torch.set_num_threads(1)
    rendezvous = run_dir / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        multitask.train(settings, run_dir, data, Worker(rank, world_size))
    finally:
        dist.destroy_process_group()
        rendezvous.unlink(missing_ok=True)
