"""Commands that people already use: each parses in the job that took the old script's place, and runs.

They run word for word, in a folder laid out as they expect it: the base model's hub name is a link to the tiny model,
and data/, the checkpoints and sample.wav are small ones. To cover another job, add its rows to ``SEED_COMMANDS``.
"""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import SPEECH, TASKS, TINY, WHISPER
from helpers.running import JOBS, load_job, parse_only

from voxray.commands import audit

VOXTRAL = "mistralai/Voxtral-Mini-3B-2507"
MULTITASK = (
    f"--model_id {VOXTRAL} --train_jsonl data/ASR.jsonl,data/SQA.jsonl,data/TQA.jsonl "
    "--val_jsonl data/ASR.dev.jsonl,data/SQA.dev.jsonl,data/TQA.dev.jsonl --output_dir ckpt_voxtral_mt "
    "--per_device_bsz 2 --grad_accum 16 --max_len 1280 --eval_max_new_tokens 256 --lora_r 16 --lora_alpha 32 "
    "--lora_dropout 0.05 --task_weights 1.0,1.5,1.2 --bf16 --tf32 --grad_ckpt --freeze_whisper --epochs 5"
)
STAGE_1 = (
    f"--model_id {VOXTRAL} --output_dir ckpt_stage1_text --jsonl data/text_medqa.val.jsonl "
    "--max_new_tokens 256 --temperature 0.7"
)
STAGE_2 = f"--base_model {VOXTRAL} --adapter_path ckpt_stage2_asr/lora_stage2_adapter"
TEXT = (
    f"--model_id {VOXTRAL} --train_jsonl data/text_medqa.train.jsonl --val_jsonl data/text_medqa.val.jsonl "
    "--output_dir ckpt_stage1_text --per_device_bsz 6 --grad_accum 8 --epochs 3 --lr 2e-4 --warmup_steps 1500 "
    "--bf16 --tf32 --grad_ckpt"
)
ASR_ADAPTER = (
    f"--model_id {VOXTRAL} --train_jsonl dataset/train_data.cached.jsonl --output_dir ckpt_stage2_asr --epochs 2 "
    "--lr 1e-4 --per_device_bsz 8 --grad_accum 4"
)
PREFLIGHT = (
    f"--nproc 2 --model_id {VOXTRAL} --train_jsonl data/text_medqa.train.jsonl --val_jsonl data/text_medqa.val.jsonl "
    "--out_dir ckpt_stage1_text --autorun"
)
SEED_COMMANDS = [
    ("preflight", PREFLIGHT),  # test_preflight.py runs it
    ("train_text", TEXT),
    ("train_text", f"{TEXT} --num_workers 2"),
    ("train_asr_adapter", ASR_ADAPTER),
    ("infer", STAGE_1),
    ("infer", f"{STAGE_1} --batch_size 8 --preview_rows 20"),
    ("infer", "--adapter_path ckpt_stage2_asr/lora_stage2_adapter"),
    ("infer", f"{STAGE_2} --audio_path sample.wav"),
    ("infer", f"{STAGE_2} --test_jsonl test_data.jsonl --output_path results.jsonl"),
    ("demo", STAGE_2),
    ("train_multitask", MULTITASK),
    ("train_multitask", f"{MULTITASK} --debug"),
    (
        "evaluate",
        f"--model_id {VOXTRAL} --lora_dir ckpt_voxtral_mt "
        "--val_jsonl data/ASR.dev.jsonl,data/SQA.dev.jsonl,data/TQA.dev.jsonl "
        "--per_device_bsz 4 --max_len 1280 --gen_max_new_tokens 256 --bf16",
    ),
]
# accelerate_eval.sh read its manifests from the YAML file of its model, so these two name some.
SALMONN_MODES = [
    ("evaluate", f"--mode {mode} --model_id {VOXTRAL} --val_jsonl data/ASR.dev.jsonl,data/TQA.dev.jsonl")
    for mode in ("submission_asr", "submission_aac")
]
AUDITS = ["--input data/raw_medqa.jsonl", "--input data/text_medqa.train.jsonl"]
TRAINING = ("train_text", "train_asr_adapter", "train_multitask")
QUICK = ["--num_workers", "0", "--debug", "--eval_max_rows", "1"]
"""Added to run a command fast: no Ray Train for one process, a few rows."""

