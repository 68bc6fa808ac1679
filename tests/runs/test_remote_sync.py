"""Results behind a URL, against S3's own API (moto's server, on the loopback interface): runs, shards and predictions.

A machine is a home folder here: another one knows nothing of the first but what is in the bucket.
"""

import hashlib
import json
import logging
import random
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from helpers.running import ROOT, Driver

from voxray.commands.evaluate import run_evaluation
from voxray.commands.train import run_training
from voxray.config.evaluate import EvaluateSettings
from voxray.config.preflight import PreflightTextSettings
from voxray.config.train import TextSettings
from voxray.core.errors import RunError, SettingsError
from voxray.core.storage import RemotePath
from voxray.evaluation.distribute import answer_rows
from voxray.evaluation.predictions import read_predictions
from voxray.generation.generate import SamplingParams
from voxray.generation.model import InferenceConfig
from voxray.launch.progress_view import show_progress
from voxray.preflight.check_run import Preflight
from voxray.runs.remote_sync import COPIES, RemoteSync
from voxray.training.records import read_metrics

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of an S3 server of this module's own."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a folder in a new bucket."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    name = f"b{hashlib.sha256(request.node.name.encode()).hexdigest()[:10]}"
    with urllib.request.urlopen(urllib.request.Request(f"http://{s3}/{name}", method="PUT"), timeout=10):
        pass
    return f"s3://{name}/all?endpoint_override={s3}&scheme=http&region=us-east-1"


