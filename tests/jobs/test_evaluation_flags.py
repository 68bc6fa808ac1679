"""Flags of evaluate and infer for sampling, perplexity, retries, printing, and scoring without a model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from conftest import SPEECH, TINY, WHISPER, manifest, read_rows, write_rows
from helpers.adapters import random_adapter
from helpers.running import ROOT, environment, load_job, parse_only
from peft.tuners.lora import LoraLayer

from voxray.commands import evaluate as job
from voxray.commands import infer
from voxray.commands.compare import run_compare
from voxray.commands.export import run_export
from voxray.comparison.evaluations import read_evaluations
from voxray.config.compare import CompareSettings
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.config.export import ExportSettings
from voxray.core.errors import RunError, SettingsError
from voxray.core.manifest import chunks, read_chunk
from voxray.evaluation.predictions import read_predictions
from voxray.generation import continuous_batching
from voxray.generation.generate import SamplingParams
from voxray.generation.model import InferenceConfig, load_model, model_bytes
from voxray.models.voxtral.front_end import VoxtralFrontEnd

pytestmark = pytest.mark.usefixtures("one_thread")
Evaluate = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture
def evaluate(small: dict[str, str], tmp_path: Path, evaluation_here: None) -> Evaluate:
    """Run the evaluate job in this process; returns metrics.json and the prediction rows."""

    def run(**flags: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        defaults = {"model_id": TINY, "storage_path": str(tmp_path), "features_dir": "f", "gen_max_new_tokens": 8}
        settings = {**defaults, "val_jsonl": (small["tqa.val"],), **flags}
        folder = job.run_evaluation(EvaluateSettings.model_validate(settings)).output_dir
        return json.loads((folder / "metrics.json").read_text()), read_predictions(folder)

    return run


def infer_rows(**flags: Any) -> list[dict[str, Any]]:
    settings = InferSettings.model_validate({"model_id": TINY, "max_new_tokens": 8, **flags})
    return infer.run_inference(settings, manifest("asr.val"))


def fail_at(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Any], bool]) -> None:
    """Let the model fail on every batch with a row for which ``fails`` is true."""
    collate = continuous_batching.collate_prompts

    def collate_or_fail(rows: Any, front_end: Any) -> Any:
        if any(map(fails, rows)):
            raise RuntimeError("no such\nexpert")
        return collate(rows, front_end)

    monkeypatch.setattr(continuous_batching, "collate_prompts", collate_or_fail)


def test_beams_and_sampling(evaluate: Evaluate, small: dict[str, str], tmp_path: Path) -> None:
    """Both change the answers of evaluate and infer; the same seed samples the same answers."""

    def texts(**flags: Any) -> list[str]:
        return [row["prediction"] for row in evaluate(val_jsonl=(small["sqa.val"],), **flags)[1]]

    def inferred(**flags: Any) -> list[str]:
        return [row["prediction"] for row in infer_rows(jsonl=small["sqa.val"], **flags)]

    greedy = texts()
    assert texts(num_beams=4) != greedy
    sampled = texts(temperature=3.0, seed=1)
    assert greedy != sampled != texts(temperature=3.0, seed=2)
    same_row = [{**row, "id": name} for row in read_rows(small["sqa.val"])[:1] for name in ("a", "b")]
    flags = {"jsonl": write_rows(tmp_path / "twice.jsonl", same_row), "batch_size": 1, "temperature": 3.0}
    first, second = infer_rows(**flags)
    assert first["prediction"] != second["prediction"], "every batch has its own seed"
    assert infer_rows(**flags) == [first, second], "sampling is reproducible"
    greedy = inferred()
    assert inferred(num_beams=4) != greedy
    assert inferred(temperature=3.0, seed=1, top_p=1e-6) == greedy, "only the likeliest token can be sampled"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--num_beams 2 --temperature 1", "--num_beams and --temperature: give one of them"),
        ("--top_p 0.5", "--top_p 0.5: needs --temperature above 0"),
        ("--temperature 1 --check_batch_invariance 2", "answers that are drawn with --temperature always differ"),
        ("--gpus_per_model 1.5", "--gpus_per_model 1.5: a fraction of one GPU, or whole ones"),
        ("--num_models 4:1", "--num_models: must be a whole number, or a range such as 1:4 (got '4:1')"),
        ("--num_models some", "--num_models: must be a whole number, or a range such as 1:4 (got 'some')"),
        ("--score_only p", "--val_jsonl and --score_only: give one of them"),
    ],
)
def test_conflicting_values(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_only("evaluate", ["--val_jsonl", "v.jsonl", *line.split()])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_merge_adapter(evaluate: Evaluate, small: dict[str, str], tmp_path: Path) -> None:
    """The answers are those of the exported model, and no layer with LoRA is left."""
    adapter = random_adapter(tmp_path / "adapter", std=0.1)
    run_export(ExportSettings(lora_dir=str(adapter), output_dir=str(tmp_path / "exported"), dtype="float32"))

    def texts(**flags: Any) -> list[str]:
        return [row["prediction"] for row in evaluate(val_jsonl=(small["asr.val"],), **flags)[1]]

    exported, base = texts(model_id=str(tmp_path / "exported")), texts()
    assert texts(lora_dir=str(adapter), merge_adapter=True) == exported != base
    infer_flags = {"lora_dir": str(adapter), "jsonl": small["asr.val"]}
    assert [row["prediction"] for row in infer_rows(**infer_flags, merge_adapter=True)] == exported
    config = InferenceConfig(TINY, str(adapter), SamplingParams(1), 1, merge_adapter=True)
    model, num_tensors = load_model(config)
    assert num_tensors > 0 and not [name for name, _ in model.named_modules() if "lora" in name]
    plain, _ = load_model(replace(config, merge_adapter=False))
    size = sum(module.base_layer.weight.nbytes for module in plain.modules() if isinstance(module, LoraLayer))
    assert model_bytes(replace(config, fp16=True), 1) == (size // 2, 0)  # the tiny model is stored in float16
    with pytest.raises(SystemExit):
        parse_only("infer", ["--audio_path", "a.wav", "--merge_adapter", "--quantize", "4bit"])


def test_static_cache(evaluate: Evaluate, small: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers stay the same, and the step of evaluate and of infer is compiled."""
    steps: list[Any] = []
    _, plain = evaluate()
    monkeypatch.setattr(torch, "compile", lambda step, **options: steps.append(step) or step)
    _, static = evaluate(static_cache=True, output_dir="static")
    texts = [row["prediction"] for row in plain]
    assert [row["prediction"] for row in static] == texts
    num_steps = len(steps)
    assert [row["prediction"] for row in infer_rows(jsonl=small["tqa.val"], static_cache=True)] == texts
    assert 0 < num_steps < len(steps)


