"""The run folder: where a path leads, who may go on in a folder, and what starting afresh deletes."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError, SettingsError
from voxray.runs import run_folder
from voxray.runs.run_folder import (
    CHANGEABLE_SETTINGS,
    is_submitted_job,
    make_folder,
    open_run_folder,
    output_url,
    provenance,
    resolve_output_dir,
)

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(SUBMITTED, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes: object) -> MultitaskSettings:
    return MultitaskSettings(**{"output_dir": "out", "train_jsonl": ("/a.jsonl",), **changes})


# -- anchor


def test_paths_of_a_local_job(here: Path):
    assert resolve_output_dir("runs/a", "") == here / "runs/a"
    assert resolve_output_dir("/runs/a", "") == Path("/runs/a")
    assert resolve_output_dir("runs/a", "/mnt/x") == Path("/mnt/x/runs/a")
    assert resolve_output_dir("/runs/a", "/mnt/x") == Path("/runs/a")
    assert resolve_output_dir("~/a", "/mnt/x") == Path("/home/someone/a")
    assert resolve_output_dir("~no-such-user/a", "") == here / "~no-such-user/a"


def test_paths_of_a_submitted_job(monkeypatch: pytest.MonkeyPatch):
    assert not is_submitted_job()
    monkeypatch.setenv(SUBMITTED, "{}")
    assert is_submitted_job()
    assert resolve_output_dir("runs/a", "/mnt/x") == Path("/mnt/x/runs/a")
    assert resolve_output_dir("/runs/a", "") == Path("/runs/a")
    with pytest.raises(SettingsError, match="--output_dir runs/a: a submitted job runs in a temporary copy"):
        resolve_output_dir("runs/a", "")
    with pytest.raises(SettingsError, match="--features_dir f: a submitted job"):
        resolve_output_dir("f", "", flag="--features_dir")


@pytest.mark.parametrize(
    ("path", "storage_path", "message"),
    [
        (
            "s3://bucket/a",
            "",
            "--output_dir s3://bucket/a: this job writes to mounted folders only, not to s3://bucket/a",
        ),
        ("a", "gs://bucket/", "--output_dir a: this job writes to mounted folders only, not to gs://bucket/a"),
        ("a", "mnt/x", "--storage_path mnt/x: must be absolute"),
        ("/a", "mnt/x", "--storage_path mnt/x: must be absolute"),
    ],
)
def test_paths_that_are_refused(path: str, storage_path: str, message: str):
    with pytest.raises(SettingsError, match=message):
        resolve_output_dir(path, storage_path)


def test_places_behind_a_url():
    assert output_url("runs/a", "s3://b/x/?region=eu-west-1") == "s3://b/x/runs/a?region=eu-west-1"
    assert (
        output_url("s3://b/x", "/mnt") == "s3://b/x"
        and output_url("/runs/a", "s3://b") == output_url("runs/a", "/mnt") == ""
    )
    here, there = (resolve_output_dir("runs/a", f"s3://{name}?region=x", is_mirrored=True) for name in ("b", "c"))
    assert here.parent == Path("/home/someone/.cache/voxray/runs") and here.name.startswith("a-") and here != there
    assert here == resolve_output_dir("s3://b/runs/a/", "", is_mirrored=True), "options and slashes make no other place"


# -- make_folder


def test_a_folder_is_made_and_left_clean(here: Path):
    make_folder(here / "a" / "b")
    make_folder(here / "a" / "b")
    assert list((here / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be(here: Path):
    (here / "file").touch()
    with pytest.raises(RunError, match=r"--output_dir .*file/x: cannot write there: Not a directory"):
        make_folder(here / "file" / "x")
    with pytest.raises(RunError, match=r"--features_dir .*file: cannot write there: File exists"):
        make_folder(here / "file", "--features_dir")


# -- open_run


def test_a_new_run_says_how_it_came_to_be(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/jobs/train_multitask.py", "--lr", "1e-3"])
    open_run_folder(here / "run", settings(lr=1e-3), overwrite=False)
    stored = json.loads((here / "run" / "settings.json").read_text())
    assert stored["lr"] == 1e-3 and set(stored) == set(MultitaskSettings.model_fields)
    assert MultitaskSettings.model_validate(stored) == settings(lr=1e-3)
    stored = json.loads((here / "run" / "provenance.json").read_text())
    assert stored["command"] == ["train_multitask.py", "--lr", "1e-3"]
    assert {"voxray", "python", "torch", "ray"} <= set(stored["versions"])
    assert set(stored) == {"versions", "git", "command"}


def test_the_same_run_goes_on(here: Path):
    open_run_folder(here / "run", settings(), overwrite=False)
    (here / "run" / "metrics.jsonl").write_text("old")
    (here / "run" / "STOP").touch()
    open_run_folder(here / "run", settings(), overwrite=False)
    assert (here / "run" / "metrics.jsonl").read_text() == "old"
    assert not (here / "run" / "STOP").exists()  # it was meant for the run before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("lr", 1e-3), ("seed", 1), ("lora_r", 8), ("per_device_bsz", 3), ("model_id", "other")),
        *(("train_jsonl", ("/b.jsonl",)), ("task_weights", {"asr": 1}), ("drop_last", True), ("bf16", True)),
    ],
)
def test_other_settings_are_refused_by_name(here: Path, name: str, value: object):
    open_run_folder(here / "run", settings(), overwrite=False)
    before = (here / "run" / "settings.json").read_bytes()
    with pytest.raises(SettingsError) as error:
        open_run_folder(here / "run", settings(**{name: value}), overwrite=False)
    was = json.loads(before)[name]
    assert f"--{name} (was {was}, now " in str(error.value) and str(error.value).count("(was") == 1
    assert "--overwrite" in str(error.value)
    assert (here / "run" / "settings.json").read_bytes() == before


def test_every_changed_setting_is_named(here: Path):
    open_run_folder(here / "run", settings(), overwrite=False)
    with pytest.raises(SettingsError, match=r"--lr \(was 0\.0002, now 0\.1\)") as error:
        open_run_folder(here / "run", settings(lr=0.1, seed=4, log_steps=3), overwrite=False)
    assert "--seed (was 0, now 4)" in str(error.value) and "log_steps" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "starts"), [({"lr": 0.1}, True), ({"lr": 0.1, "lora_r": 4}, False), ({"tuning": "full"}, False)]
)
def test_the_message_names_the_way_that_keeps_the_work(here: Path, changes: dict[str, Any], starts: bool):
    run_dir = here / "run"
    open_run_folder(run_dir, settings(), overwrite=False)
    with pytest.raises(SettingsError) as error:
        open_run_folder(run_dir, settings(**changes), overwrite=False)
    message = str(error.value)
    assert "give another --output_dir" in message and "--overwrite deletes the run in the folder" in message
    assert (f"--init_adapter {run_dir}, to start from its weights" in message) is starts


def test_the_page_lists_what_may_change():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    [paragraph] = re.findall(r"\*\*Resume with other settings\.\*\*.*?\n\n", page, re.DOTALL)
    listed = paragraph.partition("may change:")[2].partition(". ")[0]
    assert set(re.findall(r"`--(\w+)`", listed)) == CHANGEABLE_SETTINGS


def test_what_may_change_may(here: Path):
    values = {"num_workers": 4, "loader_workers": 0, "num_actors": 3, "pin_memory": False, "output_dir": "elsewhere"}
    values |= {"storage_path": "/mnt", "features_dir": "/f", "save_steps": 7, "eval_steps": 9, "eval_max_rows": 1}
    values |= {"log_steps": 1, "max_steps": 99, "epochs": 9, "strict": True, "rows_per_shard": 3, "overwrite": True}
    values |= {"eval_max_new_tokens": 3, "val_jsonl": ("/v",), "tf32": True, "cuda_visible_devices": "1"}
    values |= {"cache_budget_gib": 3, "features_cache_dir": "/c", "features_cache_gib": 4, "max_bad_steps": 2}
    values |= {"save_total_limit": 9, "metric_for_best_model": "asr/wer", "load_best_model_at_end": True}
    values |= {"early_stopping_patience": 2, "early_stopping_threshold": 0.5}
    values |= {"worker_timeout_sec": 99, "preview_rows": 9, "strategy": "deepspeed", "zero_stage": 3}
    values |= {"report_to": "none", "offload_optimizer": False, "fp32": True, "tasks_file": "/moved.yaml"}
    assert set(values) == CHANGEABLE_SETTINGS and set(MultitaskSettings.model_fields) >= CHANGEABLE_SETTINGS
    open_run_folder(here / "run", settings(), overwrite=False)
    open_run_folder(here / "run", settings(**values), overwrite=False)
    assert json.loads((here / "run" / "settings.json").read_text())["max_steps"] == 99


def test_a_run_older_than_a_setting_goes_on(here: Path):
    open_run_folder(here / "run", settings(), overwrite=False)
    path = here / "run" / "settings.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "lr"}))
    older = path.read_text()
    open_run_folder(here / "run", settings(), overwrite=False)
    path.write_text(older)
    with pytest.raises(SettingsError, match=r"--lr \(was 0\.0002, now 0\.1\)"):
        open_run_folder(here / "run", settings(lr=0.1), overwrite=False)


def test_damaged_settings_are_no_run_to_go_on_with(here: Path):
    (here / "run").mkdir()
    (here / "run" / "settings.json").write_text('{"lr": 0.0')
    with pytest.raises(SettingsError, match=r"settings\.json: damaged.*--overwrite"):
        open_run_folder(here / "run", settings(), overwrite=False)
    open_run_folder(here / "run", settings(), overwrite=True)
    open_run_folder(here / "run", settings(), overwrite=False)


def test_starting_afresh_deletes_what_a_run_wrote_and_nothing_else(here: Path):
    run = here / "run"
    open_run_folder(run, settings(), overwrite=False)
    written = ["checkpoints/step-10/adapter.safetensors", "adapter/adapter_config.json", "tensorboard/events"]
    written += ["previews.jsonl", "previews.yaml"]
    written += ["metrics.jsonl", "train.log", "result.json", "quarantine.jsonl", "parameters.json"]
    others = ["notes.txt", "features/a/index.arrow", "data/train.jsonl", "checkpoints.txt", "other/metrics.jsonl"]
    for name in written + others:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    open_run_folder(run, settings(seed=9), overwrite=True)
    assert [name for name in written if (run / name).exists()] == []
    assert [name for name in others if (run / name).read_text() != name] == []
    left = {path.name for path in run.iterdir()} - {"settings.json", "inputs.json", "provenance.json"}
    assert left == {"notes.txt", "features", "data", "checkpoints.txt", "other"}
    assert json.loads((run / "settings.json").read_text())["seed"] == 9


def test_starting_afresh_in_a_folder_that_holds_no_run_deletes_nothing(here: Path):
    (here / "run" / "checkpoints").mkdir(parents=True)
    (here / "run" / "metrics.jsonl").touch()
    open_run_folder(here / "run", settings(), overwrite=True)
    assert (here / "run" / "checkpoints").is_dir() and (here / "run" / "metrics.jsonl").exists()


def test_starting_afresh_follows_no_link(here: Path):
    (here / "precious").mkdir()
    (here / "precious" / "file").touch()
    open_run_folder(here / "run", settings(), overwrite=False)
    (here / "run" / "checkpoints").symlink_to(here / "precious")
    open_run_folder(here / "run", settings(seed=1), overwrite=True)
    assert (here / "precious" / "file").exists()


def test_outside_a_checkout_there_is_no_commit(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_folder, "PROJECT_FILES", here)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(here.parent))
    assert provenance()["git"] is None
    monkeypatch.setenv("PATH", "")
    assert provenance()["git"] is None