Machine = Callable[[str], Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Go to a machine; returns its home."""

    def go(name: str) -> Path:
        monkeypatch.setenv("HOME", str(tmp_path / name))
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    return go


def settings(small: dict[str, str], **changes: Any) -> TextSettings:
    values = {"model_id": TINY, "train_jsonl": (small["tqa.train"],), "output_dir": "runs/a", "num_workers": 0}
    return TextSettings.model_validate(
        {**values, "max_steps": 4, "save_steps": 2, "lr_schedule": "constant", **changes}
    )


def names(url: str) -> set[str]:
    job_settings = TextSettings.model_validate({"train_jsonl": "x", "output_dir": url})
    remote_dir = RemoteSync.from_settings(job_settings).remote_dir
    assert isinstance(remote_dir, RemotePath)
    return set(remote_dir.walk())


def test_a_run_resumes_on_another_machine(
    one_thread: None, small: dict[str, str], bucket: str, machine: Machine, tmp_path: Path
) -> None:
    """Checkpoints, shards and metrics are in the bucket, and the adapter equals that of a run on one machine."""
    machine("first")
    run_training(settings(small, storage_path=bucket, max_steps=2))
    uploaded = names(bucket)
    assert {"runs/a/settings.json", "runs/a/metrics.jsonl", "runs/a/result.json"} <= uploaded
    assert {f"runs/a/checkpoints/step-000002/{name}" for name in ("progress.json", "optimizer.pt")} <= uploaded
    assert any(name.startswith("runs/a/features/") and name.endswith(".arrow") for name in uploaded)
    assert not any("STOP" in name or ".part" in name for name in uploaded)
    machine("second")
    again = settings(small, storage_path=bucket)
    run_training(again)
    machine("third")
    remote = RemoteSync.from_settings(again)
    remote.fetch()
    assert [record["step"] for record in read_metrics(remote.folder, "train")] == [1, 2, 3, 4]
    whole = settings(small, output_dir=str(tmp_path / "whole"))
    run_training(whole)
    weights = "adapter/adapter_model.safetensors"
    assert (remote.folder / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    with pytest.raises(SettingsError, match="holds a run with other settings: --seed"):
        run_training(settings(small, storage_path=bucket, seed=9))
    run_training(settings(small, storage_path=bucket, seed=9, max_steps=1, overwrite=True))
    assert {name.split("/")[3] for name in names(bucket) if "/checkpoints/" in name} == {"step-000001"}


def write_checkpoint(folder: Path, step: int, content: str) -> None:
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for name in ("adapter.safetensors", "optimizer.pt", "progress.json"):
        (checkpoint / name).write_text(f"{content} {name}")


def test_a_kill_in_the_middle_of_an_upload_loses_nothing(
    bucket: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every single write of an upload the bucket holds a complete checkpoint, and another machine fetches it."""
    job_settings = TextSettings.model_validate({"train_jsonl": "x", "output_dir": "r", "storage_path": bucket})
    machine("one")
    remote = RemoteSync.from_settings(job_settings)
    remote.folder.mkdir(parents=True)
    (remote.folder / "settings.json").write_text("{}")
    write_checkpoint(remote.folder, 1, "old")
    remote.push()
    write_checkpoint(remote.folder, 2, "new")
    for file in (remote.folder / "checkpoints" / "step-000001").iterdir():
        file.unlink()
    (remote.folder / "checkpoints" / "step-000001").rmdir()
    done, write, left = [0], RemotePath.write_bytes, [0]

    def dies(self: RemotePath, data: Any) -> None:
        if left[0] == 0:
            raise OSError("connection reset")
        left[0] -= 1
        write(self, data)

    monkeypatch.setattr(RemotePath, "write_bytes", dies)
    for number in range(5):
        left[0] = number
        home = machine("one")
        try:
            RemoteSync.from_settings(job_settings).push()
        except OSError:
            messages: list[str] = []
            left[0] = 0
            RemoteSync.from_settings(job_settings).try_push(messages.append)
            assert messages == ["not uploaded yet: connection reset"]
        machine(f"other{number}")
        other = RemoteSync.from_settings(job_settings)
        other.fetch()
        [checkpoint] = (other.folder / "checkpoints").iterdir()
        assert len({file.read_text().split()[0] for file in checkpoint.iterdir()}) == 1, "never a mixture"
        assert len(list(checkpoint.iterdir())) == 3
        done.append(int(checkpoint.name[-1]))
        assert home != other.folder
    assert done == [0, 1, 1, 1, 1, 2]
    with pytest.raises(RunError, match=r"cannot be written: connection reset; all is in "):
        write_checkpoint(other.folder, 3, "newer")
        left[0] = 0
        other.push_all()


def test_signals_reach_other_machines(bucket: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("voxray.runs.remote_sync.POLL_SEC", 0.05)
    job_settings = TextSettings.model_validate({"train_jsonl": "x", "output_dir": "r", "storage_path": bucket})
    machine("driver")
    driver = RemoteSync.from_settings(job_settings)
    driver.folder.mkdir(parents=True)
    machine("worker")
    worker = RemoteSync.from_settings(job_settings)
    worker.folder.mkdir(parents=True)
    done = worker.watch_signals()
    driver.send_signals()
    (driver.folder / "STOP").touch()
    driver.send_signals()
    deadline = time.monotonic() + 10
    while not (worker.folder / "STOP").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    done.set()
    driver.clear_signals()
    assert not names(bucket)


def test_the_driver_shows_the_log_of_another_machine(
    bucket: str, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 writes there; without copies the driver shows nothing, and an elastic run never grows."""
    monkeypatch.setattr("voxray.runs.remote_sync.POLL_SEC", 0.05)
    monkeypatch.setattr("voxray.runs.remote_sync.COPY_SEC", 0.1)
    job_settings = TextSettings.model_validate({"train_jsonl": "x", "output_dir": "r", "storage_path": bucket})
    sides = []
    for name in ("driver", "worker"):
        machine(name)
        sides.append(RemoteSync.from_settings(job_settings))
        sides[-1].folder.mkdir(parents=True)
        (sides[-1].folder / "train.log").write_text("an earlier start\n")
    driver, worker = sides
    worker.push_files([worker.folder / "train.log"])
    with driver.copy_files(["train.log", "metrics.jsonl"]), show_progress(driver.folder):
        time.sleep(0.5)
        assert not (driver.folder / COPIES).exists(), "nothing new yet"
        done = worker.watch_signals(["train.log", "metrics.jsonl"])
        with open(worker.folder / "train.log", "a") as log:
            log.write("starting at step 0 of 4\n")
        deadline = time.monotonic() + 20
        while not (driver.folder / COPIES / "train.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        done.set()
    printed = capsys.readouterr().out
    assert "starting at step 0 of 4" in printed and "an earlier start" not in printed
    assert not any(COPIES in name for name in names(bucket))


def test_an_evaluation_resumes_on_another_machine(
    one_thread: None, make_features: Any, small: dict[str, str], bucket: str, machine: Machine
) -> None:
    """Uploaded parts are not answered again; answers to other rows replace them."""
    job_settings = TextSettings.model_validate({"train_jsonl": "x", "output_dir": "e", "storage_path": bucket})
    folders, config = make_features(small["tqa.train"]), InferenceConfig(TINY, "", SamplingParams(2), 1)

    def answered(home: str, rows: range) -> tuple[list[str], list[tuple[int, int]]]:
        machine(home)
        remote, seen = RemoteSync.from_settings(job_settings), list[tuple[int, int]]()
        remote.fetch()
        options = {"use_ray": False, "remote": remote, "on_progress": lambda done, total: seen.append((done, total))}
        answer_rows(config, folders, rows, remote.folder, **options)
        return [row["prediction"] for row in read_predictions(remote.folder)], seen

    texts, seen = answered("first", range(12))
    assert seen == [(0, 12), (8, 12), (12, 12)]
    remote_dir = RemoteSync.from_settings(job_settings).remote_dir
    assert remote_dir is not None
    (remote_dir / "predictions/part-00001.parquet").unlink()
    assert answered("second", range(12)) == (texts, [(8, 12), (12, 12)])
    answered("third", range(4))
    uploaded = {name for name in names(bucket) if name.startswith("e/predictions/part")}
    assert uploaded == {"e/predictions/part-00000.parquet"}


def test_the_evaluate_job_leaves_its_results_at_the_url(
    evaluation_here: None, one_thread: None, small: dict[str, str], bucket: str, machine: Machine
) -> None:
    home = machine("first")
    values = {"model_id": TINY, "val_jsonl": (small["tqa.val"],), "output_dir": bucket.replace("?", "/e?")}
    run_evaluation(EvaluateSettings.model_validate({**values, "gen_max_new_tokens": 2, "perplexity": "none"}))
    uploaded = names(bucket)
    assert {"e/metrics.json", "e/report.html", "e/quarantine.jsonl", "e/predictions/part-00000.parquet"} <= uploaded
    assert any(name.startswith("e/features/") and name.endswith("set.json") for name in uploaded)
    assert not list(home.rglob("features/*/set.json")), "shards are at the URL, and cached"


def test_an_adapter_behind_a_url_is_fetched(bucket: str, machine: Machine) -> None:
    from voxray.runs.remote_sync import fetch_folder

    machine("first")
    remote = RemoteSync.from_settings(
        TextSettings.model_validate({"train_jsonl": "x", "output_dir": "r", "storage_path": bucket})
    )
    (remote.folder / "adapter").mkdir(parents=True)
    (remote.folder / "adapter" / "adapter_config.json").write_text("{}")
    remote.push()
    machine("second")
    folder = fetch_folder(bucket.replace("?", "/r?"), "--lora_dir")
    assert (folder / "adapter" / "adapter_config.json").read_text() == "{}"


def test_urls_that_cannot_be_used(small: dict[str, str], s3: str, bucket: str, machine: Machine) -> None:
    machine("one")
    with pytest.raises(SettingsError, match="--storage_path: take the credentials out of the URL"):
        run_training(settings(small, storage_path="s3://key:secret@bucket"))
    gone = f"s3://no-such-bucket/x?endpoint_override={s3}&scheme=http&region=us-east-1"
    with pytest.raises(RunError, match=r"s3://no-such-bucket/x/runs/a: cannot be "):
        run_training(settings(small, storage_path=gone))
    preflight = Preflight(PreflightTextSettings.model_validate(dict(settings(small, storage_path=gone))))
    preflight.check()
    [message] = [finding.message for finding in preflight.findings.to_fix]
    assert message.startswith("--storage_path s3://no-such-bucket/x/runs/a: cannot write there")


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_killed_again_and_again_on_a_new_machine_each_time(
    small: dict[str, str], bucket: str, tmp_path: Path, machine: Machine
) -> None:
    """kill -9 of everything at any moment, mostly in the middle of an upload; each start finds only the bucket."""
    draw = random.Random(3)
    flags = f"--model_id {TINY} --train_jsonl {small['tqa.train']} --num_workers 0 --max_steps 16 --save_steps 1"
    flags += " --lr_schedule constant --seed 3"
    command = [sys.executable, str(ROOT / "jobs/train_text.py"), *flags.split()]
    steps, log = list[int](), tmp_path / "log"
    for number in range(5):
        home = tmp_path / f"machine{number}"
        home.mkdir()
        driver = Driver([*command, "--output_dir", bucket], log, {**CREDENTIALS, "HOME": str(home)})
        try:
            if number == 4:
                assert driver.process.wait(300) == 0, log.read_text()
                break
            deadline = time.monotonic() + 120
            while not any(f"step-{max(steps, default=0) + 3:06d}" in name for name in names(bucket)):
                assert driver.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(draw.random() * 0.3)
            driver.kill()
        finally:
            driver.end()
        steps.append(max(int(name.split("/")[1][5:]) for name in names(bucket) if name.endswith("progress.json")))
    print("newest whole checkpoint at the URL after each kill:", steps)
    assert steps == sorted(steps)
    machine("last")
    remote = RemoteSync.from_settings(TextSettings.model_validate({"train_jsonl": "x", "output_dir": bucket}))
    remote.fetch()
    records = read_metrics(remote.folder, "train")
    assert [record["step"] for record in records] == list(range(1, 17))
    run_training(settings(small, output_dir=str(tmp_path / "whole"), max_steps=16, save_steps=16, seed=3))
    losses = [record["loss"] for record in read_metrics(tmp_path / "whole", "train")]
    assert [record["loss"] for record in records] == pytest.approx(losses, abs=1e-4)
    assert json.loads((remote.folder / "result.json").read_text())["finished"]
