"""A run or a sweep is resumed only on the contents it started from."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY

from voxray.core.errors import SettingsError
from voxray.runs.inputs import INPUTS, input_hashes, refuse_changed_inputs, write_inputs


@pytest.fixture
def settings(tmp_path: Path) -> SimpleNamespace:
    shutil.copytree(TINY, tmp_path / "base")
    for name in ("adapter", "run/adapter"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "prompts.yaml").write_text("asr: [a]")
    (tmp_path / "a.jsonl").write_text("1")
    return SimpleNamespace(
        model_id=str(tmp_path / "base"),
        init_adapter=str(tmp_path / "run"),
        prompts=str(tmp_path / "prompts.yaml"),
        train_jsonl=(str(tmp_path / "a.jsonl"),),
    )


@pytest.mark.parametrize(
    ("file", "flag"),
    [
        ("base/config.json", "--model_id"),
        ("base/generation_config.json", "--model_id"),
        ("base/model.safetensors", "--model_id"),
        ("run/adapter/adapter_config.json", "--init_adapter"),
        ("prompts.yaml", "--prompts"),
        ("a.jsonl", "--train_jsonl"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, settings: SimpleNamespace, file: str, flag: str) -> None:
    write_inputs(tmp_path, input_hashes(settings, "train_jsonl"))
    refuse_changed_inputs(tmp_path, input_hashes(settings, "train_jsonl"), "a run")
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes() + b" ")
    with pytest.raises(SettingsError, match=f"{tmp_path} holds a run with other contents of {flag}; use --overwrite"):
        refuse_changed_inputs(tmp_path, input_hashes(settings, "train_jsonl"), "a run")


def test_a_log_beside_the_init_adapter_does_not_count(tmp_path: Path, settings: SimpleNamespace) -> None:
    write_inputs(tmp_path, input_hashes(settings))
    (tmp_path / "run" / "train.log").write_text("another line")
    refuse_changed_inputs(tmp_path, input_hashes(settings), "a run")


def test_folders_of_earlier_versions_are_not_compared(tmp_path: Path, settings: SimpleNamespace) -> None:
    refuse_changed_inputs(tmp_path, input_hashes(settings), "a run")
    write_inputs(tmp_path, {})
    refuse_changed_inputs(tmp_path, input_hashes(settings), "a run")


@pytest.mark.parametrize("content", ["", "[]", "3", '{"model_id": 1'])
def test_a_damaged_record_is_one_line(tmp_path: Path, settings: SimpleNamespace, content: str) -> None:
    (tmp_path / INPUTS).write_text(content)
    with pytest.raises(SettingsError, match=f"{tmp_path / INPUTS}: damaged"):
        refuse_changed_inputs(tmp_path, input_hashes(settings), "a run")


def test_the_record_is_json(tmp_path: Path, settings: SimpleNamespace) -> None:
    write_inputs(tmp_path, input_hashes(settings))
    assert set(json.loads((tmp_path / INPUTS).read_text())) == {"model_id", "init_adapter", "prompts"}