TRAINS = "--train_jsonl data/ASR.jsonl --output_dir out"
OLD_SPELLINGS = [
    ("train_multitask", "--task_sampling 1.0,1.5,1.2", "task_weights", {"asr": 1.0, "sqa": 1.5, "tqa": 1.2}),
    ("train_multitask", "--eval_steps 500", "eval_steps", 500),
    ("train_multitask", "--num_workers auto", "num_workers", "auto"),
    ("train_multitask", "--nproc 2", "num_workers", 2),
    ("train_multitask", "--no-pin_memory", "pin_memory", False),
    ("train_multitask", "--no-drop_last", "drop_last", False),
    ("train_multitask", "--learning_rate 1e-3", "lr", 1e-3),
    ("train_multitask", "--num_train_epochs 3", "epochs", 3),
    ("train_multitask", "--per_device_train_batch_size 8", "per_device_bsz", 8),
    ("train_multitask", "--gradient_accumulation_steps 2", "grad_accum", 2),
    ("train_multitask", "--cuda_visible_devices 0", "cuda_visible_devices", "0"),
    ("train_text", "--nproc 2", "num_workers", 2),
    ("train_text", "--max_length 512", "max_len", 512),
    ("train_text", "--eval_steps 500", "eval_steps", 500),
    ("train_asr_adapter", "--learning_rate 1e-3", "lr", 1e-3),
    ("train_asr_adapter", "--cache encoder", "store", "encoder"),
    ("evaluate", "--jsonl data/ASR.dev.jsonl", "val_jsonl", "data/ASR.dev.jsonl"),
    ("evaluate", "--val_jsonl x.jsonl --batch_size_eval 8", "per_device_bsz", 8),
    ("evaluate", "--val_jsonl x.jsonl --per_device_eval_batch_size 8", "per_device_bsz", 8),
    ("evaluate", "--val_jsonl x.jsonl --out_dir out", "output_dir", "out"),
    ("evaluate", "--val_jsonl x.jsonl --cuda_visible_devices 0,1", "cuda_visible_devices", "0,1"),
    ("infer", "--jsonl x.jsonl --ppl_batch 4", "batch_size", 4),
    ("infer", "--jsonl x.jsonl --num_preview 5", "preview_rows", 5),
    ("infer", "--model_name_or_path some/model --audio_path x.wav", "model_id", "some/model"),
    ("compile", "--batch_size_eval 8 --optimization_level 3", "windows", (8,)),
    ("compile", "--optimization_level 3", "optimization_level", 3),
    ("efficiency", "--batch_size_eval 1", "batch_sizes", (1,)),
    ("efficiency", "--num_it 100", "repeats", 100),
    ("efficiency", "--num_warmup 10", "warmup", 10),
    ("featurize", "--manifest x.jsonl --out_dir out", "output_dir", "out"),
    ("audit", "--jsonl x.jsonl --max_length 2048", "max_len", 2048),
    ("prefetch", "--dataset x --model_name_or_path some/model", "model_id", "some/model"),
    ("prefetch", "--dataset_name some/data", "dataset", "some/data"),
    ("prefetch", "--dataset x --language_abbr sv-SE", "language", "sv-SE"),
    ("audit", "--train_jsonl x.jsonl --base_model some/model", "model_id", "some/model"),
    ("preflight", "--train_jsonl x.jsonl --out_dir out --nproc 2", "num_workers", 2),
    ("preflight", "--train_jsonl x.jsonl --out_dir out --learning_rate 1e-3", "lr", 1e-3),
]


