"""Tasks of a user's file, from features to a comparison, in this process and on Ray; and what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, WHISPER, read_rows, write_rows
from helpers.running import environment, parse_only
from safetensors.torch import load_file

from voxray.commands import audit, compare, evaluate, featurize, infer, preflight, score_only, train
from voxray.core.content_hash import combined_hash
from voxray.core.errors import RunError, SettingsError
from voxray.core.tasks import TASK_CODES, TASKS, use_own_tasks
from voxray.features.extract import Extractor
from voxray.features.reader import Features
from voxray.features.shards import LAYOUT
from voxray.models.registry import get_family
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

TASKS_OF_FILE: dict[str, Any] = {
    "soap": {
        "keys": ["audio_path", "soap"],
        "prompt": "Write a SOAP note. {note}",
        "answer": "soap",
        "metrics": ["rouge_l", "exact_match"],
    },
    "verbatim": {
        "keys": ["audio_path", "verbatim"],
        "template": "transcription",
        "answer": "verbatim",
        "metrics": ["wer", "cer"],
    },
    "intent": {
        "keys": ["utterance", "intent"],
        "prompt": "Intent?\n{utterance}",
        "answer": "intent",
        "metrics": ["exact_match", "char_f1"],
    },
}
SMALL_RUN = f"--model_id {TINY} --num_workers 0 --rows_per_shard 8 --per_device_bsz 3 --lr 1e-2"
SMALL_RUN += " --eval_steps 2 --eval_max_new_tokens 4 --save_steps 1 --lora_r 2"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: dict[str, str]) -> Iterator[Path]:
    """A folder with rows of own tasks and their file, in which the jobs run without Ray."""
    clips = read_rows(small["asr.train"])
    rows: list[dict[str, Any]] = [
        {"audio_path": row["audio_path"], "soap": "S 열이 납니다", "note": "짧게", "transcript": "t"}
        for row in clips[:3]
    ]
    rows += [{"audio_path": row["audio_path"], "verbatim": row["transcript"], "language": "ko"} for row in clips[3:6]]
    rows += [{"utterance": f"예약 {number}", "intent": "book"} for number in range(3)]
    write_rows(tmp_path / "rows.jsonl", [*rows, *read_rows(small["tqa.train"])[:3]])
    write_tasks(tmp_path / "tasks.yaml", TASKS_OF_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(featurize, "ray_session", lambda *args: nullcontext())
    monkeypatch.setattr(featurize, "make_features", partial(featurize.make_features, use_ray=False))
    yield tmp_path
    use_own_tasks({})


def write_tasks(path: Path, definitions: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(definitions, sort_keys=False, allow_unicode=True), encoding="utf-8")


def run_train(
    output_dir: str, flags: str = "--tasks_file tasks.yaml", job: str = "train_multitask", steps: int = 3
) -> dict[str, Any]:
    line = f"--train_jsonl rows.jsonl --val_jsonl rows.jsonl --features_dir features --max_steps {steps}"
    return train.run_training(parse_only(job, f"{SMALL_RUN} {line} --output_dir {output_dir} {flags}".split()))


def tensors(run: Path) -> Any:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_own_tasks_from_features_to_a_comparison(here: Path, evaluation_here: None) -> None:
    flags = f"--manifest rows.jsonl --model_id {TINY} --output_dir features --tasks_file tasks.yaml"
    folders = featurize.run_featurize_job(parse_only("featurize", flags.split())).folders
    features, front_end = Features(folders), get_family(TINY).front_end(TINY)
    names = [name for name in (*TASKS_OF_FILE, "tqa") for _ in range(3)]
    assert features.task.tolist() == [TASK_CODES[name] for name in names]
    shown = [front_end.show(features.row(row).prompt_ids.tolist()) for row in (0, 3, 6)]
    assert shown[0].endswith("Write a SOAP note. 짧게[/INST]") and shown[1].endswith("lang:ko[TRANSCRIBE]")
    assert shown[2] == "<s>[INST]Intent?\n예약 0[/INST]"

    result = run_train("run", "--tasks_file tasks.yaml --task_weights soap=1,verbatim=1,intent=1,tqa=1")
    assert {"soap/rouge_l", "soap/bleu", "verbatim/wer", "intent/char_f1", "tqa/rouge_l"} < set(result)
    assert not {"soap/wer", "verbatim/bleu", "intent/rouge_l"} & set(result)
    losses = [set(record) for record in read_metrics(here / "run", "train")]
    assert any("loss/soap" in record for record in losses) and any("loss/intent" in record for record in losses)

    usual = "--val_jsonl rows.jsonl --gen_max_new_tokens 4 --features_dir features"
    for name, more in (("base", f"--model_id {TINY} --tasks_file tasks.yaml"), ("tuned", "--lora_dir run/adapter")):
        evaluate.run_evaluation(parse_only("evaluate", f"{usual} --output_dir {name} {more}".split()))
        metrics = json.loads((here / name / "metrics.json").read_text(encoding="utf-8"))
        assert {task: metrics[task][TASKS[task].metrics[0]]["n"] for task in (*TASKS_OF_FILE, "tqa")} == {
            "soap": 3,
            "verbatim": 3,
            "intent": 3,
            "tqa": 3,
        }
        assert metrics["slices"]["soap"] and json.loads((here / name / "own_tasks.json").read_text()) == TASKS_OF_FILE
    comparison = compare.run_compare(parse_only("compare", ["base", "tuned", "--num_resamples", "100"]))
    assert set(comparison["tasks"]) == {*TASKS_OF_FILE, "tqa"}
    assert "verbatim" in (here / "runs" / "compare" / "comparison.html").read_text(encoding="utf-8")
    report = compare.run_compare(parse_only("compare", ["base"]))
    assert set(report) == {*TASKS_OF_FILE, "tqa"}

    entries = infer.run_inference(
        parse_only("infer", ["--output_dir", "run", "--jsonl", "rows.jsonl", "--max_new_tokens", "2"]), ""
    )
    assert [entry["task"] for entry in entries].count("soap") == 3


def test_a_resumed_run_equals_an_uninterrupted_one(here: Path) -> None:
    run_train("whole")
    run_train("parts", steps=1)
    shutil.copyfile("tasks.yaml", "moved.yaml")
    run_train("parts", "--tasks_file moved.yaml")
    whole, parts = tensors(here / "whole"), tensors(here / "parts")
    assert whole.keys() == parts.keys() and all(whole[name].equal(parts[name]) for name in whole)


def test_a_run_is_not_resumed_with_other_tasks(here: Path) -> None:
    run_train("run", steps=1)
    other = {**TASKS_OF_FILE, "soap": {**TASKS_OF_FILE["soap"], "prompt": "Write. {note}"}}
    write_tasks(here / "other.yaml", other)
    write_tasks(here / "order.yaml", dict(reversed(TASKS_OF_FILE.items())))
    for flags, kind in (
        ("--tasks_file other.yaml", "another definition of soap;"),
        ("--tasks_file order.yaml", "another order of the tasks;"),
        ("", "another definition of soap, verbatim, intent;"),
    ):
        with pytest.raises(SettingsError) as error:
            run_train("run", flags)
        assert f"--tasks_file: {here / 'run'} holds a run with {kind}" in str(error.value)
        assert "\n" not in str(error.value)
    write_tasks(here / "tasks.yaml", other)
    with pytest.raises(SettingsError, match="another definition of soap"):
        run_train("run", steps=1)  # with steps=1 the run is finished
    run_train("run", "--tasks_file other.yaml --overwrite")


def test_features_of_other_tasks_are_other_features(here: Path) -> None:
    fingerprints = [Extractor(TINY).fingerprint]
    front_end = get_family(TINY).front_end(TINY)
    assert fingerprints == [combined_hash([LAYOUT, front_end.fingerprint, "mel"])], "as before there were own tasks"
    for changes in ({}, {"metrics": ["rouge_l"]}, {"prompt": "Write. {note}"}, {"keys": ["audio_path", "soap", "x"]}):
        write_tasks(here / "other.yaml", {**TASKS_OF_FILE, "soap": {**TASKS_OF_FILE["soap"], **changes}})
        parse_only("featurize", ["--manifest", "rows.jsonl", "--tasks_file", "other.yaml"])
        fingerprints.append(Extractor(TINY).fingerprint)
    parse_only("featurize", ["--manifest", "rows.jsonl"])
    assert Extractor(TINY).fingerprint == fingerprints[0], "one job's tasks do not stay for the next"
    assert fingerprints[1] == fingerprints[2] and len(set(fingerprints)) == 4


def test_features_with_other_codes_of_the_tasks_are_other_features(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes of own tasks follow those of the built-in tasks, of which there were four once."""
    parse_only("featurize", ["--manifest", "rows.jsonl", "--tasks_file", "tasks.yaml"])
    before = Extractor(TINY).fingerprint
    for name in TASKS_OF_FILE:
        monkeypatch.setitem(TASK_CODES, name, TASK_CODES[name] - 1)
    assert Extractor(TINY).fingerprint != before


