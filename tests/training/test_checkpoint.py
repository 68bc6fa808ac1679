"""Checkpoints: which are kept, and that a failed one leaves the others intact."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from voxray.batches.rank import Worker
from voxray.core.content_hash import CHECKSUMS
from voxray.core.errors import RunError
from voxray.models.adapters.lora import CONFIG, WEIGHTS
from voxray.models.voxtral.family import Voxtral
from voxray.recipes.build_model import resume
from voxray.runs.layout import CARD, checkpoint_folder, list_checkpoints
from voxray.training import checkpoint
from voxray.training.checkpoint import CheckpointWriter, Progress, publish_adapter, read_optimizer_state, read_progress
from voxray.training.engine import CheckpointState, DataParallel


class Model(torch.nn.Linear):
    """A stand-in for a fully tuned model, whose configuration names its base."""

    class config:  # as in transformers
        name_or_path = "base"


STATE = CheckpointState({"weight": torch.ones(2, 2)}, {"weight": {"exp_avg": torch.zeros(2, 2)}})


def steps(run_dir: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run_dir)]


def write(writer: CheckpointWriter, step: int, best_step: int = 0, state: CheckpointState = STATE) -> None:
    writer.write(Model(2, 2), state, Progress(step, 1, "data"), best_step)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=2)
    for step in range(1, 7):
        write(writer, step, best_step=min(step, 2))
    writer.wait()
    assert steps(tmp_path) == [2, 5, 6]
    assert read_progress(checkpoint_folder(tmp_path, 6)) == Progress(6, 1, "data")
    assert torch.equal(read_optimizer_state(checkpoint_folder(tmp_path, 6))["weight"]["exp_avg"], torch.zeros(2, 2))
    writer.close()


def test_writing_does_not_block_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter = checkpoint.save_adapter

    def save_slowly(*args: object) -> None:
        time.sleep(0.5)
        save_adapter(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_adapter", save_slowly)
    writer, started_at = CheckpointWriter(tmp_path, keep_last=3), time.monotonic()
    write(writer, 1)
    assert time.monotonic() - started_at < 0.3 and steps(tmp_path) == []
    write(writer, 2)
    assert steps(tmp_path) == [1], "the second write waits for the first"
    writer.wait()
    assert steps(tmp_path) == [1, 2]


def test_the_next_step_does_not_change_a_pending_checkpoint() -> None:
    model = Model(2, 2)
    engine = DataParallel(model, Voxtral(), Worker(), lr=0.1, weight_decay=0.0)
    states = []
    for _ in range(2):
        engine.backward(model(torch.ones(1, 2)).sum(), last=True)
        engine.reduce(torch.zeros(0), scale=1.0, max_norm=0.0)
        engine.apply(0.1)
        states.append(engine.checkpoint_state())
    for name in ("weight", "bias"):
        assert not torch.equal(states[0].tensors[name], states[1].tensors[name])
        assert not torch.equal(states[0].optimizer_state[name]["exp_avg"], states[1].optimizer_state[name]["exp_avg"])


def test_partial_checkpoints_of_a_kill_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".step-000004.part").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000003").mkdir()
    CheckpointWriter(tmp_path, keep_last=3)
    assert not (tmp_path / "checkpoints" / ".step-000004.part").exists()
    assert steps(tmp_path) == [], "a folder without progress.json is not a checkpoint"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_keeps_earlier_checkpoints(small_disk: Path) -> None:
    writer, big = CheckpointWriter(small_disk, keep_last=3), CheckpointState({"weight": torch.ones(2**19)}, {})
    write(writer, 1)
    write(writer, 2, state=big)
    message = r"step-000002: cannot write the checkpoint: .*; the same command resumes from step 1$"
    with pytest.raises(RunError, match=message):
        writer.wait()
    assert steps(small_disk) == [1] and os.listdir(small_disk / "checkpoints") == ["step-000001"]
    write(writer, 3)
    writer.wait()
    assert steps(small_disk) == [1, 3], "smaller checkpoints still fit"


def test_the_published_adapter_is_replaced_as_a_whole(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=3)
    write(writer, 1)
    writer.wait()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    publish_adapter(checkpoint_folder(tmp_path, 1), tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == sorted([CONFIG, WEIGHTS, CHECKSUMS])
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["tuning"] == "full"


def test_an_adapter_has_its_whole_card_or_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=3)
    write(writer, 1)
    writer.wait()

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_checksums", killed)
        publish_adapter(checkpoint_folder(tmp_path, 1), tmp_path / "adapter", "# Card")
    assert not (tmp_path / "adapter").exists()
    publish_adapter(checkpoint_folder(tmp_path, 1), tmp_path / "adapter", "# Card")
    assert (tmp_path / "adapter" / CARD).read_text() == "# Card"
    assert CARD not in json.loads((tmp_path / "adapter" / CHECKSUMS).read_text())


@pytest.mark.parametrize("name", [WEIGHTS, "optimizer.pt", "progress.json", CONFIG])
def test_a_flipped_bit_stops_the_resume(tmp_path: Path, name: str) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=3)
    write(writer, 1)
    writer.wait()
    path = checkpoint_folder(tmp_path, 1) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=rf"step-000001: damaged checkpoint \({name}\); delete the folder to resume"):
        resume(tmp_path, Model(2, 2), Progress(0, 1, "data"))


def test_the_data_of_an_earlier_version_is_recognised(tmp_path: Path) -> None:
    """Its checkpoints hold a fingerprint of lines and clips alone. The run goes on with the present one."""
    writer = CheckpointWriter(tmp_path, keep_last=3)
    write(writer, 1)
    writer.wait()
    start = Progress(0, 1, "lines, clips and front end")
    with pytest.raises(RunError, match="the training data has changed"):
        resume(tmp_path, Model(2, 2), start)
    model = Model(2, 2)
    model.bias.requires_grad_(False)
    progress, _ = resume(tmp_path, model, start, "data")
    assert (progress.step, progress.data) == (1, start.data)


def test_an_optimizer_state_that_is_not_finite_stops_the_resume(tmp_path: Path) -> None:
    torch.save({"weight": {"exp_avg": torch.tensor([1.0, float("nan")])}}, tmp_path / "optimizer.pt")
    with pytest.raises(RunError, match=r"optimizer.pt: weight \(exp_avg\) has values that are infinite"):
        read_optimizer_state(tmp_path)
