"""`ray job submit` against a real head with a dashboard: success, refused jobs, and the state saved when stopped."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TINY, read_rows, write_rows
from helpers.head import RAY, WAIT_SEC, Head, start_head
from helpers.running import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with start_head(RAY_AUTH_MODE="disabled") as started:
        yield started


def arguments(train_jsonl: str, storage: Path | None, *more: str) -> list[str]:
    line = ["--model_id", TINY, "--train_jsonl", train_jsonl, "--output_dir", "runs/mt", "--num_workers", "2", *more]
    return line if storage is None else [*line, "--storage_path", str(storage)]


def test_refused_job_says_why_in_one_line(head: Head, small: dict[str, str]) -> None:
    name = head.submit("relative", "train_multitask", arguments(small["asr.train"], None))
    reason = "error: --output_dir runs/mt: a submitted job runs in a temporary copy; make it absolute, or add"
    assert_refused(head, name, 2, reason)


@pytest.mark.chaos
def test_jobs_without_a_usable_row_say_why_in_one_line(head: Head, small: dict[str, str], tmp_path: Path) -> None:
    keyless = write_rows(tmp_path / "keyless.jsonl", [{"text": "no task has this"}, {"audio_path": "x.wav"}])
    rows = [{**row, "audio_path": f"/gone/{number}.wav"} for number, row in enumerate(read_rows(small["asr.train"]))]
    gone = write_rows(tmp_path / "gone.jsonl", rows)
    missing = str(tmp_path / "missing.jsonl")
    no_row = ":1: no usable row in this manifest; the first fault: "
    faults = {keyless: f"{no_row}keys text match no task", gone: f"{no_row}audio file not found: /gone/0"}
    faults[missing] = ": cannot read the manifest: No such file or directory"
    names = {path: head.submit("unusable", "train_multitask", arguments(path, tmp_path)) for path in faults}
    for path, fault in faults.items():
        assert_refused(head, names[path], 1, f"error: {path}{fault}")


def assert_refused(head: Head, name: str, status: int, reason: str) -> None:
    details = head.wait(name)
    assert (details["status"], details["driver_exit_code"]) == ("FAILED", status), details["logs"]
    _, _, log_text = details["logs"].partition("Running entrypoint for job")
    lines = log_text.splitlines()[1:]  # the first is the command
    assert len(lines) == 1 and lines[0].startswith(reason), details["logs"]


def test_submitted_run_succeeds(head: Head, small: dict[str, str], tmp_path: Path) -> None:
    train = ",".join(small[f"{task}.train"] for task in ("asr", "sqa", "tqa"))
    val = ["--val_jsonl", ",".join(small[f"{task}.val"] for task in ("asr", "sqa", "tqa"))]
    line = arguments(train, tmp_path, "--debug", "--eval_max_new_tokens", "8", *val)
    details = head.wait(head.submit("good", "train_multitask", line))
    assert (details["status"], details["driver_exit_code"]) == ("SUCCEEDED", 0), details["logs"]
    run = tmp_path / "runs" / "mt"
    assert f"run folder {run}" in details["logs"]
    settings = json.loads((run / "settings.json").read_text())
    assert settings["output_dir"] == "runs/mt" and settings["num_workers"] == 2
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]
    assert {"asr/cer_nospace", "sqa/rouge_l", "tqa/rouge_l"} <= set(records[-1])
    assert {path.name for path in (run / "adapter").iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert (run / "checkpoints" / "step-000004" / "optimizer.pt").is_file()
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert (run / "quarantine.jsonl").read_text() == ""
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["git"] is None, "the job ran the copy that it brought, which is no checkout"
    assert provenance["command"][0] == "train_multitask.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_flags_the_demo_recipe_runs_and_its_output_stays(head: Head) -> None:
    details = head.wait(head.submit("bare", "train_multitask", []))
    assert details["status"] == "SUCCEEDED", details["logs"]
    assert "train_multitask: no flags given, so this runs the demo recipe" in details["logs"]
    run = Path(head.env["HOME"]) / "voxray" / "runs" / "demo" / "train"
    assert f"run folder {run}" in details["logs"] and (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.chaos
def test_the_readmes_command_on_a_head_with_rays_defaults(small: dict[str, str], tmp_path: Path) -> None:
    """Ray's command line sends the token only if RAY_AUTH_MODE says so, as in the README."""
    [line] = [line for line in (ROOT / "README.md").read_text().splitlines() if " ray job submit " in f" {line}"]
    variable, *words = shlex.split(line)
    assert variable == "RAY_AUTH_MODE=token" and words[0] == "ray"
    script = next(index for index, word in enumerate(words) if word.startswith("jobs/")) + 1
    flags = arguments(small["tqa.train"], tmp_path, "--max_steps", "2")
    with start_head() as head:
        command = [RAY, *words[1:3], "--address", head.address, *words[3:script], *flags]
        path = f"{Path(sys.executable).parent}:{head.env['PATH']}"
        without, with_token = (
            subprocess.run(
                command, env={**head.env, **mode, "PATH": path}, cwd=ROOT, capture_output=True, text=True, timeout=300
            )
            for mode in ({}, {"RAY_AUTH_MODE": "token"})
        )
    assert without.returncode != 0 and "authentication token" in without.stdout + without.stderr
    assert with_token.returncode == 0, with_token.stdout + with_token.stderr
    assert (tmp_path / "runs" / "mt" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.chaos
def test_stopping_a_job_saves_the_run(head: Head, small: dict[str, str], tmp_path: Path) -> None:
    more = ("--max_steps", "100000", "--save_steps", "90000", "--per_device_bsz", "1")
    name = head.submit("long", "train_multitask", arguments(small["tqa.train"], tmp_path, *more))
    metrics, deadline = tmp_path / "runs/mt/metrics.jsonl", time.monotonic() + WAIT_SEC
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < deadline and head.get(name)["status"] in {"PENDING", "RUNNING"}, head.get(name)
        time.sleep(0.3)
    head.ray("stop", "--address", head.address, name)
    details = head.wait(name)
    assert details["status"] == "STOPPED", details["logs"]
    assert "SIGINT: saving and stopping after this step" in details["logs"]
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    [checkpoint] = (tmp_path / "runs/mt/checkpoints").iterdir()
    assert checkpoint.name == f"step-{steps[-1]:06d}" and steps == list(range(1, steps[-1] + 1))
    result = json.loads((tmp_path / "runs/mt/result.json").read_text())
    assert result.pop("started_from")
    assert result == {"steps": steps[-1], "adapter_step": steps[-1], "finished": False}


@pytest.mark.chaos
def test_submit_follows_a_job_and_exits_as_it_did(head: Head, tmp_path: Path) -> None:
    env = {**head.env, "PATH": f"{Path(sys.executable).parent}:{head.env['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "jobs/submit.py"), "--address", head.address, "--", "train_multitask"]
    refused = arguments("a.jsonl", None)
    process = subprocess.run([*command, *refused], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert process.returncode == 2, process.stdout + process.stderr
    assert "error: --output_dir runs/mt: a submitted job runs in a temporary copy" in process.stderr


def test_nothing_of_the_head_listens_outside_this_machine(head: Head) -> None:
    port = int(head.address.rpartition(":")[2])
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    dashboard = [fields[1] for fields in listening if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port]
    assert dashboard and all(address.startswith("0100007F") for address in dashboard), os.linesep.join(dashboard)
