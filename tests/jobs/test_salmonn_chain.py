"""Slow tests of SALMONN: from the demo recipe to the demo job, on two Ray workers, and after SIGKILL."""

import csv
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SPEECH, manifest, read_rows
from helpers.running import ROOT, Driver, load_job
from test_stages import losses

from voxray.commands.infer import run_inference
from voxray.config.demo import DemoSettings
from voxray.config.evaluate import InferSettings
from voxray.demo.answers import DemoRequest, open_model
from voxray.evaluation.predictions import read_predictions

RECIPE = "jobs/configs/demo_train_salmonn.yaml"
PARTS = {"whisper_path": "tests/assets/whisper-tiny", "beats_path": "tests/assets/salmonn-reference/beats.pt"}
PARTS |= {"llama_path": "tests/assets/salmonn-reference/llama_fast"}
SAMPLE = str(SPEECH / "sample.wav")
WAIT_SEC = 600


def annotation(path: Path, task: str, *, with_text: bool) -> str:
    clips = read_rows(manifest("asr.val"))[:4]
    entries = [
        {"testset_id": f"test{9 - number:04}", "path": row["audio_path"], "task": task}
        | ({"text": row["transcript"]} if with_text else {})
        for number, row in enumerate(clips)
    ]
    path.write_text(json.dumps({"annotation": entries}))
    return str(path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("one_thread", "evaluation_here")
def test_the_demo_recipe_from_training_to_the_demo_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    first, second, untrained = (tmp_path / name for name in ("first", "second", "untrained"))
    train = ["--config", RECIPE, "--num_workers", "0", "--features_dir", str(tmp_path / "features")]
    load_job("train_salmonn").main([*train, "--output_dir", str(first)])
    assert losses(first)[-1] < losses(first)[0] and len(losses(first)) == 60
    stage_2 = ["--stage", "2", "--ckpt", str(first), "--dryrun", "--output_dir", str(second)]
    load_job("train_salmonn").main([*train, *stage_2])
    load_job("train_salmonn").main([*train, "--dryrun", "--output_dir", str(untrained)])
    assert len(losses(second)) == len(losses(untrained)) == 4 and losses(second)[0] < losses(untrained)[0]
    answers: dict[str, dict[str, str]] = {}
    for mode in ("submission_asr", "submission_aac", "valid_asr", "valid_aac"):
        kind, _, task = mode.partition("_")
        name = {"asr": "asr", "aac": "audiocaption_v2"}[task]
        data = annotation(tmp_path / f"{mode}.json", name, with_text=kind == "valid")
        flags = ["--mode", mode, "--val_jsonl", data, "--output_dir", str(tmp_path / mode)]
        load_job("evaluate").main([*flags, "--lora_dir", str(second), "--gen_max_new_tokens", "8"])
        with open(tmp_path / mode / f"{kind}.csv", encoding="utf-8") as file:
            lines = list(csv.reader(file))
        assert lines[0] == ["testset_id", "text"] and [line[0] for line in lines[1:]] == [f"test000{n}" for n in "6789"]
        answers[mode] = dict(lines[1:])
        metrics = json.loads((tmp_path / mode / "metrics.json").read_text())
        assert set(metrics) == {"unlabelled"} if kind == "submission" else metrics[task]["exact_match"]["n"] == 4
    assert answers["submission_asr"] == answers["valid_asr"] != answers["submission_aac"] == answers["valid_aac"]

    def answer(**flags: str) -> str:
        settings = InferSettings.model_validate({"audio_path": SAMPLE, "max_new_tokens": 8, **flags})
        return run_inference(settings, "")[0]["prediction"]

    prediction = answer(lora_dir=str(second))
    demo, _ = open_model(DemoSettings(lora_dir=str(second), max_new_tokens=8))
    [tuned] = demo.answers(DemoRequest(SAMPLE, compare=True))
    assert (tuned.is_base, tuned.text) == (False, prediction)
    load_job("export").main(["--lora_dir", str(second), "--output_dir", str(tmp_path / "whole")])
    assert answer(model_id=str(tmp_path / "whole")) == prediction
    official = ["--lora_dir", str(second), "--output_dir", str(tmp_path / "official"), "--format", "official"]
    load_job("export").main(official)
    config = {"model": {**PARTS, "ckpt": str(tmp_path / "official" / "salmonn_v1.pth"), "end_sym": "</s>"}}
    config |= {"datasets": {"test_ann_path_asr": str(tmp_path / "submission_asr.json")}}
    (tmp_path / "eval.yaml").write_text(json.dumps(config))
    flags = ["--mode", "submission_asr", "--cfg-path", str(tmp_path / "eval.yaml"), "--gen_max_new_tokens", "8"]
    load_job("evaluate").main([*flags, "--output_dir", str(tmp_path / "again")])
    assert predictions(tmp_path / "again") == predictions(tmp_path / "submission_asr"), "the same weights"
    assert set(predictions(tmp_path / "again")) == set(predictions(tmp_path / mode))


def predictions(folder: Path) -> dict[str, str]:
    return {row["id"]: row["prediction"] for row in read_predictions(folder)}


def command(salmonn: str, data: str, folder: Path, num_workers: int, **more: Any) -> list[str]:
    flags = {"model_id": salmonn, "train_jsonl": data, "output_dir": folder, "num_workers": num_workers}
    flags |= {"features_dir": folder.parent / "features", "max_len": 140, "lr": "1e-3", "min_lr": 0, "warmup_steps": 0}
    flags |= {"per_device_bsz": 2, "max_steps": 4, **more}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_two_ray_workers_equal_one_process(
    local_ray: None, salmonn: str, small: dict[str, str], tmp_path: Path
) -> None:
    data = small["asr.train"]
    load_job("train_salmonn").main(command(salmonn, data, tmp_path / "two", 2))
    load_job("train_salmonn").main(command(salmonn, data, tmp_path / "one", 0, grad_accum=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_a_killed_run_equals_the_uninterrupted_run(salmonn: str, small: dict[str, str], tmp_path: Path) -> None:
    """SIGKILL of a worker, of the driver, and of everything, with sampled prompts."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"asr": [f"<SpeechHere> {word} it." for word in ("Write", "Say", "Hear")]}))
    steps, saved = 24, 2

    drivers: list[Driver] = []

    def start(name: str) -> Driver:
        flags = command(salmonn, small["asr.train"], tmp_path / name, 2, max_steps=steps, save_steps=saved)
        line = [sys.executable, str(ROOT / "jobs/train_salmonn.py"), *flags, "--prompts", str(prompts)]
        drivers.append(Driver(line, tmp_path / f"{name}.log"))
        return drivers[-1]

    def kill_worker(driver: Driver) -> None:
        titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in driver.processes()}
        os.kill(next(pid for pid, title in titles.items() if b"RayTrainWorker" in title), signal.SIGKILL)

    kills: tuple[Callable[[Driver], None], ...] = (kill_worker, lambda driver: driver.process.kill(), Driver.kill)
    try:
        assert start("whole").process.wait(WAIT_SEC) == 0, (tmp_path / "whole.log").read_text()
        driver, log = start("killed"), tmp_path / "killed.log"
        for number, kill in enumerate(kills):
            target, deadline = 3 + 6 * number, time.monotonic() + WAIT_SEC
            while len(losses_so_far(tmp_path / "killed")) < target:
                assert driver.process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            kill(driver)
            if kill is not kill_worker:
                driver.end()
                driver = start("killed")
        assert driver.process.wait(WAIT_SEC) == 0, log.read_text()
    finally:
        for driver in drivers:
            driver.end()
    digests = [
        hashlib.sha256((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        for name in ("whole", "killed")
    ]
    assert digests[0] == digests[1] and losses(tmp_path / "killed") == losses(tmp_path / "whole")


def losses_so_far(run: Path) -> list[float]:
    return losses(run) if (run / "metrics.jsonl").is_file() else []