@pytest.fixture(scope="module")
def seed_folder(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands find what they name; the adapters come from the training commands themselves.

    The old cache that stage 2 names is a manifest with audio here; test_stages.py has one that points to .pt files.
    """
    folder = tmp_path_factory.mktemp("seed")
    (folder / VOXTRAL).parent.mkdir()
    (folder / VOXTRAL).symlink_to(TINY)
    (folder / "data").mkdir()
    for task in ("asr", "sqa", "tqa"):
        shutil.copy(small[f"{task}.train"], folder / "data" / f"{task.upper()}.jsonl")
        shutil.copy(small[f"{task}.val"], folder / "data" / f"{task.upper()}.dev.jsonl")
    for part in ("train", "val"):
        shutil.copy(small[f"tqa.{part}"], folder / "data" / f"text_medqa.{part}.jsonl")
    (folder / "dataset").mkdir()
    shutil.copy(small["asr.train"], folder / "dataset" / "train_data.cached.jsonl")
    shutil.copy(small["asr.val"], folder / "test_data.jsonl")
    shutil.copy(SPEECH / "sample.wav", folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for job, line in zip(TRAINING, (TEXT, ASR_ADAPTER, MULTITASK), strict=True):
            load_job(job).main([*line.split(), *QUICK])
    finally:
        os.chdir(before)
    return folder


def test_training_command_made_an_adapter_and_a_metric_per_task(seed_folder: Path) -> None:
    run = seed_folder / "ckpt_voxtral_mt"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {record["step"] for record in records if record["kind"] == "train"} == {1, 2, 3, 4}
    last = records[-1]
    assert last["kind"] == "validation"
    assert {"asr/cer", "sqa/rouge_l", "tqa/rouge_l"} <= set(last)
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size > 10_000
    assert json.loads((run / "settings.json").read_text())["task_weights"] == {"asr": 1.0, "sqa": 1.5, "tqa": 1.2}


@pytest.mark.parametrize(
    ("folder", "steps", "role", "rank"), [("ckpt_stage1_text", 3, "llm", 16), ("ckpt_stage2_asr", 2, "projector", 8)]
)
def test_stage_commands_made_adapters(folder: str, steps: int, role: str, rank: int, seed_folder: Path) -> None:
    run = seed_folder / folder
    assert json.loads((run / "result.json").read_text())["steps"] == steps, "an epoch of the small data is one step"
    counts = json.loads((run / "parameters.json").read_text())
    assert {name for name, entry in counts.items() if entry["trainable"]} == {role}
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == rank


@pytest.mark.parametrize(("job", "line"), SEED_COMMANDS + SALMONN_MODES)
def test_command_parses(job: str, line: str, seed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(seed_folder)
    settings = parse_only(job, line.split())
    # --output_dir of the old inference script names the folder to read from, everywhere else the one to write to
    asked = settings.model_fields_set - ({"num_beams", "gen_max_new_tokens"} if "submission" in line else set())
    assert len(asked) == sum(word.startswith("--") for word in line.split())
    assert settings.model_id == str(seed_folder / VOXTRAL), "the link is found, so nothing is fetched from a hub"


@pytest.mark.parametrize(("job", "line", "field", "value"), OLD_SPELLINGS)
def test_old_spelling_lands_in_its_field(
    job: str, line: str, field: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = parse_only(job, f"{TRAINS} {line}".split() if job in TRAINING else line.split())
    expected = (str(Path(value).absolute()),) if field == "val_jsonl" else value  # type: ignore[arg-type]
    assert getattr(settings, field) == expected
    assert ("Ray places the workers" in capsys.readouterr().err) == (field == "cuda_visible_devices")


@pytest.mark.parametrize("mode", ["submission_asr", "submission_aac"])
def test_a_mode_alone_takes_the_demo_rows(mode: str) -> None:
    """The old evaluator's command as it was written; its manifests stood in a YAML file."""
    settings = parse_only("evaluate", ["--mode", mode])
    assert settings.model_id == TINY and Path(settings.val_jsonl[0]).name == "asr.val.jsonl"


@pytest.fixture
def in_seed_folder(seed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(seed_folder)
    return seed_folder


INFER_RUNS = [line for job, line in SEED_COMMANDS if job == "infer"]


@pytest.mark.parametrize("line", INFER_RUNS)
def test_infer_command_runs(line: str, in_seed_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_job("infer").main(line.split())
    said = capsys.readouterr()
    assert "adapter " in said.err and " tensors" in said.err, "no adapter is silently ignored"
    if "--jsonl" in line or "--test_jsonl" in line:
        assert len([text for text in said.out.splitlines() if "\t" in text]) == 4
        assert ("exact_match" in said.out) and ("asr" if "--test_jsonl" in line else "tqa") in said.out
    elif "--audio_path" in line:
        assert said.out.strip() and "\t" not in said.out
    else:  # an adapter alone shows what it does on a few clips of the assets
        assert "no --audio_path and no --jsonl" in said.out
    if "--output_path" in line:
        rows = [json.loads(text) for text in (in_seed_folder / "results.jsonl").read_text().splitlines()]
        assert len(rows) == 4 and all(row["reference"] and "prediction" in row for row in rows)


def test_evaluate_command_runs(evaluation_here: None, in_seed_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_job("evaluate").main(next(line for job, line in SEED_COMMANDS if job == "evaluate").split())
    found = json.loads((in_seed_folder / "runs/evaluate/metrics.json").read_text())
    for task in ("asr", "sqa", "tqa"):
        entry = found[task]["exact_match"]
        assert entry["n"] == 4 and 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1
    assert (in_seed_folder / "runs/evaluate/report.html").is_file()
    assert "ckpt_voxtral_mt" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ray
def test_submission_modes_run(local_ray: None, in_seed_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asr, aac = (line.split() for _, line in SALMONN_MODES)
    load_job("evaluate").main([*asr, "--gen_max_new_tokens", "16", "--output_dir", "submission"])
    lines = (in_seed_folder / "submission/submission.csv").read_text().splitlines()
    assert lines[0] == "testset_id,text" and len(lines) == 5, "the text rows are not part of it"
    with pytest.raises(SystemExit) as end:
        load_job("evaluate").main([*aac, "--output_dir", "aac"])
    assert end.value.code == 1
    assert "no aac row to evaluate" in capsys.readouterr().err


def test_audit_commands_run(
    small: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lengths, faults and long rows of the raw file and of the clean one; the three old scripts in one."""
    monkeypatch.setattr(audit, "run_audit_job", partial(audit.run_audit_job, use_ray=False))
    raw, clean = AUDITS
    rows = Path(small["tqa.train"]).read_bytes()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text_medqa.train.jsonl").write_bytes(rows)
    (tmp_path / "data" / "raw_medqa.jsonl").write_bytes(rows + rows.splitlines(keepends=True)[0] + b"{")
    monkeypatch.chdir(tmp_path)
    for line in AUDITS:
        settings = parse_only("audit", line.split())
        assert settings.input == (str(tmp_path / line.split()[1]),) and settings.model_fields_set == {"input"}
    load_job("audit").main(clean.split())
    said = capsys.readouterr().out
    assert "faults: none" in said and "lengths are in characters" in said
    found = json.loads((tmp_path / "runs/audit/audit.json").read_text())
    assert (found["rows"], found["faults"], found["length_unit"]) == (12, {}, "characters and bytes")
    with pytest.raises(SystemExit) as end:
        load_job("audit").main(raw.split())
    assert end.value.code == 1
    said = capsys.readouterr()
    assert "raw_medqa.jsonl:13: duplicate: the same as" in said.out and "raw_medqa.jsonl:14: bad_json" in said.out
    assert "2 fault(s) in 2 of 14 row(s)" in said.err and (tmp_path / "runs/audit/report.html").is_file()


def test_every_job_says_first_that_no_flags_mean_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    for job in JOBS:
        settings = parse_only(job, [])
        said = capsys.readouterr().out
        assert said.startswith(f"{job}: no flags given, so this runs the demo recipe (jobs/configs/"), said
        assert getattr(settings, "model_id", TINY) in (TINY, WHISPER, ""), "an adapter names its base"


@pytest.fixture
def run_without_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.chdir(tmp_path)

    def run(job: str) -> Path:
        load_job(job).main([])
        return tmp_path / "runs" / "demo"

    return run


def test_infer_without_flags(run_without_flags: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    run_without_flags("infer")
    out = capsys.readouterr().out
    assert out.startswith("infer: no flags given")
    assert len([line for line in out.splitlines() if "\t" in line]) == 4


@pytest.mark.slow
@pytest.mark.ray
def test_prefetch_without_flags(local_ray: None, run_without_flags: Callable[[str], Path]) -> None:
    folder = run_without_flags("prefetch") / "prefetch"
    steps = json.loads((folder / "prefetch.lock.json").read_text())["steps"]
    assert all("done" in step for step in steps.values())
    assert steps["data"]["rows"] == {"train": 64, "validation": 16}
    assert [entry["samples"] for entry in steps["features"]["sets"]] == [64, 16]


@pytest.mark.slow
@pytest.mark.ray
def test_featurize_without_flags(local_ray: None, run_without_flags: Callable[[str], Path]) -> None:
    folder = run_without_flags("featurize") / "features"
    assert sum(json.loads(path.read_text())["rows"] for path in folder.glob("*/set.json")) == 660
    assert (folder / "quarantine.jsonl").read_text() == ""


@pytest.mark.slow
@pytest.mark.ray
def test_audit_without_flags(local_ray: None, run_without_flags: Callable[[str], Path]) -> None:
    found = json.loads((run_without_flags("audit") / "audit" / "audit.json").read_text())
    assert (found["rows"], found["faults"], found["length_unit"]) == (820, {}, "tokens")


@pytest.mark.slow
@pytest.mark.ray
def test_evaluate_without_flags(local_ray: None, run_without_flags: Callable[[str], Path]) -> None:
    found = json.loads((run_without_flags("evaluate") / "evaluate" / "metrics.json").read_text())
    assert {task: found[task]["exact_match"]["n"] for task in TASKS} == {"asr": 80, "sqa": 40, "tqa": 40}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("job", "metric", "least", "most"),
    [("train_text", "tqa/exact_match", 0.9, 1.0), ("train_asr_adapter", "asr/cer_nospace", 0.0, 0.4)],
)
def test_stages_without_flags(
    job: str, metric: str, least: float, most: float, local_ray: None, run_without_flags: Callable[[str], Path]
) -> None:
    """The base answers no text question right, and has cer_nospace 0.62 on these voices."""
    run = run_without_flags(job) / job
    result = json.loads((run / "result.json").read_text())
    assert result["finished"] and least <= result[metric] <= most
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_train_multitask_without_flags(local_ray: None, run_without_flags: Callable[[str], Path]) -> None:
    run = run_without_flags("train_multitask") / "train"
    assert json.loads((run / "result.json").read_text())["finished"]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_tune_without_flags(local_ray: None, run_without_flags: Callable[[str], Path]) -> None:
    folder = run_without_flags("tune") / "tune"
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + 4
    assert parse_only("train_multitask", ["--config", str(folder / "best.yaml")]).lora_r in (4, 16)
