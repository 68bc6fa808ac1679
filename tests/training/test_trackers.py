"""Weights & Biases and MLflow for real, without network: they hold what metrics.jsonl holds, also after a resume."""

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from helpers.training import train as train_here

from voxray.batches.rank import Worker
from voxray.commands import train as job
from voxray.config.train import MultitaskSettings
from voxray.core.errors import SettingsError
from voxray.recipes.training_data import TrainingData
from voxray.training.callbacks import Callbacks
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(small: dict[str, str], make_features: Callable) -> TrainingData:
    return TrainingData(make_features(small["tqa.train"]), make_features(small["tqa.val"]))


def settings(output_dir: Path, report_to: str, **changes: Any) -> MultitaskSettings:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "output_dir": str(output_dir)}
    values |= {"max_steps": 2, "eval_steps": 2, "eval_max_rows": 2, "eval_max_new_tokens": 4, "report_to": report_to}
    return MultitaskSettings.model_validate({**values, **changes})


def train_twice(folder: Path, data: TrainingData, report_to: str) -> Path:
    """Two steps, and two more after a resume."""
    run_dir = folder / "my-run"
    run_dir.mkdir()
    for max_steps in (2, 4):
        train_here(settings(folder, report_to, max_steps=max_steps), run_dir, data, Worker(), Callbacks())
    return run_dir


def recorded(run_dir: Path, kind: str, name: str) -> dict[int, float]:
    return {record["step"]: record[name] for record in read_metrics(run_dir, kind)}


def test_mlflow_holds_the_records(tmp_path: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = train_twice(tmp_path, data, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{run_dir / 'mlflow.db'}")
    assert f"of sqlite:///{run_dir / 'mlflow.db'}\n" in (run_dir / "train.log").read_text()
    run = client.get_run(json.loads((run_dir / "mlflow.json").read_text())["id"])
    assert run.info.run_name == "my-run" and run.info.status == "FINISHED" and run.data.params["max_steps"] == "2"
    for kind, name in (("train", "loss"), ("validation", "tqa/rouge_l")):
        history = client.get_metric_history(run.info.run_id, f"{kind}/{name}")
        assert {metric.step: metric.value for metric in history} == pytest.approx(recorded(run_dir, kind, name))
    assert not (run_dir / "tensorboard").exists()
    assert len(list((run_dir / "mlflow").rglob("step-00000*.md"))) == 2, "a page of previews for each validation"
    assert not list(Path.cwd().glob("mlruns")), "nothing is left where the job was started"


def test_wandb_holds_the_records(tmp_path: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_NAME", "another name")
    names: list[str] = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: names.append(options["name"]) or init(**options))
    run_dir = train_twice(tmp_path, data, "tensorboard,wandb")
    assert names == ["another name"] * 2
    log = (run_dir / "train.log").read_text()
    assert f"charts: tensorboard --logdir {run_dir / 'tensorboard'}\n" in log
    assert f"charts: Weights & Biases: wandb sync {run_dir / 'wandb' / 'offline-run-'}" in log
    ids = {path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")}
    assert ids == {json.loads((run_dir / "wandb.json").read_text())["id"]}, "a resumed run continues its run"
    losses: dict[int, float] = {}
    for _ in range(100):  # W&B's own process writes the file
        for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb")):
            losses |= {int(row["step"]): row["train/loss"] for row in history(path) if "train/loss" in row}
        if len(losses) == 4:
            break
        time.sleep(0.1)
    assert losses == pytest.approx(recorded(run_dir, "train", "loss")) and set(losses) == {1, 2, 3, 4}
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))


def history(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that W&B writes offline."""
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    rows = []
    for content in leveldb_log(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(content)
        except DecodeError:  # not whole yet
            continue
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    return rows


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format: parts of records in blocks of 32 KiB, after a header of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_none_writes_no_events(tmp_path: Path, data: TrainingData) -> None:
    train_here(settings(tmp_path, "none"), tmp_path, data, Worker(), Callbacks())
    assert not (tmp_path / "tensorboard").exists() and read_metrics(tmp_path, "train")


def test_names_and_missing_packages(tmp_path: Path, small: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="swanlab: must be none, or some of tensorboard, wandb, mlflow"):
        settings(tmp_path, "swanlab,wandb")
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"--report_to wandb: needs wandb.*pip install voxray\[wandb\]"):
        job.run_training(settings(tmp_path / "run", "wandb", train_jsonl=small["tqa.train"]))
