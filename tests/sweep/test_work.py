"""Which trials run, fail and run again when a sweep resumes. Without Ray; trials end at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, WHISPER
from helpers.running import parse_only
from helpers.sweeps import Runner, sweep_settings, write

from voxray.sweep import work
from voxray.sweep.trials import read_trials
from voxray.sweep.work import Sweep, refuse_missing_metric, trial_line, trial_settings

METRIC = "asr/cer_nospace"
GOOD = [{METRIC: 0.5}]


@pytest.fixture
def featurized(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Settings whose features were computed."""
    calls: list[Any] = []

    def training_data(run: Any, *, use_ray: bool) -> str:
        calls.append(run.settings.model_copy(update={"strict": use_ray}))  # records use_ray in another flag
        return f"data {len(calls)}"

    monkeypatch.setattr(work, "training_data", training_data)
    monkeypatch.setattr(work, "refuse_missing_metric", lambda *args: None)
    return calls


@pytest.fixture
def sweep(tmp_path: Path, featurized: list[Any]) -> Callable[..., Runner]:
    def run(*flags: str, outcome: Any = lambda trial: GOOD) -> Runner:
        runner = Runner(outcome)
        settings = sweep_settings(tmp_path, "--model_id", TINY, *flags)
        sweep_job = Sweep(settings, tmp_path, runner)
        sweep_job.search()
        if settings.top_k:
            sweep_job.repeat()
        return runner

    return run


def states(folder: Path) -> dict[int, str]:
    return {trial.number: trial.state for trial in read_trials(folder)}


