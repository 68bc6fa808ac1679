"""Two training processes under Ray Train beside the same loop under torchrun: what Ray costs a step.

One model and one set of rows (those of train.py), packed batches, two epochs, each process on one core. The rate leaves
out the first few steps, and starting processes does not count; how long a run takes as a whole is printed besides.
Prints a table and one JSON line; data_wait is the share of a step in which the loop waited for its batches.

    python benchmarks/workers.py --rows 192
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from train import BATCH_ROWS, features_of, write_model, write_rows

from voxray.batches.rank import Worker
from voxray.commands.train import run_training
from voxray.config.train import MultitaskSettings
from voxray.recipes import multitask
from voxray.training.records import read_metrics

FIRST_STEPS = 4  # in which memory is allocated and kernels are chosen


def settings_of(model_id: str, manifest: str, run_dir: Path, features_dir: Path, pack_tokens: int) -> MultitaskSettings:
    values = {"train_jsonl": manifest, "model_id": model_id, "output_dir": str(run_dir), "epochs": 2, "lr": 1e-4}
    values |= {"batching": "packed", "pack_tokens": pack_tokens, "features_dir": str(features_dir), "num_workers": 2}
    return MultitaskSettings.model_validate({**values, "lora_dropout": 0.0, "log_steps": 10**6, "num_actors": 1})


def under_torchrun() -> None:
    """What torchrun starts: one rank of the recipe."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    settings = MultitaskSettings.model_validate_json(Path(os.environ["BENCHMARK_SETTINGS"]).read_text())
    data = multitask.TrainingData((Path(os.environ["BENCHMARK_SET"]),), ())
    multitask.train(settings, Path(settings.output_dir), data, Worker(dist.get_rank(), dist.get_world_size()))
    dist.destroy_process_group()


def measured(run_dir: Path) -> dict[str, Any]:
    """Steps a second and share of waiting, of a run."""
    records = read_metrics(run_dir, "train")[FIRST_STEPS:]
    seconds = np.array([record["sec"] for record in records])
    waits = np.array([record["data_wait"] for record in records])
    losses = [record["loss"] for record in records]
    return {"steps_per_sec": len(records) / seconds.sum(), "data_wait": waits @ seconds / seconds.sum(), "loss": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=192)
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, model_id = write_rows(folder, flags.rows), write_model(folder / "model", 4096)
        features = features_of(manifest, model_id, folder / "f")
        budget = max(round(float(features.num_tokens.mean()) * BATCH_ROWS), int(features.num_tokens.max()))
        found, took = {}, {}
        for kind in ("torchrun", "ray"):
            run_dir = folder / kind
            run_dir.mkdir()
            settings, began = settings_of(model_id, manifest, run_dir, folder / "f", budget), time.perf_counter()
            if kind == "ray":
                run_training(settings)
            else:
                (folder / "settings.json").write_text(settings.model_dump_json())
                told = {"BENCHMARK_SETTINGS": str(folder / "settings.json"), "BENCHMARK_SET": str(features.folders[0])}
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
                subprocess.run([*command, __file__], env={**os.environ, **told, "OMP_NUM_THREADS": "1"}, check=True)
            took[kind], found[kind] = time.perf_counter() - began, measured(run_dir)
    difference = max(abs(a - b) for a, b in zip(found["ray"].pop("loss"), found["torchrun"].pop("loss"), strict=True))
    print("          steps/s  data_wait  whole run (s)")
    for kind, row in found.items():
        print(f"{kind:8}  {row['steps_per_sec']:7.2f}  {row['data_wait']:9.2%}  {took[kind]:13.0f}")
    ratio = found["ray"]["steps_per_sec"] / found["torchrun"]["steps_per_sec"]
    print(f"ray to torchrun {ratio:.3f}; largest difference of a loss {difference:.1e}")
    print(json.dumps({"benchmark": "workers", "ratio": ratio, "loss_difference": difference, **found}))


if __name__ == "__main__":
    under_torchrun() if "BENCHMARK_SETTINGS" in os.environ else main()
