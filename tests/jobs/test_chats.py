"""Chats through the jobs: train, evaluate, compare, infer, audit and prepare, in this process."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, WHISPER, read_rows, write_rows
from helpers.corpora import prepare
from helpers.running import parse_only

from voxray.commands import audit, compare, evaluate, featurize, infer, preflight, train
from voxray.core.errors import RunError
from voxray.core.manifest import chunks, read_chunk
from voxray.evaluation.predictions import read_predictions

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL_RUN = f"--model_id {TINY} --num_workers 0 --rows_per_shard 8 --per_device_bsz 3 --lr 1e-2 --max_steps 3"
SMALL_RUN += " --eval_steps 2 --eval_max_new_tokens 4 --save_steps 1 --lora_r 2 --features_dir features"


def rows_of(clips: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Chats in several formats, each about a clip, and two without audio."""
    first, reply = "무엇이 들립니까?", {"role": "user", "content": "몇 개?"}
    answers = [{"role": "assistant", "content": clip["transcript"]} for clip in clips]
    last = [{"role": "assistant", "content": f"{number} 개"} for number in range(len(clips))]
    part = {"type": "audio_url", "audio_url": {"url": clips[1]["audio_path"]}}
    sharegpt = [("human", f"<audio>{first}"), ("gpt", clips[2]["transcript"]), ("human", "몇 개?"), ("gpt", "2 개")]
    user = {"role": "user", "content": first}
    return [
        {"audio_path": clips[0]["audio_path"], "messages": [user, answers[0], reply, last[0]]},
        {"messages": [{**user, "content": [part, {"type": "text", "text": first}]}, answers[1], reply, last[1]]},
        {
            "conversations": [{"from": name, "value": text} for name, text in sharegpt],
            "audios": [clips[2]["audio_path"]],
            "start": 0.2,
            "duration": 1.0,
        },
        {"messages": [{**user, "content": f"{first}<audio>"}, answers[3]], "audios": [clips[3]["audio_path"]]},
        {"system": "짧게.", "messages": [user, answers[4], reply, last[4]]},
        {"messages": [user, answers[5]], "language": "ko"},
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: dict[str, str], evaluation_here: None) -> Path:
    write_rows(tmp_path / "rows.jsonl", rows_of(read_rows(small["asr.train"])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(featurize, "ray_session", lambda *args: nullcontext())
    monkeypatch.setattr(featurize, "make_features", partial(featurize.make_features, use_ray=False))
    return tmp_path


def run_train(job: str, output_dir: str, flags: str = "") -> dict[str, Any]:
    line = f"{SMALL_RUN} --train_jsonl rows.jsonl --val_jsonl rows.jsonl --output_dir {output_dir} {flags}"
    return train.run_training(parse_only(job, line.split()))


def test_chats_train_validate_and_are_evaluated(here: Path) -> None:
    result = run_train(
        "train_multitask", "run", "--batching packed --pack_tokens 300 --task_weights chat=2,text_chat=1"
    )
    assert result["finished"]
    assert {"chat/rouge_l", "chat/exact_match", "chat/loss", "chat/bleu", "text_chat/perplexity"} < set(result)
    previews = [json.loads(line) for line in (here / "run" / "previews.jsonl").read_text().splitlines()]
    assert any("assistant: " in line["prompt"] for line in previews if line.get("task") == "chat")

    usual = "--val_jsonl rows.jsonl --gen_max_new_tokens 4 --features_dir features --perplexity all"
    for name, more in (("base", f"--model_id {TINY}"), ("tuned", "--lora_dir run/adapter")):
        evaluate.run_evaluation(parse_only("evaluate", f"{usual} --output_dir {name} {more}".split()))
        metrics = json.loads((here / name / "metrics.json").read_text(encoding="utf-8"))
        assert (metrics["chat"]["rouge_l"]["n"], metrics["text_chat"]["rouge_l"]["n"]) == (4, 2)
        assert metrics["chat"]["perplexity"]["value"] > 1
    predictions = {row["source"].rpartition(":")[2]: row for row in read_predictions(here / "base")}
    assert predictions["3"]["reference"] == "2 개" and predictions["3"]["num_samples"] == 16_000
    assert all(Path(predictions[line]["audio_path"]).is_file() for line in "1234")
    comparison = compare.run_compare(parse_only("compare", ["base", "tuned", "--num_resamples", "100"]))
    assert set(comparison["tasks"]) == {"chat", "text_chat"}


def test_text_chats_are_rows_of_the_text_stage(here: Path) -> None:
    result = run_train("train_text", "run")
    assert result["finished"] and "text_chat/rouge_l" in result and "chat/rouge_l" not in result
    ledger = [json.loads(line) for line in (here / "run" / "quarantine.jsonl").read_text().splitlines()]
    lines = [(line["line"], line["reason"]) for line in ledger]
    assert lines == [(line, "other_task") for line in (1, 2, 3, 4)] * 2  # of training and of validation
    assert ledger[0]["message"] == "chat: this job trains on tqa, text_chat rows"


def test_whisper_says_that_it_answers_no_chats(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"--model_id {WHISPER} --train_jsonl rows.jsonl --output_dir run --num_workers 0 --features_dir features"
    with pytest.raises(RunError, match="Whisper only transcribes and translates; this row's task is chat"):
        train.run_training(parse_only("train_whisper", flags.split()))
    with pytest.raises(RunError):
        preflight.run_preflight(parse_only("preflight", f"{flags} --recipe whisper".split()))
    shown = " ".join(capsys.readouterr().out.split())
    assert "unsupported_task: Whisper only transcribes and translates; this row's task is chat; 6 such row(s)" in shown


def test_answers_become_labels_of_chats(here: Path, small: dict[str, str]) -> None:
    rows = [*rows_of(read_rows(small["asr.train"])), {"messages": [{"role": "user", "content": "네?"}]}]
    rows[-1]["unlabelled"] = True
    write_rows(here / "rows.jsonl", rows)
    flags = f"--model_id {TINY} --jsonl rows.jsonl --max_new_tokens 40 --pseudo_labels new.jsonl"
    answers = infer.run_inference(parse_only("infer", flags.split()), "rows.jsonl")
    assert len(answers) == 7
    texts = {str(answer["source"]).rpartition(":")[2]: answer["prediction"] for answer in answers}
    [original], [labelled] = (
        [read_chunk(chunk) for chunk in chunks(str(here / name), 64)] for name in ("rows.jsonl", "new.jsonl")
    )
    assert not labelled.bad and len(labelled.samples) >= 3
    by_turns = {(sample.turns, sample.audio_path): sample for sample in original.samples}
    for sample in labelled.samples:
        source = by_turns[sample.turns, sample.audio_path]
        assert sample.answer == texts[source.source.rpartition(":")[2]].strip()
        assert (sample.start_sec, sample.duration_sec) == (source.start_sec, source.duration_sec)


def test_audit_finds_faults_and_writes_chats_that_need_no_change(here: Path, small: dict[str, str]) -> None:
    rows = rows_of(read_rows(small["asr.train"]))
    rows += [dict(rows[0]), {**rows[0], "messages": rows[0]["messages"][:2]}]
    write_rows(here / "rows.jsonl", [*rows, {"messages": [{"role": "user", "content": "<audio>"}] * 2}])
    flags = f"--input rows.jsonl --model_id {TINY} --fix sub/clean.jsonl --output_dir audit --max_len 1280"
    audit.run_audit_job(parse_only("audit", flags.split()), use_ray=False)
    faults = [json.loads(line) for line in (here / "audit" / "faults.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in faults] == [(7, "duplicate"), (9, "unsupported_chat")]
    clean = (here / "sub" / "clean.jsonl").read_text().splitlines()
    assert clean == [json.dumps(row, ensure_ascii=False) for row in (*rows[:6], rows[7])]


def test_audit_moves_the_clips_of_chats(here: Path, small: dict[str, str]) -> None:
    """A relative path would name another file in the new folder."""
    rows = rows_of(read_rows(small["asr.train"]))
    for number, row in enumerate(rows[:4]):
        name = f"{number}.wav"
        text = json.dumps(row)
        old = next(clip["audio_path"] for clip in read_rows(small["asr.train"]) if clip["audio_path"] in text)
        (here / name).write_bytes(Path(old).read_bytes())
        rows[number] = json.loads(text.replace(old, name))
    write_rows(here / "rows.jsonl", rows)
    audit.run_audit_job(parse_only("audit", ["--input", "rows.jsonl", "--fix", "sub/clean.jsonl"]), use_ray=False)
    [before], [after] = (
        [read_chunk(chunk) for chunk in chunks(str(here / name), 64)] for name in ("rows.jsonl", "sub/clean.jsonl")
    )
    assert not after.bad and len(after.samples) == 6
    for old, new in zip(before.samples, after.samples, strict=True):
        assert (old.turns, old.answer, old.audio_path) == (new.turns, new.answer, new.audio_path)


def test_prepare_keeps_the_turns_of_chats(here: Path, small: dict[str, str]) -> None:
    """A chat of one question becomes a row of another task."""
    rows = rows_of(read_rows(small["asr.train"]))
    train_rows, val_rows, ledger, _ = prepare(
        here, write_rows(here / "raw.jsonl", [*rows, rows[0]]), min_sec=0.3, val_share=0.1
    )
    prepared = [*train_rows, *val_rows]
    by_keys = [tuple(sorted({"messages", "question", "instruction"} & set(row))) for row in prepared]
    assert sorted(by_keys) == [("instruction",), *[("messages",)] * 4, ("question",)]
    assert [line["reason"] for line in ledger] == ["duplicate"]
    [part] = [row for row in prepared if "start" in row]
    assert part["start"] == 0.2 and part["duration"] == pytest.approx(1.0, abs=0.01)
    write_rows(here / "out.jsonl", prepared)
    [parsed] = [read_chunk(chunk) for chunk in chunks(str(here / "out.jsonl"), 64)]
    [original] = [read_chunk(chunk) for chunk in chunks(str(here / "raw.jsonl"), 64)]
    assert not parsed.bad
    several = {(sample.turns, sample.answer) for sample in original.samples[:6] if len(sample.turns) > 1}
    assert {(sample.turns, sample.answer) for sample in parsed.samples if sample.turns} == several


def test_rows_without_an_answer_do_not_train(here: Path, small: dict[str, str]) -> None:
    """They would teach the model to say nothing. They are listed, and not validated either."""
    rows = read_rows("rows.jsonl")
    rows[0] = {**rows[0], "messages": rows[0]["messages"][:3], "unlabelled": True}
    question = {"audio_path": rows[0]["audio_path"], "question": "q", "answer": "", "unlabelled": True}
    write_rows(here / "rows.jsonl", [*rows, question])
    result = run_train("train_multitask", "run")
    assert result["finished"] and not any(name.startswith("sqa/") for name in result)
    ledger = [json.loads(line) for line in (here / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in ledger] == [(1, "unlabelled"), (7, "unlabelled")] * 2
