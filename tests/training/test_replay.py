"""--replay_jsonl: rows of the base's own kind of data among those of the training."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, manifest, read_rows, write_rows
from helpers.training import train

from voxray.batches import loader
from voxray.commands.train import run_training
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError
from voxray.features.reader import Features
from voxray.recipes.training_data import TrainingData
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


def values(output_dir: Path, **changes: Any) -> dict[str, Any]:
    defaults = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "output_dir": str(output_dir)}
    return {**defaults, "per_device_bsz": 2, "grad_accum": 2, "max_steps": 8, "replay_share": 0.25, **changes}


@pytest.fixture(scope="module")
def data(small, make_features) -> TrainingData:
    folders = make_features(*(small[name] for name in ("asr.train", "tqa.train", "sqa.train")))
    return TrainingData(folders[:2], (), replay=folders[2:])


@pytest.mark.parametrize("batching", ["fixed", "packed"])
def test_a_share_of_the_rows_is_replayed(data, tmp_path, batching, monkeypatch):
    """In packs and in padded batches. A run that stops in between ends with the same weights."""
    rows: list[str] = []
    read = loader.Loader.row

    def watched(self: Any, number: int, epoch: int) -> Any:
        row = read(self, number, epoch)
        rows.append(row.task)
        return row

    monkeypatch.setattr(loader.Loader, "row", watched)
    adapters = []
    for name, ends in (("whole", [8]), ("parts", [3, 8])):
        run_dir = tmp_path / name
        run_dir.mkdir()
        for end in ends:
            flags = {"max_steps": end, "batching": batching, "pack_tokens": 400, "lr_schedule": "constant"}
            settings = MultitaskSettings.model_validate(values(run_dir, replay_jsonl="unused-too", **flags))
            train(settings, run_dir, data)
        adapters.append((run_dir / "adapter" / "adapter_model.safetensors").read_bytes())
        assert re.search(r"data: .*, \d+ replay rows", (run_dir / "train.log").read_text())
    assert adapters[0] == adapters[1]
    assert 0.1 < rows.count("sqa") / len(rows) < 0.4
    assert any("loss/sqa" in record for record in read_metrics(tmp_path / "whole", "train"))


def test_the_job_reads_manifests_of_replay(tmp_path, small):
    """Their rows have features without variants, and the ledger names the ones that are left out."""
    bad = tmp_path / "old.jsonl"
    rows = read_rows(Path(manifest("sqa.train")))[:6]
    for row in rows:
        row["audio_path"] = str(Path(manifest("sqa.train")).parent / row["audio_path"])
    write_rows(bad, [*rows, {"audio_path": "missing.wav", "question": "q", "answer": "a"}])
    flags = values(tmp_path / "run", train_jsonl=small["asr.train"], replay_jsonl=str(bad), variants=2, max_steps=2)
    run_training(MultitaskSettings.model_validate(flags))
    assert "missing.wav" in (tmp_path / "run" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"replay_share": 0.5}, "--replay_share: needs --replay_jsonl"),
        ({"train_jsonl": "a.jsonl", "replay_jsonl": "a.jsonl"}, "a.jsonl: also in --train_jsonl"),
    ],
)
def test_flags_that_make_no_sense(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MultitaskSettings.model_validate(values(tmp_path, **flags))


def test_replay_without_a_row_to_train_on(tmp_path, small, data):
    """All rows of the replay are over --max_len."""
    longest = int(Features(data.train[:1]).num_tokens.min()) - 1
    settings = MultitaskSettings.model_validate(values(tmp_path, replay_jsonl="unused-too", max_len=longest))
    with pytest.raises(RunError, match="--replay_jsonl: no row is left to train on"):
        train(settings, tmp_path, TrainingData(data.train[1:], (), replay=data.train[:1]))