@pytest.mark.parametrize("other", [["--num_beams", "2"], ["--temperature", "1"], ["--quantize", "8bit"]])
def test_static_cache_is_for_greedy_answers(other: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_only("infer", ["--audio_path", "a.wav", "--static_cache", *other])
    assert end.value.code == 2 and f"--static_cache: not with {other[0]}" in capsys.readouterr().err


def test_something_to_evaluate_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_only("evaluate", ["--model_id", TINY])
    assert end.value.code == 2 and "--score_only: give --val_jsonl, manifests to evaluate on" in capsys.readouterr().err


def test_models_and_gpus(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Both flags reach the pool (``plan_pool`` has its own test), and so does the number of processes."""
    sessions: list[int] = []
    pools: list[Any] = []
    monkeypatch.setattr(job, "ray_session", lambda log, processes: sessions.append(processes) or nullcontext())
    real = job.answer_rows

    def answer(*args: Any, models: Any, **options: Any) -> None:
        pools.append((models.number, models.gpus_each))
        real(*args, models=models, **options)

    monkeypatch.setattr(job, "answer_rows", answer)
    evaluate(num_models="1:3", gpus_per_model=0.5)
    assert pools == [("1:3", 0.5)] and sessions == [3]
    assert "warning: --gpus_per_model has no effect" in capsys.readouterr().out


def test_perplexity(evaluate: Evaluate, small: dict[str, str]) -> None:
    """By default only of answers; with ``all`` of transcripts too; with ``none`` of no row."""
    both = (small["tqa.val"], small["asr.val"])
    for flags, tasks in (({}, {"tqa"}), ({"perplexity": "all"}, {"tqa", "asr"}), ({"perplexity": "none"}, set())):
        metrics, _ = evaluate(val_jsonl=both, **flags)
        assert {task for task in ("tqa", "asr") if "perplexity" in metrics[task]} == tasks


def test_retry_failed(
    evaluate: Evaluate, small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, lambda row: row.id == "tqa.val.jsonl:2")
        _, rows = evaluate(output_dir="e")
    output = capsys.readouterr().out
    assert len(rows) == 3 and "1 row(s) left out in all, listed in quarantine.jsonl; --retry_failed retries" in output
    ledger = tmp_path / "e" / "quarantine.jsonl"
    assert len(evaluate(output_dir="e")[1]) == 3 and '"line": 2' in ledger.read_text()
    assert len(evaluate(output_dir="e", retry_failed=True)[1]) == 4 and ledger.read_text() == ""
    assert "1 row(s) left out" in capsys.readouterr().out
    # with other settings the earlier predictions are moved aside
    assert len(evaluate(output_dir="e", gen_max_new_tokens=1)[1]) == 4
    output = capsys.readouterr().out
    assert "4 answer(s) cut off at --gen_max_new_tokens 1" in output
    assert "these are in predictions-earlier now" in output
    load_job("evaluate").main(
        ["--score_only", str(tmp_path / "e" / "predictions-earlier"), "--output_dir", str(tmp_path / "s")]
    )
    assert "4 rows scored" in capsys.readouterr().out


@pytest.mark.parametrize("inside", ["checkpoints/step-000002/adapter_config.json", "adapter/x", "metrics.jsonl"])
def test_an_evaluation_is_not_written_into_a_training_run(
    inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / inside).touch()
    for folder in {tmp_path, (tmp_path / inside).parent} if inside.endswith("config.json") else {tmp_path}:
        for flag in ("--val_jsonl", "--score_only"):
            with pytest.raises(SystemExit) as end:
                load_job("evaluate").main([flag, manifest("asr.val"), "--output_dir", str(folder)])
            assert end.value.code == 2
            assert f"--output_dir {folder}: holds a training run or an adapter" in capsys.readouterr().err
        assert not (folder / "settings.json").exists()


def test_check_batch_invariance(evaluate: Evaluate, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    both = (small["tqa.val"], small["asr.val"])
    metrics, _ = evaluate(val_jsonl=both, check_batch_invariance=5)
    assert metrics["batch_invariance"] == {"n": 5, "differing": 0, "ids": []}
    assert "0 of 5 rows differ when answered one by one" in capsys.readouterr().out


# --score_only

LINES = [
    {"id": "a", "task": "asr", "reference": "가나다", "prediction": "가나라", "speaker": "s", "duration": 12.5},
    {"id": 2, "task": "sqa", "references": ["열이 나요", "열"], "prediction": "열이 나요"},
    {"id": "e", "task": "asr", "reference": "", "prediction": "으음"},
    {
        "id": 7.0,
        "task": "tqa",
        "reference": "\ud83d",
        "prediction": "네\udfff",
        "speaker": "\ud83d",
        "num_samples": 10**30,
    },
    {"id": 8, "task": "tqa", "reference": "네", "prediction": "네", "nll": 2.0, "num_tokens": 4, "duration": 10**400},
    {"id": 9, "task": "tqa", "reference": "네", "prediction": "네", "nll": 2.0, "num_tokens": -4},
    {"id": 10, "task": "tqa", "reference": "네", "prediction": "네", "nll": 2.0, "num_tokens": 1e300, "snr_db": 1e300},
    {"id": 11, "task": "tqa", "reference": "네", "prediction": "네", "nll": 2.0, "num_tokens": 2.5, "duration": "3"},
]
"""With values that JSON can express but Parquet columns of text and numbers cannot store."""
BAD = [
    ('{"id": "b", "task": "asr"', "not JSON"),
    ('["list"]', "a JSON list, not an object"),
    ('{"id": "b", "task": "asr", "reference": "x"}', "there is no prediction"),
    ('{"id": "b", "task": "asr", "prediction": "x"}', "there is no reference"),
    ('{"id": "b", "task": "asr", "reference": 3, "prediction": "x"}', "reference is not text"),
    ('{"id": "b", "task": "sqa", "references": [], "prediction": "x"}', "references is not a list of texts"),
    ('{"id": "b", "task": "mt", "reference": "x", "prediction": "x"}', "task 'mt' is not one of asr, sqa, tqa, aac"),
    ('{"task": "asr", "reference": "x", "prediction": "x"}', "there is no id"),
    ('{"id": "b", "reference": "x", "prediction": "x"}', "there is no task; it is one of asr, sqa, tqa, aac"),
    ('{"id": true, "task": "asr", "reference": "x", "prediction": "x"}', "id is neither text nor a number"),
    ('{"id": "7", "task": "tqa", "reference": "x", "prediction": "x"}', "id '7' is already in line 7"),
    ('{"id": "a", "task": "asr", "reference": "x", "prediction": "x"}', "id 'a' is already in line 1"),
]


def score(path: str, output_dir: Path, *flags: str) -> dict[str, Any]:
    load_job("evaluate").main(["--score_only", path, "--output_dir", str(output_dir), *flags])
    return json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))


def test_score_only_accepts_rows_of_other_systems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.jsonl"
    good = "".join(json.dumps(line) + "\r\n\n" for line in LINES)
    path.write_text("\ufeff" + good + "\n".join(text for text, _ in BAD), encoding="utf-8")
    metrics = score(str(path), tmp_path / "o")
    assert metrics["asr"]["cer"]["value"] == pytest.approx(1 / 3) and metrics["asr"]["cer"]["n"] == 1
    assert metrics["sqa"]["exact_match"]["value"] == 1
    assert metrics["tqa"]["loss"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 1}
    assert metrics["tqa"]["exact_match"]["value"] == pytest.approx(4 / 5)
    assert metrics["slices"]["asr"]["duration"]["10-20 s"]["n"] == 1
    assert score(str(tmp_path / "o"), tmp_path / "again")["slices"] == metrics["slices"], "all metadata is stored"
    first = 2 * len(LINES) + 1
    output = capsys.readouterr()
    assert f"{len(LINES)} rows scored, {len(BAD)} bad line(s) left out" in output.out
    messages = output.err.splitlines()
    assert len(messages) == len(BAD)
    for number, (line, (_, message)) in enumerate(zip(messages, BAD, strict=True), first):
        assert line.startswith(f"{path}:{number}: left out: {message}")
    ledger = [json.loads(line) for line in (tmp_path / "o" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in ledger] == list(range(first, first + len(BAD)))
    assert set(score(str(path), tmp_path / "p", "--mode", "valid_sqa")) >= {"sqa"}
    path.write_text(BAD[0][0])
    with pytest.raises(SystemExit) as end:
        score(str(path), tmp_path / "q")
    assert end.value.code == 1 and f"no row to score; {path}:1: not JSON" in capsys.readouterr().err
    for missing, message in (("no.jsonl", "no such file or folder"), (str(tmp_path), "no predictions/part-*.parquet")):
        with pytest.raises(SystemExit):
            score(missing, tmp_path / "q")
        assert message in capsys.readouterr().err
    path.write_text(good + "x\n" * 99)
    score(str(path), tmp_path / "q")
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 21 and "79 more bad lines left out" in error
    assert len((tmp_path / "q" / "quarantine.jsonl").read_text().splitlines()) == 99


def test_score_only_takes_the_language_of_rows_that_name_none(tmp_path: Path) -> None:
    row = {"task": "asr", "reference": "Mr. Smith is 20", "prediction": "mister smith is twenty"}
    rows = [{"id": "a", **row}, {"id": "b", **row, "language": "de"}, {"id": "c", **row, "task": "tqa"}]
    path = write_rows(tmp_path / "other.jsonl", rows)
    unknown = score(path, tmp_path / "o")
    metrics = score(path, tmp_path / "e", "--language", "English")
    assert "ko-v1" in unknown["normalizer"] and unknown["asr"]["wer"]["value"] > metrics["asr"]["wer"]["value"]
    assert list(metrics["slices"]["asr"]["language"]) == ["de", "en"]
    again = score(str(tmp_path / "e"), tmp_path / "again")
    assert again["asr"] == metrics["asr"] and again["normalizer"] == metrics["normalizer"]
    assert score(str(tmp_path / "o"), tmp_path / "o", "--language", "en")["asr"] == metrics["asr"], "in its own folder"
    one, other = read_evaluations([str(tmp_path / "o"), str(tmp_path / "e")])
    assert one.normalizer == other.normalizer != ""


def test_score_only_equals_the_evaluation(
    evaluate: Evaluate, small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For its folder, its predictions folder, and its rows as JSON Lines."""
    metrics, rows = evaluate(val_jsonl=(small["tqa.val"], small["asr.val"]), output_dir="e")
    assert score(str(tmp_path / "e"), tmp_path / "a") == metrics
    assert score(str(tmp_path / "e" / "predictions"), tmp_path / "b") == metrics
    assert score(write_rows(tmp_path / "r.jsonl", rows), tmp_path / "c") == metrics
    terms = tmp_path / "terms.txt"
    terms.write_text("열\n", encoding="utf-8")
    before, ledger = json.loads((tmp_path / "e" / "settings.json").read_text()), (tmp_path / "e" / "quarantine.jsonl")
    ledger.write_text("{}\n")
    assert "terms" in score(str(tmp_path / "e"), tmp_path / "e", "--terms", str(terms))
    after = json.loads((tmp_path / "e" / "settings.json").read_text())
    assert after == before | {"terms": str(terms)} and ledger.read_text() == "{}\n", "other files are unchanged"
    assert list((tmp_path / "e" / "predictions").glob("made_by.json"))
    score(str(tmp_path / "r.jsonl"), tmp_path / "e")
    assert not list((tmp_path / "e" / "predictions").glob("made_by.json")), (
        "rows of others do not count as answers of the evaluation"
    )
    others = tmp_path / "others"
    others.mkdir()
    pq.write_table(pa.Table.from_pylist([{"id": "a", "task": "asr", "reference": "x"}]), others / "part-0.parquet")
    with pytest.raises(SystemExit):
        score(str(others), tmp_path / "d")
    assert f"{others}: row 1 (a): prediction is missing, not text" in capsys.readouterr().err


def test_terms_spelling_and_jars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flags reach the scorer. tests/evaluation/test_score.py tests what they do."""
    lines = [
        {"id": "a", "task": "asr", "reference": "the colour of 타이레놀", "prediction": "the color", "language": "en"},
        {"id": "b", "task": "aac", "references": ["a dog barks"], "prediction": "a dog", "nll": 2.0, "num_tokens": 4},
        {
            "id": "c",
            "task": "asr",
            "reference": "5mg",
            "transcript_phonetic": "오 밀리그램",
            "prediction": "오밀리그램",
        },
    ]
    path, terms, table = write_rows(tmp_path / "x.jsonl", lines), tmp_path / "terms.txt", tmp_path / "normalizer.json"
    terms.write_text("타이레놀\n", encoding="utf-8")
    table.write_text('{"colour": "color"}', encoding="utf-8")
    plain = score(path, tmp_path / "a")
    assert "terms" not in plain and "not available" in plain["not_available"]["aac"]["meteor"]
    assert plain["asr"]["cer_best"]["value"] < plain["asr"]["cer_nospace"]["value"]
    assert plain["aac"]["loss"]["value"] == 0.5
    metrics = score(path, tmp_path / "b", "--terms", str(terms), "--english_spelling", str(table))
    assert metrics["terms"]["n"] == 1 and metrics["asr"]["term_recall"]["value"] == 0
    assert "whisper-en-v1" in metrics["normalizer"] and metrics["asr"]["wer"]["value"] < plain["asr"]["wer"]["value"]
    reason = score(path, tmp_path / "c", "--caption_jars", str(tmp_path))["not_available"]["aac"]["meteor"]
    assert reason != plain["not_available"]["aac"]["meteor"]
    with pytest.raises(SystemExit) as end:
        score(path, tmp_path / "d", "--terms", str(tmp_path / "nowhere"))
    assert end.value.code == 1 and "nowhere: cannot read the list of terms" in capsys.readouterr().err


def test_normalizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rules of a leaderboard are chosen by name; metrics.json, the table, the report and a comparison name them.

    Rows that an earlier version counted by other rules are counted again.
    """
    line = {"id": "a", "task": "asr", "reference": "पानी में", "prediction": "पाना मे", "language": "hi"}
    path = write_rows(tmp_path / "x.jsonl", [line])
    for name, wer in (("basic-v2", 1.0), ("whisper-basic-v1", 0.0)):
        flags = [] if name == "basic-v2" else ["--normalizer", name]
        metrics = score(path, tmp_path / name, *flags)
        assert metrics["normalizer"] == {name: 1} and metrics["asr"]["wer"]["value"] == wer
        assert f"normalised by {name}" in capsys.readouterr().out
        assert f">{name}</td>" in (tmp_path / name / "report.html").read_text()
        [row] = read_predictions(tmp_path / name)
        assert (row["normalizer"], row["word_edits"]) == ("basic-v2", 2)
    runs = tuple(str(tmp_path / name) for name in ("whisper-basic-v1", "basic-v2"))
    result = run_compare(CompareSettings(runs=runs, output_dir=str(tmp_path / "c"), num_resamples=100))
    assert result["normalizer"] == "whisper-basic-v1" and "normalised by whisper-basic-v1" in capsys.readouterr().out
    assert "basic-v2: its metrics.json was normalised by basic-v2, here by whisper-basic-v1; all figures" in str(result)
    [part] = (tmp_path / "basic-v2" / "predictions").glob("*.parquet")
    pq.write_table(pa.Table.from_pylist([{**row, "normalizer": "whisper-basic-v1", "word_edits": 0}]), part)
    assert [row["word_edits"] for row in read_predictions(tmp_path / "basic-v2")] == [2]


def test_scoring_flags_without_effect_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"task": "asr", "language": language} for language in ("hi", "ko", "ko", "en")] + [{"task": "tqa"}]
    lines = [{"id": str(number), "reference": "a", "prediction": "a", **row} for number, row in enumerate(rows)]
    path, table = write_rows(tmp_path / "x.jsonl", lines), tmp_path / "normalizer.json"
    table.write_text('{"colour": "color"}', encoding="utf-8")
    score(path, tmp_path / "a", "--english_spelling", str(table))
    assert "warning" not in capsys.readouterr().out
    score(path, tmp_path / "b", "--normalizer", "whisper-basic-v1")
    shown = "2 in ko (ko-v1), 1 in en (whisper-en-v1-nospelling), 1 answers (ko-v1)"
    output = capsys.readouterr().out
    assert f"warning: --normalizer whisper-basic-v1 has no effect on 4 of 5 rows: {shown}\n" in output
    path = write_rows(tmp_path / "hindi.jsonl", lines[:1])
    score(path, tmp_path / "c", "--normalizer", "whisper-basic-v1", "--english_spelling", str(table))
    output = capsys.readouterr().out
    assert "--normalizer whisper" not in output
    assert "warning: --english_spelling has no effect: no row is an English transcript" in output


