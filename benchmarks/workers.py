"""Compare two training processes under Ray Train with the same loop under torchrun, to measure Ray's cost per step.

Model and rows are those of train.py, with packed batches, two epochs, and one core per process. The rate excludes the
first few steps and the start of the processes; the time of the whole run is printed as well. ``data_wait`` is the share
of a step in which the loop waited for its batches. Prints a table and one JSON line.

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
from train import BATCH_ROWS, make_features, write_model, write_rows

from voxray.batches.rank import Worker
from voxray.commands.train import run_training
from voxray.config.train import MultitaskSettings
from voxray.recipes.run_context import RunContext
from voxray.recipes.run_stage import train
from voxray.recipes.training_data import TrainingData
from voxray.training.records import read_metrics

FIRST_STEPS = 4  # not measured: memory is allocated and kernels are chosen


def make_settings(
    model_id: str, manifest: str, run_dir: Path, features_dir: Path, pack_tokens: int
) -> MultitaskSettings:
    values = {"train_jsonl": manifest, "model_id": model_id, "output_dir": str(run_dir), "epochs": 2, "lr": 1e-4}
    values |= {"batching": "packed", "pack_tokens": pack_tokens, "features_dir": str(features_dir), "num_workers": 2}
    return MultitaskSettings.model_validate({**values, "lora_dropout": 0.0, "log_steps": 10**6, "num_actors": 1})


def run_torchrun_rank() -> None:
    """One rank of the recipe, in a process that torchrun started."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    settings = MultitaskSettings.model_validate_json(Path(os.environ["BENCHMARK_SETTINGS"]).read_text())
    data = TrainingData((Path(os.environ["BENCHMARK_SET"]),), ())
    worker = Worker(dist.get_rank(), dist.get_world_size())
    train(RunContext.create(settings, worker=worker), data)
    dist.destroy_process_group()


def read_rates(run_dir: Path) -> dict[str, Any]:
    """{"steps_per_sec", "data_wait", "loss"} of a finished run."""
    records = read_metrics(run_dir, "train")[FIRST_STEPS:]
    seconds = np.array([record["sec"] for record in records])
    waits = np.array([record["data_wait"] for record in records])
    losses = [record["loss"] for record in records]
    return {"steps_per_sec": len(records) / seconds.sum(), "data_wait": waits @ seconds / seconds.sum(), "loss": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=192, help="rows per epoch")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest, model_id = write_rows(folder, flags.rows), write_model(folder / "model", 4096)
        features = make_features(manifest, model_id, folder / "f")
        budget = max(round(float(features.num_tokens.mean()) * BATCH_ROWS), int(features.num_tokens.max()))
        rates, run_sec = {}, {}
        for launcher in ("torchrun", "ray"):
            run_dir = folder / launcher
            run_dir.mkdir()
            settings = make_settings(model_id, manifest, run_dir, folder / "f", budget)
            start_sec = time.perf_counter()
            if launcher == "ray":
                run_training(settings)
            else:
                (folder / "settings.json").write_text(settings.model_dump_json())
                variables = {
                    "BENCHMARK_SETTINGS": str(folder / "settings.json"),
                    "BENCHMARK_SET": str(features.folders[0]),
                }
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
                subprocess.run(
                    [*command, __file__], env={**os.environ, **variables, "OMP_NUM_THREADS": "1"}, check=True
                )
            run_sec[launcher], rates[launcher] = time.perf_counter() - start_sec, read_rates(run_dir)
    difference = max(abs(a - b) for a, b in zip(rates["ray"].pop("loss"), rates["torchrun"].pop("loss"), strict=True))
    print("          steps/s  data_wait  whole run (s)")
    for launcher, row in rates.items():
        print(f"{launcher:8}  {row['steps_per_sec']:7.2f}  {row['data_wait']:9.2%}  {run_sec[launcher]:13.0f}")
    ratio = rates["ray"]["steps_per_sec"] / rates["torchrun"]["steps_per_sec"]
    print(f"ray to torchrun {ratio:.3f}; largest difference of a loss {difference:.1e}")
    print(json.dumps({"benchmark": "workers", "ratio": ratio, "loss_difference": difference, **rates}))


if __name__ == "__main__":
    run_torchrun_rank() if "BENCHMARK_SETTINGS" in os.environ else main()
