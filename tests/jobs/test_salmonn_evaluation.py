"""Evaluating SALMONN from its evaluator's own files: a base of official parts, sets without texts, the CSV files."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ASSETS, SPEECH, manifest, read_rows, write_rows
from helpers.running import load_job, parse_only

from voxray.commands import evaluate as job
from voxray.commands.compare import run_compare
from voxray.commands.infer import run_inference
from voxray.config.compile import CompileSettings
from voxray.config.efficiency import EfficiencySettings
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.core.errors import RunError, SettingsError
from voxray.evaluation.predictions import read_predictions
from voxray.generation.salmonn_base import assemble_base
from voxray.models.registry import get_family
from voxray.models.salmonn.folder import write_folder

pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCE = ASSETS / "salmonn-reference"
PARTS = {
    "whisper_path": str(REFERENCE / "whisper"),
    "beats_path": str(REFERENCE / "beats.pt"),
    "llama_path": str(REFERENCE / "llama_fast"),
}
CHECKPOINT = str(REFERENCE / "salmonn_v1.pth")


def entries() -> list[dict[str, Any]]:
    """Six clips of a test set, in no order; two cannot be read, one id stands twice, one row asks for a caption."""
    clips = [Path(row["audio_path"]).name for row in read_rows(manifest("asr.val"))[:3]]
    return [
        {"testset_id": "test0003", "path": clips[0], "task": "asr"},
        {"testset_id": "test0001", "path": clips[1], "task": "asr"},
        {"testset_id": "test0000", "path": "gone.wav", "task": "asr"},
        {"testset_id": "test0004", "path": "broken.wav", "task": "asr"},
        {"testset_id": "test0003", "path": clips[2], "task": "asr"},
        {"testset_id": "test0002", "path": clips[2], "task": "audiocaption_v2"},
    ]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with salmonn_eval_config.yaml, test.json and test_prompt.json."""
    (tmp_path / "sounds").mkdir()
    for row in read_rows(manifest("asr.val"))[:3]:
        shutil.copy(row["audio_path"], tmp_path / "sounds")
    (tmp_path / "sounds" / "broken.wav").write_bytes(b"RIFF, and no more")
    (tmp_path / "test.json").write_text(json.dumps({"annotation": entries()}))
    (tmp_path / "test_prompt.json").write_text(json.dumps({"asr": "<Speech><SpeechHere></Speech> Write it down."}))
    old = {
        "model": {**PARTS, "ckpt": CHECKPOINT, "test_prompt_path": "test_prompt.json", "end_sym": "</s>", "lora": True},
        "generate": {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "end_sym": "</s>"},
        "datasets": {"prefix": "sounds", "test_ann_path": "test.json"},
        "run": {"batch_size_eval": 3, "num_workers": 8, "device": "cuda"},
    }
    (tmp_path / "salmonn_eval_config.yaml").write_text(yaml.safe_dump(old))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_a_submission_from_the_evaluators_file(
    files: Path, evaluation_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As accelerate_eval.sh has it; no file that cannot be read is answered by another one's sound."""
    command = ["--mode", "submission_asr", "--cfg-path", "salmonn_eval_config.yaml", "--output_dir", "out"]
    load_job("evaluate").main(command)
    said = capsys.readouterr().out
    answers = read_predictions(files / "out")
    assert [row["id"] for row in answers] == ["test0003", "test0001", "test0003"]
    assert {row["reference"] for row in answers} == {None} == {row["solid_ref"] for row in answers}
    lines = rows_of(files / "out" / "submission.csv")
    assert lines[0] == ["testset_id", "text"]
    texts = {name: text for name, text in lines[1:]}
    assert [line[0] for line in lines[1:]] == ["test0000", "test0001", "test0003", "test0004"]
    assert (
        texts["test0003"] == answers[0]["prediction"].lower() and texts["test0001"] == answers[1]["prediction"].lower()
    )
    assert answers[0]["prediction"] != answers[2]["prediction"] and texts["test0000"] == texts["test0004"] == " "
    ledger = [json.loads(line) for line in (files / "out/quarantine.jsonl").read_text().splitlines()]
    assert {(line["id"], line["reason"]) for line in ledger} >= {("test0000", "audio_missing")}
    assert {line["reason"] for line in ledger} == {"audio_missing", "audio_unreadable"}
    assert json.loads((files / "out/metrics.json").read_text()) == {"unlabelled": {"n": 3}}
    assert not (files / "out/report.html").exists()
    assert "2 row(s) left out in all" in said and "1 row(s) repeat the id of another one" in said
    assert "2 row(s) without an answer have a blank text in submission.csv" in said
    assert "3 row(s) are answered, and not scored" in said
    whole = files / "whole"
    write_folder(whole, whisper=PARTS["whisper_path"], beats=PARTS["beats_path"], llm=PARTS["llama_path"],
                 checkpoint=CHECKPOINT, prompts=files / "test_prompt.json")  # fmt: skip
    flags = {"model_id": str(whole), "audio_path": str(files / "sounds" / entries()[0]["path"]), "max_new_tokens": "5"}
    [again] = run_inference(InferSettings.model_validate({**flags, "num_beams": "2"}), "")
    assert again["prediction"] == answers[0]["prediction"], "the same parts, checkpoint and prompts"
    with pytest.raises(RunError, match="answered no row that has a text to compare with"):
        run_compare(parse_only("compare", ["out", "--output_dir", "c"]))


def test_captions_and_a_second_start(files: Path, evaluation_here: None) -> None:
    command = ["--mode", "submission_aac", "--cfg-path", "salmonn_eval_config.yaml", "--output_dir", "out"]
    load_job("evaluate").main(command)
    [part] = (files / "out" / "predictions").glob("part-*.parquet")
    before = part.stat().st_mtime_ns
    load_job("evaluate").main(command)
    assert part.stat().st_mtime_ns == before, "what is answered is not answered again"
    [row] = read_predictions(files / "out")
    assert row["prompt"] == "Please write down what your hear in the audio." and row["nll"] is None
    assert [line[0] for line in rows_of(files / "out" / "submission.csv")] == ["testset_id", "test0002"]


def test_validation_needs_texts(files: Path, evaluation_here: None) -> None:
    settings = EvaluateSettings.model_validate(
        {**PARTS, "lora_dir": CHECKPOINT, "val_jsonl": "test.json", "audio_prefix": "sounds", "mode": "valid_asr"}
        | {"output_dir": str(files / "out"), "gen_max_new_tokens": 3, "num_beams": 1}
    )
    with pytest.raises(RunError, match=r"test\.json:1: test0003: no text \(evaluate --mode submission_asr and so on"):
        job.run_evaluation(settings)
    known = [{**entry, "text": "접수 번호"} for entry in entries()[:2]]
    (files / "valid.json").write_text(json.dumps({"annotation": [*known, entries()[2]]}))
    result = job.run_evaluation(settings.model_copy(update={"val_jsonl": ("valid.json",)}))
    assert result.metrics["asr"]["exact_match"]["n"] == 2 and (files / "out/report.html").is_file()
    lines = rows_of(files / "out/valid.csv")
    assert [line[0] for line in lines] == ["testset_id", "test0000", "test0001", "test0003"] and lines[1][1] == " "
    labelled = [{**entries()[0], "text": "접수"}, {**entries()[1], "text": " "}]
    (files / "some.json").write_text(json.dumps({"annotation": labelled}))
    changes = {"val_jsonl": ("some.json",), "mode": "submission_asr", "output_dir": str(files / "some")}
    result = job.run_evaluation(settings.model_copy(update=changes))
    assert result.metrics["asr"]["exact_match"]["n"] == 1, "an empty text of a submission is none"
    assert json.loads((files / "some/metrics.json").read_text())["unlabelled"] == {"n": 1}
    assert (files / "some/report.html").is_file()


def test_modes_search_as_the_evaluator() -> None:
    for mode in ("submission_asr", "submission_aac", "valid_asr", "valid_aac"):
        settings = parse_only("evaluate", ["--mode", mode, "--val_jsonl", "x"])
        assert (settings.num_beams, settings.gen_max_new_tokens) == (4, 200)
    assert parse_only("evaluate", ["--mode", "valid_asr", "--val_jsonl", "x", "--num_beams", "2"]).num_beams == 2


def test_a_base_is_named_after_what_it_is_made_of(files: Path) -> None:
    def base(**flags: str) -> str:
        settings = EvaluateSettings.model_validate({**PARTS, "val_jsonl": "x", **flags})
        return assemble_base(settings, files / "out").model_id

    prompts = files / "test_prompt.json"
    one = base(prompts=str(prompts))
    assert base(prompts=str(prompts)) == one
    prompts.write_text(json.dumps({"asr": "<SpeechHere> Again."}))
    assert len({one, base(prompts=str(prompts)), base(), base(lora_dir=CHECKPOINT), base(end_sym="<s>")}) == 5
    assert get_family(one).front_end(one).eos_id == get_family(base()).front_end(base()).eos_id
    with pytest.raises(SettingsError, match=r"--end_sym '<\|end_of_text\|>': is \d+ tokens"):
        base(end_sym="<|end_of_text|>")
    for kind in (EfficiencySettings, CompileSettings):
        settings = assemble_base(kind.model_validate({**PARTS, "lora_dir": CHECKPOINT}), files / "other")
        parts = json.loads((Path(settings.model_id) / "config.json").read_text())["parts"]
        assert (settings.lora_dir, parts["checkpoint"]) == ("", CHECKPOINT)


def test_training_refuses_an_end_of_several_tokens(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As </s> is in a Llama 3, which the second stage's published file names; nothing of an earlier run is touched."""
    flags = [word for name, value in PARTS.items() for word in (f"--{name}", value)]
    (files / "rows.json").write_text(json.dumps({"annotation": [{**entries()[0], "text": "a"}]}))
    flags += ["--train_jsonl", "rows.json", "--prefix", "sounds", "--output_dir", "run"]
    with pytest.raises(SystemExit) as end:
        load_job("train_salmonn").main([*flags, "--end_sym", "<|end_of_text|>"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "error: --end_sym '<|end_of_text|>': is " in said
    assert "its own end of text is '</s>'" in said and not list((files / "run").glob("model-*"))


def test_files_of_one_name_are_two_manifests(tmp_path: Path) -> None:
    from voxray.models.salmonn.compat.annotations import as_manifests

    for number, folder in enumerate(("train", "valid")):
        (tmp_path / folder).mkdir()
        row = {"path": str(SPEECH / "sample.wav"), "text": f"{number}", "task": "asr"}
        (tmp_path / folder / "a.json").write_text(json.dumps({"annotation": [row]}))
    paths = [str(tmp_path / folder / "a.json") for folder in ("train", "valid", "train")]
    other = write_rows(tmp_path / "x.jsonl", [])
    first, second, third, fourth = as_manifests([*paths, other], tmp_path / "m")
    assert first == third != second and fourth == other
    assert [read_rows(path)[0]["transcript"] for path in (first, second)] == ["0", "1"]
