"""An unknown flag is answered with the flag of the same meaning."""

import pytest
from helpers.running import JOBS, load_job

from voxray.config.other_names import OTHER_NAMES
from voxray.config.parse import Settings


def names_of_all_jobs() -> set[str]:
    names: set[str] = set()
    for job in JOBS:
        for value in vars(load_job(job)).values():
            if isinstance(value, type) and issubclass(value, Settings):
                names |= set(value.model_fields)
    return names


def test_every_suggestion_is_a_flag() -> None:
    known = names_of_all_jobs()
    assert not {ours for names in OTHER_NAMES.values() for ours in names} - known


@pytest.mark.parametrize(
    ("job", "flag", "suggestion"),
    [
        ("train_multitask", "--max-epochs", "--epochs"),
        ("train_whisper", "--batch_size", "--per_device_bsz"),
        ("train_text", "--num-gpus", "--num_workers"),
        ("evaluate", "--dataset", "--val_jsonl"),
        ("infer", "--adapter", "--lora_dir"),
        ("train_text", "--lora_rnak", "--lora_r"),
    ],
)
def test_the_suggestion(job: str, flag: str, suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_job(job).main([flag, "1"])
    assert end.value.code == 2
    assert f"unknown flag; did you mean {suggestion}?" in capsys.readouterr().err
