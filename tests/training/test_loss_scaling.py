"""Steps whose loss or gradients are not finite, and the loss scale of float16."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers import processes

from voxray.batches.packing import Batching
from voxray.batches.plan import Plan
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError
from voxray.features.reader import Features
from voxray.recipes.training_data import TrainingData
from voxray.training.loss_scaling import GROWTH_STEPS, LossScaler
from voxray.training.records import read_metrics

OVERFLOWS = 2.0**20  # gradients of the tiny model overflow float16 at this loss scale, and for a few steps after


@pytest.fixture(scope="module")
def data(small: dict[str, str], make_features: Callable) -> TrainingData:
    return TrainingData(make_features(small["asr.train"], small["tqa.train"]), ())


def settings(output_dir: Path, **changes: Any) -> MultitaskSettings:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "lora_dropout": 0.0, "lr": 1e-3}
    values |= {"max_steps": 6, "per_device_bsz": 2, "output_dir": str(output_dir)}
    return MultitaskSettings.model_validate({**values, **changes})


def column(records: list[dict[str, Any]], name: str) -> list[Any]:
    return [record[name] for record in records]


def sha(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_the_scale_halves_on_overflow_and_doubles_after_many_good_steps() -> None:
    scaler = LossScaler(scale=8.0)
    assert not scaler.check_step(1.0, math.inf, fp16=True)
    assert (scaler.scale, scaler.skipped, scaler.bad_steps) == (4.0, 1, 0)
    for _ in range(GROWTH_STEPS):
        assert scaler.check_step(1.0, 1.0, fp16=True)
    assert (scaler.scale, scaler.good_steps) == (8.0, 0)
    assert not scaler.check_step(math.nan, math.nan, fp16=True)
    assert (scaler.scale, scaler.bad_steps) == (8.0, 1), "a smaller scale does not help if the loss is NaN"
    low = LossScaler(scale=1.0)
    assert not low.check_step(1.0, math.nan, fp16=True)
    assert (low.scale, low.bad_steps) == (1.0, 1), "the lowest scale cannot be halved"
    for _ in range(GROWTH_STEPS):
        low.check_step(1.0, 1.0, fp16=False)
    assert (low.scale, low.bad_steps) == (1.0, 0), "without float16 there is no scale"


def test_the_scale_does_not_change_loss_and_gradients(data: TrainingData, tmp_path: Path) -> None:
    fp32 = processes.run(settings(tmp_path / "a", max_steps=2), data)
    fp16 = processes.run(settings(tmp_path / "b", max_steps=2, fp16=True), data)
    assert "loss_scale" not in fp32[0] and column(fp16, "loss_scale") == [2.0**16] * 2
    for name in ("loss", "grad_norm"):
        assert column(fp16, name) == pytest.approx(column(fp32, name), rel=0.02)
        assert column(fp16, name) != column(fp32, name)


def test_the_scale_is_in_the_checkpoint_and_resume_is_exact(data: TrainingData, tmp_path: Path) -> None:
    common = {"fp16": True, "lora_dropout": 0.1, "max_steps": 8, "save_steps": 4}
    straight = processes.run(settings(tmp_path / "a", **common), data, first_scale=OVERFLOWS)
    assert 0 < column(straight, "skipped")[-1] < 8, "some steps overflow and some do not"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000008")
    stored = json.loads((tmp_path / "b" / "checkpoints" / "step-000004" / "progress.json").read_text())["guard"]
    assert stored["scale"] == straight[3]["loss_scale"] < OVERFLOWS and stored["skipped"] == straight[3]["skipped"]
    resumed = processes.run(settings(tmp_path / "b", **common), data, first_scale=1.0)
    for name in ("loss", "loss_scale", "skipped", "grad_norm"):
        assert column(resumed, name) == column(straight, name)
    assert sha(tmp_path / "a" / "adapter") == sha(tmp_path / "b" / "adapter")


def speech_row(data: TrainingData, step: int) -> tuple[int, list[int]]:
    """A row with audio of a step with two microbatches of two rows, and all rows of its microbatch."""
    features = Features(data.train)
    plan = Plan(features.task, np.arange(len(features)), None, 0, Batching("fixed", microbatch_size=2), 2)
    microbatches = [microbatch.rows.tolist() for microbatch in plan.step_microbatches(step)]
    return next((row, rows) for rows in microbatches for row in rows if features.num_windows[row])


def test_a_bad_step_changes_nothing_and_is_counted(data: TrainingData, tmp_path: Path) -> None:
    row, _ = speech_row(data, 2)
    common = {"max_steps": 4, "save_steps": 1, "grad_accum": 2}
    records = processes.run(settings(tmp_path, **common), data, poisoned=(row,))
    assert column(records, "skipped") == [0, 0, 1, 1]
    assert records[2]["loss"] is None and records[3]["loss"] is not None
    checkpoints = [tmp_path / "checkpoints" / f"step-{step:06d}" for step in (2, 3, 4)]
    assert sha(checkpoints[0]) == sha(checkpoints[1]) != sha(checkpoints[2])
    before, after = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in checkpoints[:2])
    assert all(torch.equal(entry[key], after[name][key]) for name, entry in before.items() for key in entry)


@pytest.mark.slow
def test_all_workers_skip_and_stop_alike(data: TrainingData, tmp_path: Path) -> None:
    """The first steps overflow. Steps 5 and 6 have a bad row on one of two workers, so the run stops and names the rows
    of that forward pass. One process with the same microbatches does the same."""
    bad = [speech_row(data, step) for step in (4, 5)]
    faults = {"first_scale": OVERFLOWS, "poisoned": [row for row, _ in bad]}
    ids = ", ".join(Features(data.train).ids(sorted(bad[1][1])))
    message = "step 6: the loss or its gradients were not finite, 2 time(s) in a row (--max_bad_steps)"
    common = {"fp16": True, "max_bad_steps": 2, "max_steps": 9}
    with pytest.raises(RunError) as caught:
        processes.run(settings(tmp_path / "one", grad_accum=2, **common), data, **faults)
    assert str(caught.value) == f"{message}; rows of this step: {ids}"
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match=re.escape(str(caught.value))):
        processes.run(settings(tmp_path / "two", **common), data, num_workers=2, **faults)
    one, two = (read_metrics(tmp_path / name, "train") for name in ("one", "two"))
    assert column(one, "step") == [1, 2, 3, 4, 5, 6]
    assert 0 < one[3]["skipped"] < 4 and column(one, "skipped")[3:] == [one[3]["skipped"] + more for more in (0, 1, 2)]
    for name in ("skipped", "loss_scale"):
        assert column(two, name) == column(one, name)
    assert column(two, "loss")[:4] == pytest.approx(column(one, "loss")[:4], rel=5e-3)
