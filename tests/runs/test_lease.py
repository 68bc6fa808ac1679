"""One job at a time writes to an output folder, on one machine and on several."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ASSETS, TINY
from helpers.running import ROOT, parse_only

from voxray.commands.audit import run_audit_job
from voxray.commands.evaluate import run_evaluation
from voxray.commands.prepare import run_prepare_job
from voxray.commands.score_only import score_only
from voxray.commands.train import run_training
from voxray.core.errors import RunError
from voxray.core.storage import CacheLimits, remote_path
from voxray.runs import lease
from voxray.runs.lease import FILE, folder_lease, output_lease

SPEECH = ASSETS / "speech"
OTHER = {"host": "other", "boot": "b", "pid": 7, "command": "train_text.py", "since": "2026-11-29 10:00:00 +0000"}
IN_USE = r"in use by .+, process \d+ on .+ since \d{4}-\d\d-\d\d \d\d:\d\d"


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SEC", 0.05)
    monkeypatch.setattr(lease, "DEAD_SEC", 0.6)


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease."""
    code = f"""
        from pathlib import Path
        from voxray.runs.lease import folder_lease
        import time
        with folder_lease(Path({str(folder)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_job_is_refused_and_a_killed_owner_is_not_waited_for(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(RunError, match=f"--output_dir {tmp_path}: in use by -c, process {process.pid} on "):
            ExitStack().enter_context(folder_lease(tmp_path))
        process.send_signal(signal.SIGKILL)
        process.wait()
        start = time.monotonic()
        with folder_lease(tmp_path):
            assert time.monotonic() - start < 0.5
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_dead_owner_on_another_machine_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).write_text(json.dumps({**OTHER, "token": "t", "beat": 3}))
    with folder_lease(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert "train_text.py, process 7 on other" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("kind", ["shared", "url"])
def test_an_owner_on_another_machine_that_beats_is_respected(tmp_path: Path, kind: str) -> None:
    """Its file is on a shared file system, or at the URL to which the folder is mirrored."""
    shared = tmp_path / "shared"
    shared.mkdir()
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(0.05):
            number += 1
            lease.write_json(shared / FILE, {**OTHER, "token": "t", "beat": number})

    thread = threading.Thread(target=beat)
    thread.start()
    time.sleep(0.2)
    try:
        remote_dir = remote_path(f"file://{shared}", "--output_dir", CacheLimits(str(tmp_path / "c"), 0))
        arguments: Any = (shared,) if kind == "shared" else (tmp_path / "copy", remote_dir)
        with pytest.raises(RunError, match=r"in use by train_text\.py, process 7 on other since 2026"):
            ExitStack().enter_context(folder_lease(*arguments))
    finally:
        ended.set()
        thread.join()


def test_a_job_that_stood_still_ends_when_another_took_its_folder(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        (tmp_path / FILE).write_text(json.dumps({**OTHER, "token": "t", "beat": 1}))
        assert process.wait(20) == 1


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "{}", '{"token": 3}'])
def test_a_damaged_lease_is_taken(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with folder_lease(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_relies_on_the_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lease.fcntl, "flock", flock)
    with folder_lease(tmp_path), pytest.raises(RunError, match=IN_USE):
        ExitStack().enter_context(folder_lease(tmp_path))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"--output_dir .*file/x: cannot write there"):
        ExitStack().enter_context(folder_lease(tmp_path / "file" / "x"))


JOBS = {
    "train": (run_training, "train_text --train_jsonl {speech}/tqa.train.jsonl --num_workers 0"),
    "evaluate": (run_evaluation, "evaluate --val_jsonl {speech}/tqa.val.jsonl"),
    "audit": (run_audit_job, "audit --input {speech}/tqa.val.jsonl"),
    "score_only": (score_only, "evaluate --score_only {predictions}"),
}


@pytest.mark.parametrize("job", JOBS)
def test_every_job_that_writes_a_folder_holds_a_lease(tmp_path: Path, job: str) -> None:
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text('{"id": "1", "task": "tqa", "reference": "a", "prediction": "a"}\n')
    run, line = JOBS[job]
    name, *argv = line.format(speech=SPEECH, predictions=predictions).split()
    argv += [] if job in {"audit", "score_only"} else ["--model_id", TINY]
    settings = parse_only(name, [*argv, "--output_dir", str(tmp_path / "out")])
    with folder_lease(tmp_path / "out"):
        with pytest.raises(RunError, match=f"--output_dir {tmp_path / 'out'}: {IN_USE}"):
            run(settings)
        assert [path.name for path in (tmp_path / "out").iterdir() if FILE not in path.name] == []


def test_prepare_holds_a_lease_on_its_manifest(tmp_path: Path) -> None:
    output = tmp_path / "train.jsonl"
    settings = parse_only("prepare", ["--input", str(SPEECH / "asr.val.jsonl"), "--train_output", str(output)])
    with output_lease(output), pytest.raises(RunError, match=f"--train_output {tmp_path}: {IN_USE}"):
        run_prepare_job(settings, use_ray=False)
