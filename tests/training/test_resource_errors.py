"""What a machine does to a run: no memory, no room on the disk, about to be taken away."""

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

from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError
from voxray.recipes import multitask
from voxray.runs.layout import list_checkpoints
from voxray.training import loop
from voxray.training.callbacks import Callbacks
from voxray.training.resource_errors import explain_resource_errors, memory_advice

ROOT = Path(__file__).parents[2]


def settings(output_dir: Path, **changes: Any) -> MultitaskSettings:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "output_dir": str(output_dir)}
    return MultitaskSettings.model_validate({**values, "max_steps": 6, "save_steps": 100, **changes})


@pytest.fixture(scope="module")
def data(small: dict[str, str], make_features: Callable) -> multitask.TrainingData:
    return multitask.TrainingData(make_features(small["tqa.train"]), ())


def test_a_machine_about_to_go_saves_just_in_time(
    data: multitask.TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look is a barrier in Ray, so it is taken from time to time only; a notice saves at that step."""
    looks = iter([False, False, True, True, False, False])
    monkeypatch.setattr(loop, "LOOK_SEC", -1.0)
    result = multitask.train(settings(tmp_path), tmp_path, data, Worker(), Callbacks(is_leaving=lambda: next(looks)))
    assert result["finished"] and [step for step, _ in list_checkpoints(tmp_path)] == [3, 4, 6]
    assert "a machine is about to go: saved at step 3" in (tmp_path / "train.log").read_text()
    monkeypatch.setattr(loop, "LOOK_SEC", 1000.0)

    def never() -> bool:
        raise AssertionError("asked too early")

    multitask.train(settings(tmp_path / "b"), make(tmp_path / "b"), data, Worker(), Callbacks(is_leaving=never))


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


PROBE = """
import resource, sys
from pathlib import Path
from voxray.config.train import MultitaskSettings
from voxray.recipes import multitask
from voxray.training import loop
from voxray.batches.rank import Worker
import transformers.models.llama.modeling_llama, transformers.models.voxtral.modeling_voxtral
import peft, torch.utils.tensorboard
inner = loop.train_step
def limited(*args):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + (24 << 20), -1))
    return inner(*args)
loop.train_step = limited
run_dir = Path(sys.argv[1])
settings = MultitaskSettings(train_jsonl="unused", model_id=sys.argv[2], num_workers=0, output_dir=sys.argv[1],
                             per_device_bsz=64, max_steps=1, loader_workers=0)
try:
    multitask.train(settings, run_dir, multitask.TrainingData(tuple(map(Path, sys.argv[3:])), ()), Worker())
except Exception as error:
    print(type(error).__name__, error)
"""


def test_lack_of_memory_says_what_to_lower(tmp_path: Path, small: dict[str, str], make_features: Callable) -> None:
    """A real allocation that fails, in a process that may not grow."""
    sets = make_features(small["asr.train"], small["sqa.train"], small["tqa.train"])
    command = [sys.executable, "-c", PROBE, str(tmp_path), TINY, *map(str, sets)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    last = done.stdout.splitlines()[-1] if done.stdout else done.stderr
    assert last.startswith("RunError out of memory: lower --per_device_bsz (now 64) and raise --grad_accum; "), last
    assert "--grad_ckpt" in last and "--quantize 4bit" in last


def test_advice_names_what_is_not_in_use_yet(tmp_path: Path) -> None:
    used = settings(tmp_path, batching="packed", bf16=True, grad_ckpt=True, quantize="4bit")
    assert memory_advice(used) == "lower --pack_tokens (now 4096); or lower --max_len (now 1280)"
    with (
        pytest.raises(RunError, match=r"^out of memory: lower --per_device_bsz"),
        explain_resource_errors(settings(tmp_path)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="size mismatch"), explain_resource_errors(settings(tmp_path)):
        raise RuntimeError("size mismatch")


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """Linux' own device for this: whatever is written to it, the disk is full."""
    line = r"No space left on device; make room, the same command goes on$"
    with (
        pytest.raises(RunError, match=line),
        explain_resource_errors(settings(tmp_path)),
        open("/dev/full", "w") as file,
    ):
        file.write("x" * 10)
        file.flush()
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
