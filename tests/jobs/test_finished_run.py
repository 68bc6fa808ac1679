"""The same command on a finished run prints its result and trains nothing; any change of what decides it trains."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, manifest
from helpers.running import parse_only

from voxray.commands import train as command
from voxray.config.train import TrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(folder: Path, *flags: str, steps: int = 1) -> TrainSettings:
    argv = ["--model_id", TINY, "--train_jsonl", str(folder / "train.jsonl"), "--val_jsonl", manifest("tqa.val")]
    argv += ["--output_dir", str(folder / "run"), "--features_cache_dir", str(folder / "f"), "--num_workers", "0"]
    return parse_only("train_text", [*argv, "--max_steps", str(steps), "--eval_max_rows", "1", *flags])


def test_a_finished_run_is_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(manifest("tqa.val"), tmp_path / "train.jsonl")
    trained: list[Any] = []
    train = command.training_data
    monkeypatch.setattr(command, "training_data", lambda run, **options: trained.append(run) or train(run, **options))
    result = command.run_training(settings(tmp_path))
    first = capsys.readouterr().out
    assert command.run_training(settings(tmp_path)) == result and len(trained) == 1
    again = capsys.readouterr().out
    assert f"this run is finished; --overwrite trains anew: {tmp_path}/run" in again
    assert first[first.index("trained: 1 steps") :] == again[again.index("trained: 1 steps") :], (
        "the same next commands"
    )

    assert command.run_training(settings(tmp_path, steps=2))["steps"] == 2 and len(trained) == 2
    command.run_training(settings(tmp_path, "--overwrite", steps=2))
    assert len(trained) == 3
    shutil.rmtree(tmp_path / "run" / "adapter")
    command.run_training(settings(tmp_path, steps=2))
    assert len(trained) == 4 and (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(Exception, match="other"):
        command.run_training(settings(tmp_path, steps=2))
    assert len(trained) == 5


def test_rows_that_change_during_a_run_are_not_those_that_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest_path = tmp_path / "train.jsonl"
    shutil.copy(manifest("tqa.val"), manifest_path)
    train = command.train

    def change_and_train(*args: Any) -> Any:
        manifest_path.write_text(manifest_path.read_text(encoding="utf-8") * 2, encoding="utf-8")
        return train(*args)

    with monkeypatch.context() as patch:
        patch.setattr(command, "train", change_and_train)
        command.run_training(settings(tmp_path))
    with pytest.raises(Exception, match="other"):
        command.run_training(settings(tmp_path))
