"""Speech translation: Voxtral and Whisper train on it, validate, evaluate and compare; the other jobs take its rows."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, WHISPER, read_rows, write_rows
from helpers.running import parse_only

from voxray.batches.collate import collate_training
from voxray.commands import audit, compare, evaluate, featurize, infer, preflight, train
from voxray.core.errors import RunError
from voxray.core.tasks import use_own_tasks
from voxray.features.reader import Features
from voxray.models.interface import IGNORED
from voxray.models.registry import get_family
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = "--num_workers 0 --rows_per_shard 8 --per_device_bsz 4 --lr 1e-2 --lora_r 2 --max_steps 4 --warmup_steps 0"
RUN += " --train_jsonl rows.jsonl --val_jsonl rows.jsonl --features_dir features --output_dir run"
RUN += " --eval_steps 2 --save_steps 2 --eval_max_new_tokens 6"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: dict[str, str]) -> Iterator[Path]:
    """A folder with four translations into English, two into Korean and two transcripts, in which jobs run without Ray.

    Four of the translations have a transcript with segments, too.
    """
    clips = read_rows(small["asr.train"])
    for row in clips[:4]:
        row |= {"translation": "The patient has a fever.", "target_language": "English"}
        row |= {"segments": [{"start": 0, "end": 0.5, "text": "not this"}]}
    korean = [{"audio_path": row["audio_path"], "translation": "열이 납니다", "language": "en"} for row in clips[4:6]]
    write_rows(
        tmp_path / "rows.jsonl", [*clips[:4], *({**row, "target_language": "ko"} for row in korean), *clips[6:8]]
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(featurize, "ray_session", lambda *args: nullcontext())
    monkeypatch.setattr(featurize, "make_features", partial(featurize.make_features, use_ray=False))
    yield tmp_path
    use_own_tasks({})


def evaluate_both(model_id: str, tasks: dict[str, int]) -> dict[str, Any]:
    """Evaluate the base and the run, check their metrics.json, and compare the two."""
    usual = "--val_jsonl rows.jsonl --gen_max_new_tokens 6 --features_dir features"
    for name, more in (("base", f"--model_id {model_id}"), ("tuned", "--lora_dir run/adapter")):
        evaluate.run_evaluation(parse_only("evaluate", f"{usual} --output_dir {name} {more}".split()))
        metrics = json.loads(Path(name, "metrics.json").read_text(encoding="utf-8"))
        assert metrics["ast"]["bleu"]["n"] == metrics["ast"]["chrf"]["n"] == tasks["ast"]
        assert metrics["asr"]["cer_nospace"]["n"] == tasks["asr"] and metrics["normalizer"]["none"] == tasks["ast"]
        assert metrics["slices"]["ast"]["dataset"]["rows"]["bleu"]["value"] == metrics["ast"]["bleu"]["value"]
        assert metrics["overall"]["macro"]["n"] == tasks["asr"] + tasks["ast"]
        assert "bleu" in Path(name, "report.html").read_text(encoding="utf-8")
    comparison = compare.run_compare(parse_only("compare", ["base", "tuned", "--num_resamples", "100"]))
    assert set(comparison["tasks"]) == {"asr", "ast"} and {"bleu", "chrf"} < set(comparison["tasks"]["ast"]["metrics"])
    return comparison


def test_voxtral_from_features_to_a_comparison(here: Path, evaluation_here: None) -> None:
    flags = f"--manifest rows.jsonl --model_id {TINY} --output_dir features --rows_per_shard 8"
    folders = featurize.run_featurize_job(parse_only("featurize", flags.split())).folders
    features, front_end = Features(folders), get_family(TINY).front_end(TINY)
    assert features.task.tolist() == [4] * 6 + [0] * 2
    rows = [features.row(number) for number in range(8)]
    shown = [front_end.show(row.prompt_ids.tolist()) for row in rows]
    assert shown[0].endswith("Translate the speech into English.[/INST]") and "[AUDIO]x50" in shown[0]
    assert shown[4].endswith("Translate the speech into Korean.[/INST]") and shown[6].endswith("[TRANSCRIBE]")
    labels = collate_training(rows[:1], front_end)["labels"][0]
    assert front_end.decode(labels[labels != IGNORED].tolist()) == "The patient has a fever."

    best = "--metric_for_best_model ast/bleu --load_best_model_at_end --early_stopping_patience 9"
    weights = "--task_weights ast=2,asr=1"
    command = f"{RUN} --model_id {TINY} {best} {weights}"
    result = train.run_training(parse_only("train_multitask", command.split()))
    assert {"ast/bleu", "ast/chrf", "ast/loss", "asr/cer_nospace", "overall/macro"} < set(result)
    assert not {"ast/rouge_l", "ast/distinct_1", "ast/char_f1"} & set(result)
    validations = read_metrics(here / "run", "validation")
    assert len(validations) == 2 and all(0 <= record["ast/chrf"] <= 100 for record in validations)
    for record in validations:
        mean = (record["ast/bleu"] / 100 + 1 - min(record["asr/cer_nospace"], 1)) / 2
        assert record["overall/macro"] == pytest.approx(mean)
    assert any(record.get("loss/ast", 0) > 0 for record in read_metrics(here / "run", "train"))
    previews = [json.loads(line) for line in (here / "run" / "previews.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "Translate the speech into English." in {entry.get("prompt") for entry in previews}

    evaluate_both(TINY, {"ast": 6, "asr": 2})
    signatures = json.loads((here / "tuned" / "metrics.json").read_text(encoding="utf-8"))["signatures"]["ast"]
    assert "|tok:13a+char|" in signatures["bleu"] and "norm:" not in signatures["chrf"]
    infer_flags = [
        "--output_dir",
        "run",
        "--jsonl",
        "rows.jsonl",
        "--max_new_tokens",
        "2",
        "--pseudo_labels",
        "p.jsonl",
    ]
    entries = infer.run_inference(parse_only("infer", infer_flags), "")
    assert [entry["task"] for entry in entries] == ["ast"] * 6 + ["asr"] * 2
    labelled = [row for row in read_rows("p.jsonl") if "translation" in row]
    assert {row["target_language"] for row in labelled} <= {"English", "ko"}


def test_whisper_translates_into_english(here: Path, evaluation_here: None) -> None:
    """Rows into Korean are left out and listed; rows of both tasks train together."""
    run = f"{RUN} --model_id {WHISPER} --metric_for_best_model ast/chrf --load_best_model_at_end --max_len 120"
    result = train.run_training(parse_only("train_whisper", run.split()))
    assert {"ast/bleu", "ast/chrf", "ast/loss", "asr/cer_nospace"} < set(result)
    losses = [record["loss/ast"] for record in read_metrics(here / "run", "train") if "loss/ast" in record]
    assert losses[-1] < losses[0]
    lines = [json.loads(line) for line in (here / "run" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(line["line"], line["reason"]) for line in lines} == {(5, "unsupported_task"), (6, "unsupported_task")}
    assert all("Whisper translates into English only" in line["message"] for line in lines)
    [features] = (Features([path.parent]) for path in (here / "features").glob("*/set.json"))
    front_end = get_family(WHISPER).front_end(WHISPER)
    shown = [front_end.show(features.row(number).prompt_ids.tolist()) for number in range(len(features))]
    assert (
        shown
        == ["<|startoftranscript|><|ko|><|translate|><|notimestamps|>"] * 4
        + ["<|startoftranscript|><|ko|><|transcribe|><|notimestamps|>"] * 2
    )
    evaluate_both(WHISPER, {"ast": 4, "asr": 2})


def test_other_jobs_take_translations(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = parse_only("preflight", f"{RUN} --model_id {TINY} --no_tune".split())
    assert type(settings).__name__.endswith("MultitaskSettings")
    preflight.run_preflight(settings)
    report = (here / "run" / "preflight" / "preflight.json").read_text(encoding="utf-8")
    assert json.loads(report)["ready"] and "asr 2 (25.0%), ast 6 (75.0%)" in report
    flags = f"--input rows.jsonl --output_dir audit --model_id {TINY}"
    figures = audit.run_audit_job(parse_only("audit", flags.split()), use_ray=False)
    assert {task: entry["rows"] for task, entry in figures["tasks"].items()} == {"asr": 2, "ast": 6}
    sweep = "--metric ast/bleu --space {lr:[1e-4]} --train_jsonl rows.jsonl --output_dir sweep"
    assert parse_only("tune", sweep.split()).mode == "max"
    assert parse_only("evaluate", ["--val_jsonl", "rows.jsonl", "--mode", "valid_ast"]).mode == "valid_ast"
    write_rows(here / "rows.jsonl", read_rows("rows.jsonl")[4:6])
    with pytest.raises(RunError, match="holds no row of the task that this job trains on"):
        train.run_training(parse_only("train_asr_adapter", f"{RUN} --model_id {TINY}".split()))
    with pytest.raises(RunError, match="Whisper translates into English only; target_language of this row is ko"):
        train.run_training(parse_only("train_whisper", f"{RUN} --model_id {WHISPER} --overwrite".split()))
    with pytest.raises(SystemExit):
        parse_only("efficiency", ["--task", "ast"])
    assert "must be one of asr, sqa, aac" in capsys.readouterr().err


def test_an_own_task_cannot_have_the_template(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"keys": ["audio_path", "german"], "template": "translation", "answer": "german", "metrics": ["bleu"]}
    (here / "tasks.yaml").write_text(yaml.safe_dump({"german": own}))
    with pytest.raises(SystemExit):
        parse_only("featurize", ["--manifest", "rows.jsonl", "--tasks_file", "tasks.yaml"])
    message = "error: --tasks_file tasks.yaml: german: template: must be transcription or conversation, or left out for"
    assert capsys.readouterr().err.startswith(message)


def test_infer_translates_a_clip(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer is that of a row of a manifest with the same target language, and becomes a label of such a row."""
    clip = {**read_rows("rows.jsonl")[4], "target_language": "en"}
    write_rows(here / "one.jsonl", [clip])
    base = ["--model_id", WHISPER, "--max_new_tokens", "12"]
    [expected] = infer.run_inference(parse_only("infer", [*base, "--jsonl", "one.jsonl"]), "")
    line = [*base, "--audio_path", clip["audio_path"], "--language", clip["language"], "--task", "translate"]
    [entry] = infer.run_inference(parse_only("infer", [*line, "--pseudo_labels", "labels.jsonl"]), "")
    assert (entry["task"], entry["prediction"]) == ("ast", expected["prediction"])
    [label] = read_rows(here / "labels.jsonl")
    assert (label["target_language"], label["translation"]) == ("en", entry["prediction"])
    with pytest.raises(RunError, match="Whisper translates into English only; target_language of this row is ko"):
        infer.run_inference(parse_only("infer", [*line, "--target_language", "Korean"]), "")
    for flags in ("--jsonl one.jsonl --task translate", "--audio_path a.wav --target_language ko"):
        with pytest.raises(SystemExit):
            parse_only("infer", flags.split())
    message = capsys.readouterr().err
    assert "--task translate: is for --audio_path" in message and "--target_language: needs --task translate" in message
