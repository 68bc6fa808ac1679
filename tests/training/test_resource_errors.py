"""Runs on machines that lack memory or disk space, or are about to be taken away."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from helpers.training import train as train_here

from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError
from voxray.recipes.training_data import TrainingData
from voxray.runs.layout import list_checkpoints
from voxray.training import loop
from voxray.training.callbacks import Callbacks
from voxray.training.resource_errors import explain_resource_errors, memory_advice

ROOT = Path(__file__).parents[2]


def settings(output_dir: Path, **changes: Any) -> MultitaskSettings:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "output_dir": str(output_dir)}
    return MultitaskSettings.model_validate({**values, "max_steps": 6, "save_steps": 100, **changes})


@pytest.fixture(scope="module")
def data(small: dict[str, str], make_features: Callable) -> TrainingData:
    return TrainingData(make_features(small["tqa.train"]), ())


def test_a_checkpoint_is_saved_before_a_machine_leaves(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check is a barrier in Ray, so it is rare. After a notice, the run saves at that step."""
    answers = iter([False, False, True, True, False, False])
    monkeypatch.setattr(loop, "LEAVING_CHECK_SEC", -1.0)
    result = train_here(settings(tmp_path), tmp_path, data, Worker(), Callbacks(is_leaving=lambda: next(answers)))
    assert result["finished"] and [step for step, _ in list_checkpoints(tmp_path)] == [3, 4, 6]
    assert "a machine is about to leave: saved at step 3" in (tmp_path / "train.log").read_text()
    monkeypatch.setattr(loop, "LEAVING_CHECK_SEC", 1000.0)

    def never() -> bool:
        raise AssertionError("checked too early")

    (tmp_path / "b").mkdir()
    train_here(settings(tmp_path / "b"), tmp_path / "b", data, Worker(), Callbacks(is_leaving=never))


PROBE = """
import resource, sys
from pathlib import Path
from voxray.config.train import MultitaskSettings
from voxray.recipes import run_stage
from voxray.recipes.run_context import RunContext
from voxray.recipes.training_data import TrainingData
from voxray.training import loop
import transformers.models.llama.modeling_llama, transformers.models.voxtral.modeling_voxtral
import peft, torch.utils.tensorboard
train_step = loop.train_step
def limited(*args):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), -1))
    return train_step(*args)
loop.train_step = limited
run_dir = Path(sys.argv[1])
settings = MultitaskSettings(train_jsonl="unused", model_id=sys.argv[2], num_workers=0, output_dir=sys.argv[1],
                             per_device_bsz=64, max_steps=1, loader_workers=0)
try:
    data = TrainingData(tuple(map(Path, sys.argv[3:])), ())
    run_stage.train(RunContext.create(settings, run_dir=run_dir), data)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_out_of_memory_advises_which_settings_to_lower(
    tmp_path: Path, small: dict[str, str], make_features: Callable
) -> None:
    """A real allocation fails in a process with a memory limit."""
    sets = make_features(small["asr.train"], small["sqa.train"], small["tqa.train"])
    command = [sys.executable, "-c", PROBE, str(tmp_path), TINY, *map(str, sets)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    last = process.stdout.splitlines()[-1] if process.stdout else process.stderr
    assert last.startswith("RunError out of memory: lower --per_device_bsz (now 64) and raise --grad_accum; "), last
    assert "--grad_ckpt" in last and "--quantize 4bit" in last


def test_advice_leaves_out_settings_in_use(tmp_path: Path) -> None:
    memory_saving = settings(tmp_path, batching="packed", bf16=True, grad_ckpt=True, quantize="4bit", strategy="fsdp")
    assert memory_advice(memory_saving) == "lower --pack_tokens (now 4096); or lower --max_len (now 1280)"
    with (
        pytest.raises(RunError, match=r"^out of memory: lower --per_device_bsz"),
        explain_resource_errors(settings(tmp_path)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="size mismatch"), explain_resource_errors(settings(tmp_path)):
        raise RuntimeError("size mismatch")


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    """Every write to Linux' /dev/full fails as on a full disk."""
    message = r"No space left on device; free some space, then run the same command again$"
    with (
        pytest.raises(RunError, match=message),
        explain_resource_errors(settings(tmp_path)),
        open("/dev/full", "w") as file,
    ):
        file.write("x" * 10)
        file.flush()
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