def test_score_only_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", LINES[:3])
    code = (
        "import sys, runpy; sys.argv = ['evaluate', '--score_only', sys.argv[1], '--output_dir', sys.argv[2]]\n"
        f"runpy.run_path({str(ROOT / 'jobs' / 'evaluate.py')!r}, run_name='__main__')\n"
        "print('LOADED', sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, path, str(tmp_path / "o")]
    process = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=True)
    assert "LOADED []" in process.stdout


# infer


def test_pseudo_labels(tmp_path: Path, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """They are a manifest from which a training can start, and answers that are cut off are not in it."""
    rows = [{**row, "speaker": "s"} for name in ("asr.val", "sqa.val", "tqa.val") for row in read_rows(small[name])[:3]]
    for row in rows:
        if "audio_path" in row:
            row["audio_path"] = str(SPEECH / row["audio_path"])
    write_rows(tmp_path / "old.jsonl", [*rows, {"audio_path": "missing.wav", "transcript": "a"}])
    output = tmp_path / "new" / "labels.jsonl"
    flags = {"jsonl": str(tmp_path / "old.jsonl"), "max_new_tokens": 40, "pseudo_labels": str(output)}
    answers = infer_rows(**flags)
    labels = read_rows(str(output))
    shown = capsys.readouterr().out.replace("\n", "")
    assert f"{len(labels)} of {len(answers)} answers are labels in {output}" in shown and len(labels) > 5
    texts = {answer["prediction"] for answer in answers}
    for label in labels:
        [key] = {"transcript", "answer", "output"} & set(label)
        assert label[key] in texts and any({**row, key: ""} == {**label, key: ""} for row in rows)
    assert [sample.answer for chunk in chunks(str(output), 64) for sample in read_chunk(chunk).samples] == [
        next(label[key] for key in ("transcript", "answer", "output") if key in label) for label in labels
    ]
    infer_rows(audio_path=str(SPEECH / "sample.wav"), language="ko", pseudo_labels=str(output), max_new_tokens=40)
    [label] = read_rows(str(output))
    assert label["audio_path"] == str(SPEECH / "sample.wav") and label["language"] == "ko" and label["transcript"]
    infer_rows(audio_path=str(SPEECH / "sample.wav"), pseudo_labels=str(output), max_new_tokens=1)
    assert output.read_text() == ""


def test_infer_folder_and_json(tmp_path: Path, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """The files of a folder are answered in the order of their names, without bad ones; --json prints JSON Lines."""
    (tmp_path / "b").mkdir()
    shutil.copyfile(SPEECH / "sample.wav", tmp_path / "b" / "two.wav")
    shutil.copyfile(SPEECH / "sample.wav", tmp_path / "one.wav")
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    (tmp_path / "notes.txt").write_text("no audio")
    [single] = infer_rows(audio_path=str(SPEECH / "sample.wav"), language="ko")
    assert capsys.readouterr().out == single["prediction"] + "\n"
    rows = infer_rows(audio_path=str(tmp_path), language="ko", batch_size=2, output_path=str(tmp_path / "o.jsonl"))
    assert [(row["id"], row["prediction"]) for row in rows] == [
        ("b/two.wav", single["prediction"]),
        ("one.wav", single["prediction"]),
    ]
    output = capsys.readouterr()
    assert output.out.splitlines() == [f"{row['id']}\t{row['prediction']}" for row in rows]
    assert f"{tmp_path / 'broken.wav'}: left out: " in output.err
    assert [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()] == rows
    infer_rows(audio_path=str(tmp_path), language="ko", json_lines=True)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    rows = infer_rows(jsonl=small["asr.val"], json_lines=True)
    output = capsys.readouterr()
    assert [json.loads(line) for line in output.out.splitlines()] == rows
    assert [row["reference"] for row in rows] == [row["transcript"] for row in read_rows(small["asr.val"])]
    assert all(row["char_ref"] for row in rows) and "cer" in output.err
    assert parse_only("infer", ["--audio_path", "x.wav", "--json"]).json_lines
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"--audio_path .*empty: no audio file in this folder"):
        infer_rows(audio_path=str(tmp_path / "empty"))


def test_infer_continues_after_failed_rows(
    small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row without an answer has a message; the others are answered, written and scored."""
    out = tmp_path / "made" / "o.jsonl"
    all_rows = infer_rows(jsonl=small["asr.val"], json_lines=True, output_path=str(out))
    assert [json.loads(line) for line in out.read_text().splitlines()] == all_rows
    failing = {"asr.val.jsonl:2"}
    fail_at(monkeypatch, lambda row: row.id in failing)
    capsys.readouterr()
    argv = ["--model_id", TINY, "--max_new_tokens", "8", "--json", "--tf32", "--output_path", str(out)]
    with pytest.raises(SystemExit) as end:
        load_job("infer").main([*argv, "--jsonl", small["asr.val"]])
    output = capsys.readouterr()
    rows = [json.loads(text) for text in output.out.splitlines()]
    assert rows == [row for row in all_rows if row["id"] not in failing]
    assert rows == [json.loads(text) for text in out.read_text().splitlines()]
    assert end.value.code == 1 and "cer" in output.err and "--tf32 has no effect" in output.err
    assert f"{small['asr.val']}:2: not answered: RuntimeError: no such expert" in output.err.splitlines()
    assert "1 of 4 rows could not be answered" in output.err.splitlines()[-1]
    failing |= {row["id"] for row in all_rows}
    with pytest.raises(RunError, match=r"asr\.val\.jsonl: nothing could be answered"):
        infer_rows(jsonl=small["asr.val"])
    with pytest.raises(RunError, match=r"--output_dir .*: no adapter here"):
        infer_rows(jsonl=small["asr.val"], output_dir=str(tmp_path))
    with pytest.raises(SettingsError, match=r"--output_path .*made: a folder; name a file"):
        infer_rows(jsonl=small["asr.val"], output_path=str(out.parent))


def test_infer_answers_a_text_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = {"instruction": "마지막 숫자는 무엇입니까? 칠 삼 오", "output": "오"}
    [row] = infer_rows(jsonl=write_rows(tmp_path / "q.jsonl", [question]), language="ko", max_new_tokens=1)
    output = capsys.readouterr()
    assert row["language"] == "ko"
    assert "1 answer(s) cut off at --max_new_tokens 1" in output.err
    assert infer_rows(question=question["instruction"], max_new_tokens=1) == [
        {"id": "--question", "task": "tqa", "prediction": row["prediction"]}
    ]
    assert capsys.readouterr().out == row["prediction"] + "\n"
    with pytest.raises(SystemExit):
        parse_only("infer", ["--question", "x", "--jsonl", "x.jsonl"])
    assert "--question and --jsonl: give one of them" in capsys.readouterr().err


# audio that is too long for the model


@pytest.fixture
def long_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clip of 14.5 s, and a model that takes at most 8 s."""
    monkeypatch.setattr(VoxtralFrontEnd, "max_audio_sec", 8.0)
    clips = [soundfile.read(row["audio_path"], dtype="float32") for row in read_rows(manifest("asr.train"))[:8]]
    samples = np.concatenate([samples for samples, rate in clips if rate == 16_000])
    soundfile.write(tmp_path / "long.wav", np.resize(samples, int(14.5 * 16_000)), 16_000)
    return tmp_path / "long.wav"


def test_long_recordings_are_answered_in_chunks(
    evaluate: Evaluate,
    long_clip: Path,
    small: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recording is one row with its reference and not in the ledger; rows of other tasks are refused."""
    rows = [
        {"audio_path": str(long_clip), "transcript": "긴 말", "language": "ko", "id": "long", "speaker": "s"},
        {"audio_path": str(long_clip), "question": "무엇?", "answer": "답", "id": "asked"},
        *read_rows(small["asr.val"])[:2],
    ]
    path = write_rows(tmp_path / "m.jsonl", rows)
    metrics, predictions = evaluate(val_jsonl=(path,), output_dir="e")
    assert metrics["long_audio"] == {"n": 1, "chunks": 3}
    assert metrics["asr"]["cer"]["n"] == 3
    [row] = [row for row in predictions if row["id"] == "long"]
    assert (row["reference"], row["speaker"], row["dataset"], row["source"]) == ("긴 말", "s", "m", f"{path}:1")
    assert row["num_samples"] == pytest.approx(14.5 * 16_000, abs=16)

    def ledger(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / name / "quarantine.jsonl").read_text().splitlines()]

    assert [(line["id"], line["reason"]) for line in ledger("e")] == [("asked", "audio_too_long")]
    assert "1 recording(s) too long for the model answered in 3 chunks" in capsys.readouterr().out
    [inferred] = infer_rows(audio_path=str(long_clip), language="ko")
    assert inferred["prediction"] == row["prediction"]
    assert infer_rows(jsonl=write_rows(tmp_path / "n.jsonl", rows[:1]))[0]["num_samples"] == row["num_samples"]
    assert "too long for the model, answered in 3 chunks" in capsys.readouterr().err
    fail_at(monkeypatch, lambda row: row.source.endswith(("long_audio.jsonl:2", "long_audio.jsonl:3")))
    metrics, predictions = evaluate(val_jsonl=(path,), output_dir="f")
    assert "long_audio" not in metrics and "long" not in {row["id"] for row in predictions}
    _, line = ledger("f")
    reason = {"reason": "not_answered", "message": "chunk 2 of 3: RuntimeError: no such expert"}
    assert line == {"manifest": path, "line": 1, "id": "long", **reason}, "the recording, not a chunk"
    assert "2 row(s) left out in all, listed in quarantine.jsonl; --retry_failed" in capsys.readouterr().out


def test_infer_prints_each_answer_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 clips in batches of 2, the first is printed after the first batch, and all in the order of the manifest."""
    num_rows, printed = [], list[tuple[int, str]]()
    collate = continuous_batching.collate_prompts

    def count(rows: Any, front_end: Any) -> Any:
        num_rows.append(len(rows))
        return collate(rows, front_end)

    monkeypatch.setattr(continuous_batching, "collate_prompts", count)
    monkeypatch.setattr(infer, "_print_answer", lambda entry, settings: printed.append((sum(num_rows), entry["id"])))
    entries = infer_rows(model_id=WHISPER, jsonl=manifest("asr.val"), preview_rows=8, batch_size=2)
    assert [entry["id"] for entry in entries] == [row_id for _, row_id in printed] and len(entries) == 8
    assert printed[0][0] <= 3 and printed[-1][0] == 8
