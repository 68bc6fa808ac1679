"""An unknown flag is answered with the flag of the same meaning."""

import re
from inspect import signature
from pathlib import Path

import pytest
import torch
from helpers.running import JOBS, load_job

from voxray.config.evaluate import InferSettings
from voxray.config.other_names import FIXED_OPTIMIZER, OTHER_NAMES
from voxray.config.parse import Settings, flag_names, settings_from
from voxray.core.errors import SettingsError


def settings_of_jobs() -> list[type[Settings]]:
    values = [value for job in JOBS for value in vars(load_job(job)).values()]
    return [value for value in values if isinstance(value, type) and issubclass(value, Settings)]


def names_of_all_jobs() -> set[str]:
    return {name for kind in settings_of_jobs() for name in kind.model_fields}


def test_every_suggestion_is_a_flag() -> None:
    known = names_of_all_jobs()
    assert not {flag for ours in OTHER_NAMES.values() for flag in ours.flag_names} - known
    notes = {flag for ours in OTHER_NAMES.values() for flag in re.findall(r"--(\w+)", ours.note)}
    assert not notes - known, "the notes name flags, too"


def test_a_name_that_is_a_flag_of_the_job_needs_no_entry() -> None:
    """Names that every job accepts would never be looked up."""
    assert not [name for name in OTHER_NAMES if all(name in flag_names(kind) for kind in settings_of_jobs())]


@pytest.mark.parametrize(
    ("job", "flag", "suggestion"),
    [
        ("train_multitask", "--max-epochs", "--epochs"),
        ("train_whisper", "--batch_size", "--per_device_bsz"),
        ("train_text", "--num-gpus", "--num_workers"),
        ("evaluate", "--dataset", "--val_jsonl"),
        ("infer", "--adapter", "--lora_dir"),
        ("train_text", "--lora_rnak", "--lora_r"),
        ("train_text", "--learning_rat", "--lr"),
        ("train_text", "--r", "--lora_r"),
        ("train_text", "--use_dora", "--tuning"),
        ("train_text", "--generation_max_length", "--eval_max_new_tokens"),
        ("evaluate", "--generation_max_length", "--gen_max_new_tokens"),
        ("train_text", "--eval_strategy", "--eval_steps"),
        ("train_text", "--group_by_length", "--batching"),
        ("train_whisper", "--mask_time_prob", "--time_masks"),
        ("train_text", "--overwrite_output_dir", "--overwrite"),
        ("evaluate", "--do_sample", "--temperature"),
    ],
)
def test_the_suggestion(job: str, flag: str, suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_job(job).main([flag, "1"])
    assert end.value.code == 2
    assert f"unknown flag; did you mean {suggestion}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "statement"),
    [
        ("--push_to_hub", "voxray uploads nothing; run the export job, then `hf upload`"),
        ("--adam_beta1", "voxray trains with AdamW, betas 0.9 and 0.999, epsilon 1e-8"),
        ("--num_beams", "validations during training answer greedily; evaluate and infer have --num_beams"),
        ("--resume_from_checkpoint", "the same command resumes"),
        ("--target_modules", "only train_whisper lets you choose the layers"),
    ],
)
def test_a_name_without_a_counterpart(flag: str, statement: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The job says what there is instead of the nearest spelling, and does not complain about the value as well."""
    with pytest.raises(SystemExit):
        load_job("train_text").main([flag, "True"])
    errors = capsys.readouterr().err
    assert f"error: {flag}: unknown flag; {statement}" in errors and "did you mean" not in errors
    assert "not a flag" not in errors


def test_the_optimizer_is_the_one_that_the_message_describes() -> None:
    defaults = {name: value.default for name, value in signature(torch.optim.AdamW).parameters.items()}
    assert (defaults["betas"], defaults["eps"]) == ((0.9, 0.999), 1e-8)
    assert "betas 0.9 and 0.999, epsilon 1e-8" in FIXED_OPTIMIZER


def test_keys_and_arguments_have_no_dashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "y.yaml").write_text("eval_strategy: epoch\nlearnin_rate: 1\n")
    with pytest.raises(SystemExit):
        load_job("train_text").main(["--config", str(tmp_path / "y.yaml")])
    errors = capsys.readouterr().err
    assert "eval_strategy: unknown key; did you mean eval_steps? (0 validates" in errors
    assert "learnin_rate: unknown key; did you mean lr?" in errors
    with pytest.raises(SettingsError, match=r"^lora: unknown setting; did you mean lora_dir\?$"):
        settings_from(InferSettings, {"lora": "runs/first"})
