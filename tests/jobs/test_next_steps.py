"""The commands that jobs print at their end are commands of this repository, with flags that parse."""

import shlex
from pathlib import Path

import pytest
from conftest import TINY, manifest, write_rows
from helpers.bad_input import noise
from helpers.corpora import prepare
from helpers.running import parse_only

from voxray.commands.next_steps import after_evaluation, after_sweep, after_training
from voxray.commands.train import run_training


def check_commands(lines: list[str]) -> set[str]:
    """Parse every job command; returns the names of the jobs."""
    jobs = set()
    for line in lines:
        words = shlex.split(line)
        if words[:1] == ["python"]:
            job = Path(words[1]).stem
            parse_only(job, words[2:])
            jobs.add(job)
    return jobs


def test_after_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model_id", TINY, "--train_jsonl", manifest("tqa.val"), "--val_jsonl", manifest("tqa.val")]
    argv += ["--output_dir", str(tmp_path / "a run"), "--features_cache_dir", str(tmp_path / "f"), "--num_workers", "0"]
    settings = parse_only("train_text", [*argv, "--max_steps", "1", "--eval_max_rows", "1"])
    result = run_training(settings)
    output = capsys.readouterr().out
    lines = output[output.index("next:") :].splitlines()
    assert check_commands(lines) == {"evaluate", "infer"}
    evaluate = parse_only("evaluate", shlex.split(lines[1])[2:])
    assert evaluate.lora_dir == str(tmp_path / "a run") and evaluate.val_jsonl == settings.val_jsonl
    result = {**result, "adapter_step": 52, "asr/cer": 0.3, "best": {"asr/cer": {"step": 24, "value": 0.25}}}
    [better, *_] = after_training(settings, tmp_path, result)
    assert better.startswith(
        "adapter/ holds step 52; the best step by asr/cer was 24 (0.2500); --load_best_model_at_end"
    )
    assert after_training(settings, tmp_path, {**result, "asr/cer": 0.25})[0] == "next:", "the last step is as good"
    chosen = settings.model_copy(update={"load_best_model_at_end": True})
    assert after_training(chosen, tmp_path, result)[0] == "next:"
    assert any(
        "infer.py" in line and "--question QUESTION" in line for line in after_training(settings, tmp_path, result)
    )


def test_after_training_repeats_what_the_adapter_does_not_record(tmp_path: Path) -> None:
    argv = f"--model_id {TINY} --train_jsonl a.jsonl --output_dir {tmp_path} --report_to none".split()
    for flags in ([], ["--language", "Korean", "--bf16"], ["--fp16", "--quantize", "4bit"]):
        settings = parse_only("train_multitask", [*argv, *flags])
        lines = after_training(settings, tmp_path, {})
        for line in lines[1:]:
            later = parse_only(Path(shlex.split(line)[1]).stem, shlex.split(line)[2:])
            for name in ("language", "bf16", "fp16", "quantize"):
                assert getattr(later, name) == getattr(settings, name)


def test_after_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"audio_path": noise(tmp_path / f"{n}.wav", 4.0), "transcript": f"글 {n}"} for n in range(4)]
    prepare(tmp_path, write_rows(tmp_path / "m.jsonl", rows), min_chars_per_sec=0)
    output = capsys.readouterr().out
    assert check_commands(output[output.index("next:") :].splitlines()) == {"audit", "preflight"}
    assert "leaks between the splits: none" in output


def test_after_evaluation_and_sweep(tmp_path: Path) -> None:
    lines = after_evaluation(tmp_path / "an evaluation")
    assert check_commands([line for line in lines if line.startswith(" ")]) == {"compare"}
    assert lines[0] == f"open file://{tmp_path}/an%20evaluation/report.html"
    (tmp_path / "best.yaml").write_text("lr: 1e-3\ntrain_jsonl: a.jsonl\noutput_dir: o\n")
    lines = after_sweep(
        parse_only("tune", ["--recipe", "whisper", "--train_jsonl", "a", "--val_jsonl", "b", "--output_dir", "o"]),
        tmp_path,
    )
    assert check_commands([line for line in lines if line.startswith(" ")]) == {"train_whisper"}