@pytest.mark.parametrize(("job", "tasks"), [("train_text", {"intent", "tqa"}), ("train_asr_adapter", {"verbatim"})])
def test_recipes_train_their_kind_of_tasks(here: Path, job: str, tasks: set[str]) -> None:
    result = run_train("run", job=job)
    assert {name.partition("/")[0] for name in result if "/" in name} - {"overall"} == tasks
    lines = (here / "run" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 * (12 - 3 * len(tasks)) and all('"other_task"' in line for line in lines)


def test_whisper_answers_no_questions(here: Path) -> None:
    flags = f"--train_jsonl rows.jsonl --output_dir run --model_id {WHISPER} --num_workers 0 --max_steps 1"
    with_file = [*flags.split(), "--tasks_file", "tasks.yaml", "--language", "ko"]
    assert train.run_training(parse_only("train_whisper", with_file))["finished"]
    write_rows(here / "rows.jsonl", read_rows(str(here / "rows.jsonl"))[:3])
    with pytest.raises(RunError, match="Whisper only transcribes and translates; this row's task is soap"):
        train.run_training(parse_only("train_whisper", [*with_file, "--overwrite"]))


def test_settings_name_own_tasks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = "--train_jsonl rows.jsonl --output_dir run"
    named = "--task_weights soap=1,tqa=2 --metric_for_best_model soap/rouge_l --curriculum intent:1,soap+intent:2"
    settings = parse_only("train_multitask", f"{named} {run} --tasks_file tasks.yaml".split())
    assert settings.task_weights == {"soap": 1, "tqa": 2} and settings.tasks_file == str(here / "tasks.yaml")
    (here / "run.yaml").write_text(f"tasks_file: tasks.yaml\ntask_weights: soap=1\ntrain_jsonl: {here}/rows.jsonl\n")
    assert parse_only("train_multitask", ["--config", "run.yaml", "--output_dir", "run"]).task_weights == {"soap": 1}
    rows, file = ("--val_jsonl", "rows.jsonl"), ("--tasks_file", "tasks.yaml")
    assert parse_only("evaluate", [*rows, "--mode", "valid_soap", *file]).mode == "valid_soap"
    sweep = parse_only("tune", f"--metric soap/rouge_l --space {{lr:[1e-4]}} {run} --tasks_file tasks.yaml".split())
    assert sweep.mode == "max"
    assert type(parse_only("preflight", f"{run} --tasks_file tasks.yaml".split())).__name__.endswith(
        "MultitaskSettings"
    )
    for job, flags, message in (
        ("train_multitask", f"{named} {run}", "unknown task 'soap'; known: asr, sqa, tqa, aac"),
        ("train_text", f"--metric_for_best_model soap/rouge_l {run} --tasks_file tasks.yaml", "must be one of tqa/"),
        ("train_text", f"{run} --tasks_file none.yaml", "--tasks_file none.yaml: [Errno 2] No such file"),
        ("tune", f"--space {{tasks_file:[a,b]}} {run}", "tasks_file: cannot be swept"),
        ("evaluate", "--val_jsonl rows.jsonl --mode valid_soap", "must be submission_ or valid_ with one of asr"),
    ):
        with pytest.raises(SystemExit) as status:
            parse_only(job, flags.split())
        assert status.value.code == 2 and message in capsys.readouterr().err


def test_a_mistake_in_the_file_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soap = {**TASKS_OF_FILE["soap"], "metrics": ["rouge"]}
    write_tasks(here / "tasks.yaml", {**TASKS_OF_FILE, "soap": soap, "intent": {"keys": ["x"]}})
    with pytest.raises(SystemExit) as status:
        parse_only("featurize", ["--manifest", "rows.jsonl", "--tasks_file", "tasks.yaml"])
    lines = capsys.readouterr().err.splitlines()
    assert status.value.code == 2 and len(lines) == 3
    assert lines[0].startswith("error: --tasks_file tasks.yaml: soap: metrics: 'rouge' is not one of cer_nospace, ")
    assert lines[1] == "error: --tasks_file tasks.yaml: intent: metrics: must be a list of names, such as [a, b]"
    (here / "tasks.yaml").write_text('"a\\ud800": {keys: [x]}')
    with pytest.raises(SystemExit):
        parse_only("featurize", ["--manifest", "rows.jsonl", "--tasks_file", "tasks.yaml"])
    assert "--tasks_file tasks.yaml: a\\ud800: a task's name is lower-case" in capsys.readouterr().err


def test_evaluations_with_other_tasks_are_not_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [{"id": str(n), "task": "intent", "reference": "book", "prediction": "book"} for n in range(4)]
    write_rows(here / "answers.jsonl", answers)
    other = {**TASKS_OF_FILE, "intent": {**TASKS_OF_FILE["intent"], "metrics": ["rouge_l"]}}
    write_tasks(here / "other.yaml", other)
    for name, file in (("a", "tasks"), ("b", "other")):
        flags = f"--score_only answers.jsonl --output_dir {name} --tasks_file {file}.yaml"
        assert score_only.score_only(parse_only("evaluate", flags.split()))["intent"]
    with pytest.raises(SystemExit):
        parse_only("compare", ["a", "b"])
    assert "--runs: a and b define their tasks differently; name a file in --tasks_file" in capsys.readouterr().err
    compare.run_compare(parse_only("compare", ["a", "b", "--tasks_file", "other.yaml", "--num_resamples", "100"]))
    (here / "a" / "own_tasks.json").write_text("{")
    with pytest.raises(SystemExit):
        parse_only("compare", ["a"])
    assert f"{here}/a/own_tasks.json: damaged; name the file of its tasks in" in capsys.readouterr().err


def test_preflight_and_audit_know_own_tasks(here: Path) -> None:
    flags = f"{SMALL_RUN} --max_steps 2 --train_jsonl rows.jsonl --output_dir run --no_tune --tasks_file tasks.yaml"
    preflight.run_preflight(parse_only("preflight", flags.split()))
    report = json.loads((here / "run" / "preflight" / "preflight.json").read_text(encoding="utf-8"))
    assert report["ready"]
    assert "soap 3 (25.0%), verbatim 3 (25.0%), intent 3 (25.0%)" in json.dumps(report)
    flags = f"--input rows.jsonl --output_dir audit --model_id {TINY} --tasks_file tasks.yaml"
    figures = audit.run_audit_job(parse_only("audit", flags.split()), use_ray=False)
    assert {task: entry["rows"] for task, entry in figures["tasks"].items()} == {
        **dict.fromkeys(TASKS_OF_FILE, 3),
        "tqa": 3,
    }


def test_infer_takes_a_file(here: Path) -> None:
    """Own tasks of a base, which has recorded none."""
    flags = f"--model_id {TINY} --jsonl rows.jsonl --max_new_tokens 2 --tasks_file tasks.yaml"
    entries = infer.run_inference(parse_only("infer", flags.split()), "")
    assert [entry["task"] for entry in entries] == [*(task for task in TASKS_OF_FILE for _ in range(3)), *["tqa"] * 3]


RAY_JOBS = """
import voxray, voxray.commands.compare, json
from voxray.commands.compare import run_compare
from voxray.config.compare import CompareSettings
from voxray.config.parse import settings_from
common = {"tasks_file": "tasks.yaml", "features_dir": "features"}
small = {"max_steps": 2, "per_device_bsz": 3, "eval_max_new_tokens": 4, "lora_r": 2, "rows_per_shard": 4}
result = voxray.train("multitask", model_id=MODEL, train_jsonl="rows.jsonl", val_jsonl="rows.jsonl",
    output_dir="run", num_workers=2, task_weights={"soap": 1, "verbatim": 1, "intent": 1}, **small, **common)
assert "soap/rouge_l" in result.metrics and "verbatim/wer" in result.metrics, result
for name, values in {"base": {**common, "model_id": MODEL}, "tuned": {"lora_dir": "run"}}.items():
    scored = voxray.evaluate(val_jsonl="rows.jsonl", output_dir=name, gen_max_new_tokens=4, rows_per_shard=4, **values)
    assert {"soap", "verbatim", "intent", "tqa"} <= set(scored.metrics), scored
run_compare(settings_from(CompareSettings, {"runs": ("base", "tuned"), "num_resamples": 100}))
print("all", "done")
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_own_tasks_on_rays_workers(here: Path) -> None:
    code = f"MODEL = {TINY!r}\n{RAY_JOBS}"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=here)
    assert done.returncode == 0 and "all done" in done.stdout, done.stdout + done.stderr