def test_trials_end_in_every_way(
    sweep: Callable[..., Runner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = {4: GOOD, 8: "out of memory: lower --per_device_bsz", 16: None, 32: [{METRIC: None}]}
    runner = sweep("--lora_r", "4,8,16,32", outcome=lambda trial: ways[trial.choice["lora_r"]])
    assert runner.ran == [1, 2, 3, 4] and states(tmp_path) == {1: "done", 2: "failed", 3: "failed", 4: "done"}
    output = capsys.readouterr().out
    assert "trial 1: asr/cer_nospace 0.5000 at step 10 with task_weights asr=1,sqa=1,tqa=1, lora_r 4\n" in output
    assert "trial 2: no asr/cer_nospace" in output and "failed: out of memory: lower --per_device_bsz" in output
    assert "its process broke off" in read_trials(tmp_path)[2].reason and "trial 4: no asr/cer_nospace" in output
    stopped = write(tmp_path, 9, {"lora_r": 4}, {METRIC: 0.7}, state="stopped", reason="at step 10")
    assert trial_line(read_trials(tmp_path)[-1], METRIC).endswith("with lora_r 4; stopped at step 10"), stopped


def test_a_combination_that_the_job_refuses_is_a_failed_trial(
    sweep: Callable[..., Runner], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = sweep("--space", "{store: [mel, encoder], freeze_whisper: [true, false], freq_masks: [0, 2]}")
    refused = {number for number, state in states(tmp_path).items() if state == "failed"}
    assert len(states(tmp_path)) == 8 and len(refused) == 3 and set(runner.ran) == set(range(1, 9)) - refused
    output = capsys.readouterr().out
    assert "failed: --store encoder: LoRA in the encoder (--no_freeze_whisper) changes its outputs" in output
    assert "failed: --store encoder: masks on features" in output


def test_a_base_of_another_kind_is_a_failed_trial(tmp_path: Path, featurized: list[Any], small: dict[str, str]) -> None:
    space = json.dumps({"model_id": [TINY, WHISPER], "train_jsonl": [small["asr.train"], "/nowhere.jsonl"]})
    settings = parse_only("tune", ["--val_jsonl", "v", "--output_dir", str(tmp_path), "--space", space])
    runner = Runner(lambda trial: GOOD)
    Sweep(settings, tmp_path, runner).search()
    assert runner.ran == [1]
    reasons = [trial.reason for trial in read_trials(tmp_path)]
    assert "a whisper model, and this job trains voxtral" in reasons[2] and "/nowhere.jsonl" in reasons[1]


def test_a_wrong_lora_target_is_a_failed_trial(tmp_path: Path, featurized: list[Any]) -> None:
    flags = ["--recipe", "whisper", "--model_id", WHISPER, "--train_jsonl", "t", "--val_jsonl", "v", "--language", "ko"]
    space = json.dumps({"lora_targets": ["q_proj", "o_proj"]})
    settings = parse_only("tune", [*flags, "--output_dir", str(tmp_path), "--lora_r", "4", "--space", space])
    runner = Runner(lambda trial: GOOD)
    Sweep(settings, tmp_path, runner).search()
    assert runner.ran == [1] and "--lora_targets o_proj: no layer is called so" in read_trials(tmp_path)[1].reason


def test_trials_share_features_unless_they_need_others(
    sweep: Callable[..., Runner], tmp_path: Path, featurized: list
) -> None:
    sweep("--space", "{lr: [1e-3, 1e-4], lora_alpha: [8, 16]}")
    assert len(featurized) == 1
    featurized.clear()
    for path in (tmp_path / "trials").glob("*/trial.json"):
        path.unlink()
    sweep("--space", "{lr: [1e-3, 1e-4], store: [mel, pcm16]}", "--storage_path", "/mount")
    assert [(settings.store, settings.strict) for settings in featurized] == [("mel", True), ("pcm16", True)]
    assert featurized[0].storage_path == "/mount"
    featurized.clear()
    for path in (tmp_path / "trials").glob("*/trial.json"):
        path.unlink()
    sweep("--space", "{variants: [2], noise_share: {range: [0, 1]}, lr: [1e-3]}", "--num_trials", "2")
    assert [settings.strict for settings in featurized] == [False, False], "drawn while trials run: in this process"


def test_what_goes_on(sweep: Callable[..., Runner], tmp_path: Path) -> None:
    """Finished and stopped trials stay; a running one and a failed one run again, before any new one."""
    for number, state in ((1, "done"), (2, "running"), (3, "failed"), (4, "stopped")):
        choice = {"task_weights": {"asr": 1.0, "sqa": 1.0, "tqa": 1.0}, "lora_r": number}
        write(tmp_path, number, choice, {METRIC: number / 10}, state=state)
    error_file = tmp_path / "trials" / "0003" / "error.json"
    error_file.write_text('{"message": "of before"}')
    seen = []
    runner = sweep("--lora_r", "1,2,3,4,5", outcome=lambda trial: seen.append(trial) or GOOD)
    assert runner.ran == [2, 3, 5] and set(states(tmp_path).values()) == {"done", "stopped"} and not error_file.exists()
    assert [trial.number for trial in runner.earlier[0]] == [1, 4], "what weak trials are measured by besides"
    assert seen[0].choice["lora_r"] == 2 and seen[2].choice["lora_r"] == 5
    assert sweep("--lora_r", "1,2,3,4,5").ran == []


def test_more_trials_may_be_asked_for(sweep: Callable[..., Runner], tmp_path: Path) -> None:
    space = ("--space", "{lr: {log: [1e-5, 1e-2]}}", "--num_trials")
    first = [trial.choice for trial in (sweep(*space, "3"), read_trials(tmp_path))[1]]
    assert sweep(*space, "5").ran == [4, 5] and [trial.choice for trial in read_trials(tmp_path)][:3] == first
    assert sweep(*space, "2").ran == [], "fewer than there are already"


def test_repeats_that_were_cut_off(sweep: Callable[..., Runner], tmp_path: Path) -> None:
    flags = ("--lora_r", "1,2", "--top_k", "1", "--seeds", "2")
    assert sweep(*flags, outcome=lambda trial: [{METRIC: trial.number / 10}]).ran == [1, 2, 3, 4]
    path = tmp_path / "trials" / "0004" / "trial.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "state": "running"}))
    (tmp_path / "trials" / "0004" / "result.json").unlink()
    runner = sweep(*flags)
    assert runner.ran == [4] and runner.earlier[1] is None, "repeats are never stopped early"
    assert {trial.repeats: trial.choice["seed"] for trial in read_trials(tmp_path)[2:]} == {1: 2}


def test_the_metric_has_to_be_one_of_the_data(small: dict[str, str], make_features: Callable[..., Any]) -> None:
    from voxray.core.errors import SettingsError
    from voxray.recipes.training_data import TrainingData

    data = TrainingData((), make_features(small["tqa.val"]))
    refuse_missing_metric("tqa/loss", data)
    refuse_missing_metric("overall/macro", data)
    with pytest.raises(SettingsError, match="--metric asr/cer: validation has tqa/rouge_l"):
        refuse_missing_metric("asr/cer", data)


def test_a_base_that_was_put_together_is_what_trials_train(tmp_path: Path) -> None:
    """SALMONN's base is assembled once for all trials, so a trial names the folder, not the parts."""
    parts = ["--whisper_path", "w", "--beats_path", "b.pt", "--llama_path", "l", "--end_sym", "</e>"]
    settings = sweep_settings(tmp_path, "--recipe", "salmonn", *parts, "--space", "{lr: [1e-4], lora_r: [4]}")
    ready = settings.model_copy(update={"model_id": "/made/model"})
    trial = trial_settings(ready, {"lr": 1e-4, "lora_r": 4}, tmp_path / "t")
    assert (trial.model_id, trial.whisper_path, trial.lora_r) == ("/made/model", "", 4)
