"""The preflight job on small data: its findings, its changes, its files, and the run it starts."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, WHISPER, read_rows, write_rows
from helpers.running import JOBS, ROOT, environment, load_job, parse_only

from voxray.commands.preflight import run_preflight
from voxray.config.preflight import PreflightTextSettings, preflight_settings
from voxray.config.recipes import recipes
from voxray.config.train import TextSettings
from voxray.core.errors import RunError
from voxray.core.units import GIB
from voxray.preflight import budget, fit_settings
from voxray.preflight import check_run as preflight_job
from voxray.preflight.budget import worker_budget
from voxray.preflight.check_run import training_settings
from voxray.preflight.report import launch_values, write_launch_file
from voxray.preflight.trial_steps import TrialRunner

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def preflight(small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the job in this process; returns the exit status and the content of preflight.json."""

    def run(*flags: str, **manifests: str) -> tuple[int, dict[str, Any]]:
        train, val = (manifests.get(name, small[f"tqa.{name}"]) for name in ("train", "val"))
        files = ["--train_jsonl", train, "--val_jsonl", val] if val else ["--train_jsonl", train]
        status, workers = 0, [] if "--num_workers" in flags else ["--num_workers", "0"]
        try:
            load_job("preflight").main(
                ["--model_id", TINY, *files, "--output_dir", str(tmp_path / "run"), *workers, *flags]
            )
        except SystemExit as end:
            status = int(end.code or 0)
        path = tmp_path / "run" / "preflight" / "preflight.json"
        return status, json.loads(path.read_text()) if path.is_file() else {}

    return run


def of_level(report: dict[str, Any], level: str) -> list[str]:
    return [f"{entry['about']}: {entry['message']}" for entry in report["findings"] if entry["level"] == level]


