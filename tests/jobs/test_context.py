"""Contexts of transcriptions, from the manifest to training, evaluation and infer."""

import json
import shutil
import unicodedata
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import TINY, WHISPER, read_rows, write_rows
from helpers.audio_seq2seq_tiny import write_tiny_seq2seq
from helpers.running import parse_only
from safetensors.torch import load_file

from voxray.batches.context_sampler import ContextSampler
from voxray.commands import evaluate, featurize, infer, train
from voxray.core.context import parse_context_shares, split_terms
from voxray.core.errors import BadRow, SettingsError
from voxray.core.manifest import Sample, parse_row
from voxray.core.tasks import TASKS
from voxray.evaluation.predictions import read_predictions
from voxray.features.context import with_context
from voxray.features.reader import Features
from voxray.generation.long_audio import write_chunk_manifest
from voxray.models.registry import get_family
from voxray.models.salmonn.front_end import SalmonnFrontEnd

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXTS: tuple[Any, ...] = (["아스피린", "와파린"], "혈압, 두통", ["Tylenol"], ["열"], "", ["고혈압", "당뇨", "두통"])
SMALL_RUN = "--num_workers 0 --rows_per_shard 4 --per_device_bsz 3 --lr 1e-2 --lora_r 2 --save_steps 1"
SMALL_RUN += " --train_jsonl rows.jsonl --features_dir features"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: dict[str, str]) -> Path:
    """A folder with six transcriptions, five of which have a context, and a list of terms."""
    rows = zip(read_rows(small["asr.train"])[:6], CONTEXTS, strict=True)
    write_rows(tmp_path / "rows.jsonl", [{**row, "context": context} for row, context in rows])
    (tmp_path / "terms.txt").write_text("# drugs\n와파린\n타이레놀\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(featurize, "ray_session", lambda *args: nullcontext())
    return tmp_path


def run_train(output_dir: str, flags: str = "", job: str = "train_asr_adapter", steps: int = 4) -> Path:
    line = f"{SMALL_RUN} --model_id {WHISPER if job == 'train_whisper' else TINY} --max_steps {steps} {flags}"
    train.run_training(parse_only(job, [*line.split(), "--output_dir", output_dir]))
    return Path(output_dir)


def tensors(run: Path) -> Any:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def are_equal(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(
    ("context", "text"),
    [(["a", " b\n c "], "a, b c"), ("one\nsentence.", "one sentence."), ([], ""), (None, ""), (["", "a"], "a")],
)
def test_contexts_of_rows(here: Path, context: Any, text: str) -> None:
    row = {**read_rows("rows.jsonl")[0], "context": context}
    assert parse_row(json.dumps(row).encode(), str(here / "rows.jsonl"), 1).prompt == text


@pytest.mark.parametrize("context", [5, {"a": 1}, ["a", 5], True])
def test_other_values_are_refused(here: Path, context: Any) -> None:
    row = {**read_rows("rows.jsonl")[0], "context": context}
    with pytest.raises(BadRow, match="context is neither a text nor a list of texts"):
        parse_row(json.dumps(row).encode(), str(here / "rows.jsonl"), 1)


def test_terms_are_the_parts_between_commas() -> None:
    assert split_terms(" a b,c，d、 c ,") == ("a b", "c", "d") and split_terms("") == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("true=1,maybe=2", "unknown name 'maybe'; known: true, false, none"),
        ("true=1,true=2", "a name is given twice"),
        ("true=x", "'x' is not a number"),
        ("none=-1", "the share of none must be 0 or more, not -1"),
        ("true=0", "at least one share must be above 0"),
    ],
)
def test_bad_shares(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_context_shares(value)


def test_voxtral_and_salmonn_prompts(salmonn: str) -> None:
    sample = Sample("a", TASKS["asr"], "아스피린, [INST]", "t", "a.wav", "ko", "m:1")
    front_end = get_family(TINY).front_end(TINY)
    ids, plain = (front_end.prompt_ids(replace(sample, prompt=text), 16_000) for text in (sample.prompt, ""))
    assert front_end.show(ids).endswith("[AUDIO]x50아스피린, [INST][/INST]lang:ko[TRANSCRIBE]") or "아스피린" in (
        front_end.show(ids)
    )
    assert ids.count(front_end.begin_inst_id) == 1 and [token for token in ids if token in plain][-4:] == plain[-4:]
    salmonn_end = SalmonnFrontEnd(salmonn)
    shown = salmonn_end.show(salmonn_end.prompt_ids(replace(sample, prompt="아스피린"), 16_000))
    assert "transcription.\nContext: 아스피린\nASSISTANT:" in shown
    for text in ("", "아스피린"):
        assert "Context" not in salmonn_end.show(
            salmonn_end.prompt_ids(replace(sample, task=TASKS["sqa"], prompt=text), 16_000)
        )


def sampler(
    folders: Any, model_id: str = TINY, shares: str = "true=2,false=1,none=1"
) -> tuple[ContextSampler, Features]:
    features, front_end = Features(folders), get_family(model_id).front_end(model_id)
    rows = np.arange(len(features))
    return ContextSampler(features, rows, front_end, parse_context_shares(shares), 7), features


@pytest.mark.parametrize("model_id", [TINY, WHISPER])
def test_draws(here: Path, make_features: Any, model_id: str) -> None:
    """By step and row; with the shares asked for; never longer; false terms are not in the transcript."""
    folders = make_features(str(here / "rows.jsonl"), model_id=model_id, folder=here / "f")
    draw, features = sampler(folders, model_id)
    again, _ = sampler(folders, model_id)
    counts = {"own": 0, "none": 0, "other": 0}
    for step in range(120):
        for number in range(len(features)):
            row = features.row(number)
            drawn = draw(row, step)
            assert drawn.prompt == again(row, step).prompt and len(drawn.prompt_ids) <= len(row.prompt_ids)
            if not row.prompt:
                assert drawn is row, "rows without a context stay as they are"
                continue
            kind = "own" if drawn.prompt == row.prompt else "other" if drawn.prompt else "none"
            counts[kind] += number in (0, 1, 5)  # other contexts are as short as theirs
            assert kind != "other" or not any(term in row.answer for term in split_terms(drawn.prompt))
            front_end = get_family(model_id).front_end(model_id)
            assert drawn.prompt_ids.tolist() == with_context(row, drawn.prompt, front_end).prompt_ids.tolist()
    total = sum(counts.values())
    assert all(abs(counts[name] / total - share) < 0.08 for name, share in {"own": 0.5, "none": 0.25}.items()), counts
    assert len({draw(features.row(0), step).prompt for step in range(40)}) > 3


def test_training_draws_contexts_and_resumes_exactly(here: Path) -> None:
    """A run of parts equals a whole one, packed or not; and shares decide what is learned."""
    run_train("whole")
    run_train("parts", steps=1)
    run_train("parts")
    assert are_equal(tensors(here / "whole"), tensors(here / "parts"))
    own = tensors(run_train("own", "--context_shares true=1"))
    none = tensors(run_train("none", "--context_shares none=1"))
    rows = [{name: value for name, value in row.items() if name != "context"} for row in read_rows("rows.jsonl")]
    write_rows(here / "rows.jsonl", rows)
    without = tensors(run_train("without"))
    assert are_equal(none, without) and not are_equal(own, none)
    assert not are_equal(tensors(here / "whole"), own) and not are_equal(tensors(here / "whole"), none)


@pytest.mark.parametrize("job", ["train_asr_adapter", "train_whisper"])
def test_evaluation_uses_the_asked_context(here: Path, job: str, evaluation_here: None) -> None:
    run = run_train("run", job=job, steps=1)
    shutil.rmtree(here / "features")
    usual = f"--lora_dir {run} --val_jsonl rows.jsonl --gen_max_new_tokens 4 --features_dir features"
    prompts = {}
    for name, flags in (("own", ""), ("file", "--context terms.txt"), ("none", "--no_context --terms terms.txt")):
        evaluate.run_evaluation(parse_only("evaluate", f"{usual} --output_dir {name} {flags}".split()))
        rows = sorted(read_predictions(here / name), key=lambda row: int(row["source"].rpartition(":")[2]))
        prompts[name] = [row["prompt"] for row in rows]
        metrics = json.loads((here / name / "metrics.json").read_text())
        assert ("context_leak" in metrics["asr"]) == (name != "none")
    assert prompts["own"] == ["아스피린, 와파린", "혈압, 두통", "Tylenol", "열", "", "고혈압, 당뇨, 두통"]
    assert set(prompts["file"]) == {"와파린, 타이레놀"} and set(prompts["none"]) == {""}
    lengths = next(Features([folder]).num_prompt_tokens for folder in (here / "features").iterdir())
    longest = int(lengths.min()) + 3  # the list of terms is longer than that
    with pytest.raises(Exception, match=f"no row to evaluate within --max_len {longest}"):
        evaluate.run_evaluation(
            parse_only("evaluate", f"{usual} --output_dir x --context terms.txt --max_len {longest}".split())
        )


def test_infer_uses_the_asked_context(here: Path) -> None:
    base = ["--model_id", WHISPER, "--jsonl", "rows.jsonl", "--max_new_tokens", "4"]
    for flags, first in (
        ([], "아스피린, 와파린"),
        (["--context", "terms.txt"], "와파린, 타이레놀"),
        (["--no_context"], None),
    ):
        entries = infer.run_inference(parse_only("infer", [*base, *flags]), "")
        assert entries[0].get("context") == first
    clip = read_rows("rows.jsonl")[0]["audio_path"]
    calls: list[str] = []
    answer = partial(infer.answer_requests)

    def record(requests: Any, *args: Any) -> Any:
        calls.extend(row.prompt for request in requests for row in request.rows)
        return answer(requests, *args)

    infer.answer_requests = record  # type: ignore[assignment]
    try:
        line = ["--model_id", WHISPER, "--audio_path", clip, "--max_new_tokens", "2"]
        for flags in (["--context", "terms.txt"], ["--initial_prompt", "어제는\n괜찮았습니다."]):
            infer.run_inference(parse_only("infer", [*line, *flags]), "")
    finally:
        infer.answer_requests = answer  # type: ignore[assignment]
    assert calls == ["와파린, 타이레놀", "어제는 괜찮았습니다."]


def test_refusals(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_only("evaluate", ["--val_jsonl", "rows.jsonl", "--context", "terms.txt", "--no_context"])
    assert "--context and --no_context: give one of them" in capsys.readouterr().err
    base = write_tiny_seq2seq(tmp_path / "moonshine", "moonshine")
    with pytest.raises(SettingsError, match=r"--context: prompts of .*moonshine have no place for a context"):
        line = ["--val_jsonl", "rows.jsonl", "--model_id", base, "--context", "terms.txt", "--output_dir", "e"]
        evaluate.run_evaluation(parse_only("evaluate", line))


def test_features_of_earlier_versions_are_made_again(here: Path) -> None:
    """They ignored the key, so their prompts have no context."""
    job = parse_only("featurize", f"--manifest rows.jsonl --model_id {TINY} --output_dir f --num_actors 1".split())
    featurize.make_features = partial(featurize.make_features, use_ray=False)
    [folder] = featurize.run_featurize_job(job).folders
    reports = sorted((Path(folder) / "shards").glob("*.json"))
    for report in reports:
        values = json.loads(report.read_text())
        assert values.pop("reads_context")
        report.write_text(json.dumps(values))
    before = [path.stat().st_mtime_ns for path in reports]
    featurize.run_featurize_job(job)
    assert all(path.stat().st_mtime_ns > time for path, time in zip(reports, before, strict=True))
    assert all(json.loads(path.read_text())["reads_context"] for path in reports)


def test_lengths_count_the_context_of_the_job(here: Path, evaluation_here: None) -> None:
    """Rows with long contexts of their own are answered without them."""
    rows = read_rows("rows.jsonl")
    rows[0]["context"] = [f"긴 낱말 {number}" for number in range(100)]
    write_rows(here / "rows.jsonl", rows)
    usual = f"--model_id {TINY} --val_jsonl rows.jsonl --gen_max_new_tokens 2 --features_dir features --max_len 200"
    for name, flags, number in (("own", "", 5), ("none", "--no_context", 6), ("file", "--context terms.txt", 6)):
        evaluate.run_evaluation(parse_only("evaluate", f"{usual} --output_dir {name} {flags}".split()))
        assert len(read_predictions(here / name)) == number, name


def test_chunks_of_long_recordings_have_the_context_of_the_job(here: Path, tmp_path: Path) -> None:
    front_end = get_family(TINY).front_end(TINY)
    clip = tmp_path / "long.wav"
    soundfile.write(clip, np.zeros(2000 * 16_000, np.int16), 16_000)
    row = {"audio_path": str(clip), "transcript": "x", "language": "ko", "context": "own"}
    sample = parse_row(json.dumps(row).encode(), str(here / "rows.jsonl"), 1)
    terms = ", ".join(f"낱말 {number}" for number in range(60))
    (tmp_path / "set").mkdir()
    line = {"manifest": str(tmp_path / "m.jsonl"), "line": 1, "id": "x", "reason": "audio_too_long", "message": "m"}
    write_rows(tmp_path / "m.jsonl", [row])
    (tmp_path / "set" / "quarantine.jsonl").write_text(json.dumps(line) + "\n")
    chunks = tmp_path / "chunks.jsonl"
    for context, text in ((None, "own"), ("", None), (terms, terms)):
        assert write_chunk_manifest([tmp_path / "set"], front_end, 1280, chunks, context=context)
        parts = read_rows(str(chunks))
        assert {part.get("context") for part in parts} == {text}
        num_samples = round(parts[0]["duration"] * 16_000)
        assert len(front_end.prompt_ids(replace(sample, prompt=text or ""), num_samples)) <= 1280


def test_drawing_from_long_contexts_is_quick(here: Path, make_features: Any) -> None:
    """Few terms of a long list are tried, and decomposed Hangul counts as said."""
    rows = read_rows("rows.jsonl")
    rows[0] |= {"context": ["열"], "transcript": "기침이 납니다"}
    for row in rows[1:]:
        row["context"] = [unicodedata.normalize("NFD", "기침"), *(f"낱말 {number}" for number in range(100))]
    write_rows(here / "rows.jsonl", rows)
    draw, features = sampler(make_features(str(here / "rows.jsonl"), folder=here / "f"))
    row, calls = features.row(0), 0
    prompt_ids = type(draw._front_end).prompt_ids

    def counted(*args: Any) -> list[int]:
        nonlocal calls
        calls += 1
        return prompt_ids(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(draw._front_end), "prompt_ids", counted)
        drawn = [draw(row, step).prompt for step in range(40)]
    assert calls < 40 * 16 * 8 and not any("기침" in unicodedata.normalize("NFC", text) for text in drawn)