def test_a_good_run_is_ready(preflight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = preflight("--per_device_bsz", "4", "--price_per_hour", "36", "--no_tune")
    output = capsys.readouterr().out
    assert status == 0 and report["ready"] and of_level(report, "fix") == []
    assert any(line.startswith("gpu: this process sees no GPU") for line in of_level(report, "unchecked"))
    assert report["memory"]["measured_bytes"] == pytest.approx(report["memory"]["predicted_bytes"], rel=0.2)
    assert report["time"]["num_steps"] == 9 and report["time"]["num_validations"] == 3
    seconds = report["time"]["training_sec"] + report["time"]["validation_sec"]
    assert report["cost"] == pytest.approx(seconds / 100)
    assert report["parameters"]["llm"]["lora_layers"] == 14 and report["parameters"]["projector"]["trainable"] == 0
    assert "text, because all rows that were read are text questions" in output
    assert "tqa: <s>[INST]" in output and "in all, the peak" in output and "cost: about" in output
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {"preflight"}, "nothing else of the run is touched"
    assert {path.name for path in (folder / "preflight").iterdir()} == {
        "preflight.json",
        "preflight.log",
        "train_text.yaml",
    }
    command = report["command"]
    assert command[1] == str(ROOT / "jobs" / "train_text.py") and f"start it with: {' '.join(command)}" in output
    settings = parse_only("train_text", command[2:])
    assert type(settings) is TextSettings and settings.per_device_bsz == 4 and settings.num_workers == 0
    assert settings.output_dir == str(folder)


def test_a_batch_that_does_not_fit_is_made_smaller(preflight: Run) -> None:
    _, roomy = preflight("--per_device_bsz", "8", "--no_tune")
    least = roomy["memory"]["moments"]["optimizer step"]
    budget = (least + 0.4 * (roomy["memory"]["predicted_bytes"] - least)) / 2**30
    status, report = preflight("--per_device_bsz", "8", "--memory_gib", f"{budget:.6f}")
    assert status == 0, of_level(report, "fix")
    settings = parse_only("train_text", report["command"][2:])
    assert settings.per_device_bsz < 8 and settings.per_device_bsz * settings.grad_accum == 8
    assert report["memory"]["measured_bytes"] <= budget * 2**30
    assert report["changes"][0].startswith(f"--per_device_bsz {settings.per_device_bsz} (was 8)")
    status, report = preflight("--per_device_bsz", "8", "--memory_gib", f"{budget:.6f}", "--no_tune")
    assert status == 1 and report["changes"] == [] and not report["ready"]
    assert "lower --per_device_bsz (now 8)" in of_level(report, "fix")[0]


def test_a_gpu_of_other_machines(preflight: Run) -> None:
    """Its kernels and its memory, less CUDA's own, without a step on this machine."""
    status, report = preflight("--per_device_bsz", "4", "--gpu", "t4", "--fp16", "--no_tune")
    assert status == 0, of_level(report, "fix")
    assert report["memory"]["budget"]["num_bytes"] == pytest.approx(0.92 * (14.5 - 0.75) * 2**30, rel=1e-6)
    assert "measured_bytes" not in report["memory"] or report["memory"]["measured_bytes"] is None
    assert (
        "memory: no real step was taken: --gpu t4 names a GPU of another machine; the figures are predicted"
        in of_level(report, "unchecked")
    )
    on_cpu = preflight("--per_device_bsz", "4", "--fp16", "--no_tune", "--overwrite")[1]["memory"]["predicted_bytes"]
    assert report["memory"]["predicted_bytes"] < on_cpu, "attention on a GPU stores no probabilities"
    status, report = preflight("--gpu", "t4", "--bf16", "--no_tune", "--overwrite")
    assert status == 1 and "gpu: --bf16: --gpu t4 has no bfloat16; take --fp16" in of_level(report, "fix")


def test_steps_that_take_minutes_are_not_tried(preflight: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a large model's step takes minutes, which the speed of one layer tells."""
    monkeypatch.setattr(fit_settings, "flops_per_sec", lambda dtype: 1e5)
    monkeypatch.setattr(TrialRunner, "__init__", lambda *args: pytest.fail("the weights are not needed"))
    status, report = preflight("--per_device_bsz", "4")
    assert status == 0, of_level(report, "fix")
    [reason] = [line for line in of_level(report, "unchecked") if line.startswith("memory: no real step was taken: ")]
    assert re.search(r"a step would take about \d{3,} s on this CPU; the figures are predicted", reason)
    assert report["memory"]["measured_bytes"] is None and report["time"]["training_sec"] is None


def test_rays_own_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes and the driver, once on the machine, and what Ray adds to each worker."""
    monkeypatch.setattr(budget, "free_memory_bytes", lambda: 20 * GIB)
    alone, workers = worker_budget(1, 0), worker_budget(2, 0, uses_ray=True)
    assert alone.num_bytes == 18 * GIB - budget.PROCESS_BYTES
    each = (18 * GIB - budget.RAY_BYTES) // 2 - budget.PROCESS_BYTES - budget.RAY_WORKER_BYTES
    assert workers.num_bytes == each and "2.8 GiB for Ray" in workers.source


def test_sharded_weights_are_predicted(preflight: Run) -> None:
    """A step in one process would hold all weights. The types are those of training, not those of the files."""
    flags = ("--bf16", "--no_tune", "--overwrite")
    weights = []
    for more in ((), ("--strategy", "fsdp", "--num_workers", "2")):
        status, report = preflight(*flags, *more)
        assert status == 0, of_level(report, "fix")
        entries = {entry["cause"]: entry["num_bytes"] for entry in report["memory"]["entries"] if not entry["at"]}
        weights.append(entries["llm: weights, bfloat16"])
    assert weights[1] == weights[0] // 2 and entries["weights gathered for two modules"] > 0
    assert report["memory"]["measured_bytes"] is None
    message = "memory: no real step was taken: each of 2 workers holds a part of the weights; the figures are predicted"
    assert message in of_level(report, "unchecked")


def test_what_no_change_can_fit_is_said(preflight: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = preflight("--memory_gib", "0.001", "--autorun")
    output = capsys.readouterr()
    assert status == 1 and report["command"] == []
    assert output.err.startswith("error: memory: a worker needs ") and "1 thing(s) must be fixed first" in output.err
    assert any(change.startswith("--grad_ckpt") for change in report["changes"])


def test_everything_that_is_wrong_is_listed_at_once(
    preflight: Run, small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    flags = ("--recipe", "multitask", "--model_id", str(tmp_path / "no-model"))
    status, report = preflight(*flags[:2], train=f"{broken},{tmp_path / 'none.jsonl'}", val=str(tmp_path / "no.jsonl"))
    output = capsys.readouterr().err
    assert status == 1 and len(of_level(report, "fix")) == 3
    assert (
        f"--train_jsonl {broken}:1" in output
        and "none.jsonl" in output
        and f"--val_jsonl {tmp_path / 'no.jsonl'}" in output
    )
    assert "3 thing(s) must be fixed first" in output


def test_a_base_of_another_family_is_a_line(preflight: Run, small: dict[str, str]) -> None:
    status, report = preflight("--recipe", "whisper", "--language", "ko", train=small["asr.train"], val="")
    assert status == 1 and "a voxtral model, and this job trains whisper" in of_level(report, "fix")[0]


def test_rows_that_are_left_out_are_told(preflight: Run, small: dict[str, str], tmp_path: Path) -> None:
    rows = read_rows(small["asr.train"])
    rows[0]["audio_path"] = str(tmp_path / "none.wav")
    rows += [{"what": "ever"}, read_rows(small["tqa.train"])[0]]
    manifest = write_rows(tmp_path / "mixed.jsonl", rows)
    status, report = preflight("--recipe", "asr_adapter", "--max_len", "64", "--no_tune", train=manifest, val="")
    warned = of_level(report, "warning")
    assert status == 0, of_level(report, "fix")
    assert any("none.wav" in line and f"{manifest}:1" in line for line in warned)
    assert any("bad_row" in line or "no task" in line for line in warned), warned
    assert any("row(s) left out, too_long" in line and "--max_len 64" in line for line in warned)
    assert any("left out, other_task: tqa" in line for line in warned)
    assert any("no --val_jsonl" in line for line in warned)
    status, report = preflight("--recipe", "asr_adapter", "--strict", "--no_tune", train=manifest, val="")
    assert status == 1 and any("(--strict)" in line for line in of_level(report, "fix"))


def test_another_run_in_the_folder(preflight: Run, small: dict[str, str], tmp_path: Path) -> None:
    values = {"model_id": TINY, "train_jsonl": (small["tqa.train"],), "val_jsonl": (small["tqa.val"],)}
    settings = TextSettings(**values, output_dir=str(tmp_path / "run"), num_workers=0)
    (tmp_path / "run").mkdir()
    stored = tmp_path / "run" / "settings.json"
    stored.write_text(settings.model_dump_json())
    status, report = preflight("--lora_r", "4", "--no_tune")
    assert status == 1 and "--lora_r (was 16, now 4)" in of_level(report, "fix")[0]
    status, report = preflight("--memory_gib", "0.012")
    assert any("holds this very run" in line for line in of_level(report, "ok"))
    assert report["changes"] == [], "a run that goes on stays as it is"
    assert json.loads(stored.read_text()) == json.loads(settings.model_dump_json())


def test_an_output_that_cannot_be_written(preflight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file")
    status, report = preflight("--no_tune")
    assert status == 1 and report == {}
    assert "error: output: --output_dir" in capsys.readouterr().err


def test_features_that_cannot_be_written(preflight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "feats").write_text("a file")
    status, report = preflight("--no_tune", "--features_dir", str(tmp_path / "feats" / "below"))
    assert status == 1 and len(of_level(report, "fix")) == 1
    assert f"error: output: --features_dir {tmp_path}/feats/below: cannot write there" in capsys.readouterr().err


def test_autorun_becomes_the_command_that_was_printed(preflight: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(preflight_job.os, "execv", lambda program, command: started.append(command))
    status, report = preflight("--autorun", "--no_tune")
    assert status == 0 and started == [report["command"]] and started[0][0] == sys.executable


@pytest.mark.parametrize(
    ("argv", "recipe"),
    [
        (["--train_jsonl", "{tqa}"], "text"),
        (["--train_jsonl={asr}"], "asr_adapter"),
        (["--train-jsonl", "{asr},{tqa}"], "multitask"),
        (["--train_jsonl", "{tqa}", "--recipe", "multitask"], "multitask"),
        (["--train_jsonl", "{asr}", "--model_id", WHISPER], "whisper"),
        (["--train_jsonl", "{asr}", "--base_model", "openai/whisper-small"], "whisper"),
        (["--train_jsonl", "{asr}", "--model_name_or_path", "openai/whisper-small"], "whisper"),
        (["--train_jsonl", "{asr}", "--whisper_path", "w"], "salmonn"),
        (["--train_jsonl", "nothing.jsonl"], "multitask"),
        (["--config", "{config}"], "text"),
        (["--config", "{config}", "--train_jsonl", "{asr}"], "asr_adapter"),
        (["--config", "nothing.yaml"], "multitask"),
        (["--recipe"], "multitask"),
    ],
)
def test_the_recipe_follows_from_model_and_tasks(
    argv: list[str], recipe: str, small: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "given.yaml"
    config.write_text(yaml.safe_dump({"train_jsonl": [small["tqa.train"]], "output_dir": "o"}))
    names = {"tqa": small["tqa.train"], "asr": small["asr.train"], "config": str(config)}
    kind, why = preflight_settings([token.format(**names) for token in argv])
    assert kind.trains.__name__.lower().startswith(recipe.replace("_", ""))
    assert why == "" if "--recipe" in argv and recipe in argv else recipe in why


def test_a_wrong_lora_target_is_listed_with_all_other_faults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--recipe whisper --model_id {WHISPER} --train_jsonl /nowhere.jsonl --output_dir {tmp_path / 'run'}"
    with pytest.raises(SystemExit) as end:
        load_job("preflight").main([*flags.split(), "--language", "ko", "--target_modules", "q_proj,o_proj"])
    output = capsys.readouterr().err
    assert end.value.code == 1 and "--train_jsonl /nowhere.jsonl" in output
    assert "error: model: --lora_targets o_proj: no layer is called so; layers: fc1, fc2, " in output


def test_flags_reach_the_command(small: dict[str, str], tmp_path: Path) -> None:
    """All settings reach the job unchanged through the launch file, so every flag has its effect there."""
    shared = f"--model_id {TINY} --train_jsonl {small['asr.train']} --val_jsonl {small['asr.val']} --output_dir o"
    lines = {
        "train_multitask": "--recipe multitask --task_weights asr=1,aac=1.5 --curriculum tqa:1,tqa+asr:2 --lr 1e-4"
        " --no_freeze_whisper --noise_snr 10,20 --variants 2 --batching length --per_task_bsz asr=4 --seed 3 --bf16"
        " --num_workers 1:4 --strategy deepspeed --language ko --metric_for_best_model asr/cer --trim_audio_tokens",
        "train_text": "--recipe text --nproc 2 --quantize 4bit --grad_ckpt --no_pin_memory --max_steps 5 --debug",
        "train_asr_adapter": "--recipe asr_adapter --store encoder --cache_dtype float32 --features_dir feats",
        "train_whisper": "--recipe whisper --lora_targets q_proj,fc1 --language ko --freeze_encoder --fp16",
        "train_salmonn": "--recipe salmonn --epochs 2 --lr_schedule cosine --warmup_steps 0",
    }
    for job, line in lines.items():
        settings = parse_only("preflight", [*shared.split(), *line.split(), "--price_per_hour", "2", "--overwrite"])
        training = training_settings(settings)
        path = tmp_path / f"{job}.yaml"
        write_launch_file(path, job, launch_values(training, set()), ["a change"])
        again = parse_only(job, ["--config", str(path)])
        assert type(again) is type(training)
        differing = {name for name in type(training).model_fields if getattr(again, name) != getattr(training, name)}
        assert differing <= {"output_dir", "features_dir"}, "outputs are absolute now"
        assert again.output_dir == str(Path("o").absolute()) and again.overwrite


def test_every_training_job_has_a_preflight() -> None:
    assert {f"train_{name}" for name in ("text", "asr_adapter", "multitask", "whisper", "salmonn")} == {
        job for job in JOBS if job.startswith("train_")
    }
    assert {recipe.job for recipe in recipes().values()} == {job for job in JOBS if job.startswith("train_")}


def test_a_wrong_library_is_no_reason_to_stop_early(
    preflight: Run, monkeypatch: pytest.MonkeyPatch, small: dict[str, str]
) -> None:
    from voxray.preflight import machine

    monkeypatch.setattr(machine, "version", lambda name: "0.1")
    status, report = preflight("--no_tune")
    assert status == 0 and len(of_level(report, "warning")) >= 20


def test_a_lost_cluster_is_one_line(preflight: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(log_path: Path) -> None:
        raise RunError("RAY_ADDRESS 127.0.0.1:9: no cluster answers there")

    monkeypatch.setattr(preflight_job, "cluster_resources", lost)
    status, report = preflight("--no_tune")
    assert status == 1 and of_level(report, "fix") == ["resources: RAY_ADDRESS 127.0.0.1:9: no cluster answers there"]


def test_settings_of_the_training_are_the_training_jobs() -> None:
    values = {"train_jsonl": "a", "output_dir": "o", "lora_r": 4, "autorun": True}
    training = training_settings(PreflightTextSettings(**values))
    assert type(training) is TextSettings and training.model_fields_set == {"train_jsonl", "output_dir", "lora_r"}


@pytest.mark.slow
def test_salmonn_is_put_together_in_the_preflights_own_folder(
    salmonn_parts: dict[str, str], small: dict[str, str], tmp_path: Path
) -> None:
    flags = [token for name, value in salmonn_parts.items() for token in (f"--{name}", value)]
    settings = parse_only(
        "preflight",
        [
            *flags,
            "--train_jsonl",
            small["asr.train"],
            "--output_dir",
            str(tmp_path / "run"),
            "--num_workers",
            "0",
            "--max_steps",
            "2",
            "--no_tune",
        ],
    )
    run_preflight(settings)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"preflight"}
    report = json.loads((tmp_path / "run" / "preflight" / "preflight.json").read_text())
    again = parse_only("train_salmonn", report["command"][2:])
    assert again.llama_path == salmonn_parts["llama_path"] and not again.model_id


@pytest.mark.slow
@pytest.mark.ray
def test_the_old_command_checks_and_trains(small: dict[str, str], tmp_path: Path) -> None:
    """Verbatim, in a folder with the layout it expects."""
    (tmp_path / "mistralai").mkdir()
    (tmp_path / "mistralai" / "Voxtral-Mini-3B-2507").symlink_to(TINY)
    (tmp_path / "data").mkdir()
    for part in ("train", "val"):
        shutil.copy(small[f"tqa.{part}"], tmp_path / "data" / f"text_medqa.{part}.jsonl")
    line = "--nproc 2 --model_id mistralai/Voxtral-Mini-3B-2507 --train_jsonl data/text_medqa.train.jsonl"
    line += " --val_jsonl data/text_medqa.val.jsonl --out_dir ckpt_stage1_text --autorun"
    process = start_preflight(line.split(), tmp_path)
    assert process.returncode == 0, process.stderr
    assert "starting it" in process.stdout and "trained: " in process.stdout
    assert (tmp_path / "ckpt_stage1_text" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_status_of_the_training_is_the_preflights(small: dict[str, str], tmp_path: Path) -> None:
    """The learning rate makes the weights NaN, which only training can detect."""
    flags = ["--lr", "1e30", "--max_bad_steps", "1", "--max_steps", "9", "--num_workers", "0", "--no_tune", "--autorun"]
    files = ["--train_jsonl", small["tqa.train"], "--out_dir", "run", "--model_id", TINY]
    process = start_preflight([*files, *flags], tmp_path)
    assert "starting it" in process.stdout, process.stderr
    assert process.returncode == 1 and "were not finite" in process.stderr


def start_preflight(flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "preflight.py"), *flags]
    options = {"capture_output": True, "text": True, "timeout": 1700, "cwd": folder}
    return subprocess.run(command, env=environment(), **options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--autorun", "--gpu h100: names a GPU of other machines, where --autorun cannot start the training"),
        ("--strategy fsdp", "--gpu h100: how much a worker holds depends on --num_workers; give a number"),
        ("--strategy deepspeed", "--gpu h100: how much a worker holds depends on --num_workers; give a number"),
        ("--strategy fsdp --num_workers 4", ""),
    ],
)
def test_gpus_of_other_machines(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = f"--recipe text --train_jsonl t --output_dir o --gpu h100 {flags}".split()
    if not message:
        assert parse_only("preflight", argv).gpu == "h100"
        return
    with pytest.raises(SystemExit) as ended:
        parse_only("preflight", argv)
    assert ended.value.code == 2 and message in capsys.readouterr().err
