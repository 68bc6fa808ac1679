"""Answers against transformers' own generate, and evaluations that were cut off."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, read_rows, write_rows
from transformers import VoxtralForConditionalGeneration, VoxtralProcessor

from voxray.audio.decode import decode
from voxray.batches.collate import collate_training
from voxray.config.flag_groups import ScoreFlags
from voxray.core.errors import RunError, SettingsError
from voxray.evaluation import distribute as batch
from voxray.evaluation import prediction_actor as answerer
from voxray.evaluation.distribute import ActorPool, ModelCount, answer_rows, check_invariance, plan_pool, read_failed
from voxray.evaluation.prediction_actor import MAX_LONE_DEATHS, crash_log
from voxray.evaluation.predictions import read_predictions, scored
from voxray.features.reader import Features
from voxray.generation import continuous_batching as greedy
from voxray.generation.generate import SamplingParams, by_expected_length, generate_texts
from voxray.generation.model import InferenceConfig
from voxray.models.registry import get_family

GENERATION = InferenceConfig(TINY, "", SamplingParams(24), batch_size=3)
pytestmark = pytest.mark.usefixtures("one_thread")


def evaluated(folders, rows, output_dir, generation=GENERATION):
    answer_rows(generation, folders, rows, output_dir, use_ray=False)
    return scored(read_predictions(output_dir), ScoreFlags())


@pytest.fixture(scope="module")
def folders(small, make_features):
    return make_features(*(small[f"{task}.val"] for task in ("asr", "sqa", "tqa")))


def test_answers_equal_transformers_one_by_one(folders):
    """Our features, prompts and left-padded batches give the texts of processor + generate without any batch."""
    family, features = get_family(TINY), Features(folders)
    model = VoxtralForConditionalGeneration.from_pretrained(TINY).eval()
    front_end, processor = family.front_end(TINY), VoxtralProcessor.from_pretrained(TINY)
    shape = {"audio_kwargs": {"pad_to_multiple_of": 64_000, "max_source_positions": 400}}
    rows = [features.row(number) for number in range(4)]
    ours = generate_texts(model, family, front_end, rows, max_new_tokens=24)
    for row, text in zip(rows, ours, strict=True):
        # Samples, not the path: given a file, the processor encodes an Ogg clip a second time before it looks at it.
        samples = decode(json.loads(_line(row.source))["audio_path"], 16_000)
        request = {"audio": [samples], "format": ["wav"], "sampling_rate": 16_000, "model_id": "tiny", **shape}
        inputs = processor.apply_transcription_request(**request, language="ko")
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        theirs = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == theirs.strip()
    assert any(text for text in ours)


def _line(source: str) -> str:
    path, _, line = source.rpartition(":")
    return Path(path).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_long_answers_come_first_and_no_row_is_lost(folders):
    features = Features(folders)
    order = by_expected_length(features, range(len(features)))
    assert sorted(order) == list(range(len(features)))
    asr = [row for row in order if features.row(row).task == "asr"]
    chat = [row for row in order if features.row(row).task != "asr"]
    assert order == chat + asr
    clips = [features.num_samples[row] for row in asr]
    assert clips == sorted(clips, reverse=True)
    prompts = [features.num_prompt_tokens[row] for row in chat]
    assert prompts == sorted(prompts, reverse=True)


def test_metrics_and_predictions_agree(folders, small, tmp_path):
    features = Features(folders)
    metrics = evaluated(folders, range(len(features)), tmp_path)
    assert set(metrics) >= {"asr", "sqa", "tqa"}
    assert all(metrics[task]["exact_match"]["n"] == 4 for task in ("asr", "sqa", "tqa"))
    rows = read_predictions(tmp_path)
    assert [row["id"] for row in rows if row["task"] == "asr"] == [f"asr.val.jsonl:{line}" for line in (1, 2, 3, 4)]
    asr = [row for row in rows if row["task"] == "asr"]
    assert metrics["asr"]["cer"]["value"] == sum(row["char_edits"] for row in asr) / sum(row["char_ref"] for row in asr)
    assert {row["normalizer"] for row in rows} == set(metrics["normalizer"]) == {"ko-v1"}
    model = get_family(TINY).load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    front_end = get_family(TINY).front_end(TINY)
    alone = [
        generate_texts(model, get_family(TINY), front_end, [features.row(at)], max_new_tokens=24) for at in range(4)
    ]
    assert [[row["prediction"]] for row in asr] == alone
    for row in rows:
        assert row["sec"] > 0 and 0 <= row["num_new_tokens"] <= 24
        assert row["hit_max"] == (row["num_new_tokens"] == 24)
        assert row["dataset"] == f"{row['task']}.val" and row["speaker"] is None
        assert (row["audio_path"] is not None and Path(row["audio_path"]).is_file()) == (row["task"] != "tqa")


def test_what_the_manifest_says_of_a_row_is_in_its_prediction(small, make_features, tmp_path):
    [first, second, *_] = read_rows(small["asr.val"])
    known = {"speaker": "s1", "domain": "heart", "dataset": "ward", "snr_db": 12, "references": ["가", "나"]}
    folders = make_features(write_rows(tmp_path / "m.jsonl", [{**first, **known, "id": 7}, {**second, "speaker": 3}]))
    evaluated(folders, [0, 1], tmp_path / "o")
    one, two = read_predictions(tmp_path / "o")
    assert {name: one[name] for name in known} == known and one["id"] == "7"
    assert (two["speaker"], two["dataset"], two["domain"], two["references"]) == ("3", "m", None, None)


def test_an_evaluation_goes_on_where_it_was_cut_off(folders, tmp_path, monkeypatch):
    """Finished parts stay, the missing one is answered, and the result is that of an uninterrupted evaluation."""
    monkeypatch.setattr(batch, "BATCHES_PER_PART", 1)
    rows = range(len(Features(folders)))
    whole = evaluated(folders, rows, tmp_path / "a")
    done = []

    class Dying(batch.PredictionActor):
        def write_part(self, part, rows):
            if part == 2:
                raise KeyboardInterrupt
            super().write_part(part, rows)

    monkeypatch.setattr(batch, "PredictionActor", Dying)
    with pytest.raises(KeyboardInterrupt):
        evaluated(folders, rows, tmp_path / "b")

    class Noting(Dying.__base__):
        def write_part(self, part, rows):
            done.append(part)
            super().write_part(part, rows)

    monkeypatch.setattr(batch, "PredictionActor", Noting)
    assert evaluated(folders, rows, tmp_path / "b") == whole
    assert done == [2, 3]
    assert evaluated(folders, rows, tmp_path / "b") == whole
    assert done == [2, 3], "nothing is answered twice"


def test_other_settings_do_not_reuse_predictions(folders, tmp_path):
    evaluated(folders, range(4), tmp_path)
    before = (tmp_path / "predictions" / "part-00000.parquet").stat().st_mtime_ns
    evaluated(folders, range(4), tmp_path, InferenceConfig(TINY, "", SamplingParams(1), batch_size=3))
    assert (tmp_path / "predictions" / "part-00000.parquet").stat().st_mtime_ns != before
    assert all(len(row["prediction"]) <= 4 for row in read_predictions(tmp_path))


def failing_on(monkeypatch, *ids):
    """The model fails whenever one of these rows is in its batch; returns the sizes of the batches."""
    sizes, collate = [], greedy.collate_prompts

    def collated(rows, front_end):
        sizes.append(len(rows))
        if {row.id for row in rows} & set(ids):
            raise RuntimeError("no such expert")
        return collate(rows, front_end)

    monkeypatch.setattr(greedy, "collate_prompts", collated)
    return sizes


def test_a_row_that_fails_is_listed_and_the_others_are_answered(folders, tmp_path, monkeypatch):
    rows = range(len(Features(folders)))
    whole = {row["id"]: row["prediction"] for row in evaluated_rows(folders, rows, tmp_path / "a")}
    failing_on(monkeypatch, "asr.val.jsonl:2", "tqa.val.jsonl:3")
    found = {row["id"]: row["prediction"] for row in evaluated_rows(folders, rows, tmp_path / "b")}
    assert found == {name: text for name, text in whole.items() if name not in ("asr.val.jsonl:2", "tqa.val.jsonl:3")}
    failed = sorted(read_failed(tmp_path / "b"))
    features = Features(folders)
    assert [features.ids([row])[0] for row, *_ in failed] == ["asr.val.jsonl:2", "tqa.val.jsonl:3"]
    assert {(reason, message) for _, reason, message in failed} == {("not_answered", "RuntimeError: no such expert")}
    with pytest.raises(RunError, match=r"not one row could be answered; .*asr.val.jsonl:2: RuntimeError: no such ex"):
        evaluated(folders, [1], tmp_path / "c")


def test_a_batch_that_does_not_fit_memory_is_made_smaller(folders, tmp_path, monkeypatch):
    """Memory lacks with more than one row at a time: all rows are answered all the same."""
    collate, sizes = greedy.collate_prompts, []

    def collated(rows, front_end):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return collate(rows, front_end)

    monkeypatch.setattr(greedy, "collate_prompts", collated)
    assert len(evaluated_rows(folders, range(6), tmp_path)) == 6 and not read_failed(tmp_path)
    assert max(sizes) == 3


def evaluated_rows(folders, rows, output_dir):
    evaluated(folders, rows, output_dir)
    return read_predictions(output_dir)


def test_rows_that_kill_their_process_are_found_and_given_up(tmp_path):
    """Two of them in one part: once all rows are answered together, then one by one; the others are never blamed."""
    mark, rows, num_processes, given_up, gone = tmp_path / "p" / ".attempts", range(10, 18), 0, set(), []
    for _ in range(2 * MAX_LONE_DEATHS + 2):
        working = crash_log(mark)
        gone.append(working)  # or it would be closed when it is collected
        attempt, given_up = working.__enter__(), set()
        num_processes += 1
        assert attempt.alone == (num_processes > 1)
        groups = [[row] for row in rows] if attempt.alone else [list(rows)]
        for group in groups:
            if not attempt.may(group):
                given_up.add(group[0])
            elif {12, 15} & set(group):
                break  # nothing after this happens in a process that is gone, not even __exit__
        else:
            working.__exit__(None, None, None)
            break
    assert given_up == {12, 15} and num_processes == 2 * MAX_LONE_DEATHS + 2
    assert not mark.exists(), "and nothing is held against them in the next run"


def test_what_is_given_up_is_listed(folders, tmp_path, monkeypatch):
    """A part whose process died before: its rows are answered one by one, and alike, but the one that killed it."""
    rows = range(6)
    whole = {row["id"]: row["prediction"] for row in evaluated_rows(folders, rows, tmp_path / "a")}
    monkeypatch.setattr(batch, "_forget_other_evaluation", lambda predictions, key: None)
    mark = tmp_path / "b" / "predictions" / ".attempts-00000"
    mark.parent.mkdir(parents=True)
    mark.write_text("\n" + "\n 4" * MAX_LONE_DEATHS)
    sizes = failing_on(monkeypatch)
    found = {row["id"]: row["prediction"] for row in evaluated_rows(folders, rows, tmp_path / "b")}
    [killer] = Features(folders).ids([4])
    assert found == {name: text for name, text in whole.items() if name != killer}
    assert read_failed(tmp_path / "b") == [(4, "process_died", "2 processes died while they answered this row")]
    assert set(sizes) == {1} and not mark.exists()


def test_reference_answers_are_weighed_as_transformers_does(folders, tmp_path, monkeypatch):
    """Row by row with the library's own loss; a row that cannot be weighed keeps its answer."""
    real, features = answerer.reference_losses, Features(folders)

    def failing(model, family, front_end, rows):
        if any(row.id == "tqa.val.jsonl:2" for row in rows):
            raise RuntimeError("out of memory")
        return real(model, family, front_end, rows)

    monkeypatch.setattr(answerer, "reference_losses", failing)
    metrics = evaluated(folders, range(len(features)), tmp_path, replace(GENERATION, perplexity="answers"))
    model = VoxtralForConditionalGeneration.from_pretrained(TINY).eval()
    front_end, found = get_family(TINY).front_end(TINY), {row["id"]: row for row in read_predictions(tmp_path)}
    assert len(found) == len(features)
    for row in (features.row(number) for number in range(len(features))):
        told = found[row.id]
        if row.task == "asr" or row.id == "tqa.val.jsonl:2":
            assert told["nll"] is None and told["num_tokens"] is None
            continue
        batch = collate_training([row], front_end)
        del batch["task"]
        with torch.no_grad():
            loss = float(model(**batch).loss)
        assert told["num_tokens"] == len(row.target_ids)
        assert told["nll"] == pytest.approx(loss * told["num_tokens"], rel=1e-5)
    assert metrics["tqa"]["perplexity"]["n"] == 3 and metrics["sqa"]["perplexity"]["n"] == 4
    assert "perplexity" not in metrics["asr"]


def test_without_a_model_the_job_ends_in_one_line(folders, tmp_path, monkeypatch):
    """Also on Ray, where an exception while an actor starts is tried again and ends in a traceback."""
    asked = {"item": [json.dumps({"part": 0, "rows": [0]})]}
    damaged = replace(GENERATION, adapter=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("[")
    [error] = answerer.PredictionActor(damaged, folders, tmp_path / "p", 1)(asked)["error"]
    assert "cannot read the adapter's configuration" in error

    def load(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    monkeypatch.setattr(answerer, "load_model", load)
    message = "the model cannot be loaded: OutOfMemoryError: CUDA out of memory"
    assert answerer.PredictionActor(GENERATION, folders, tmp_path / "p", 1)(asked)["error"] == [message]
    with pytest.raises(RunError, match=message):
        evaluated(folders, [0], tmp_path / "q")


def test_a_list_of_failed_rows_does_not_outlive_their_answers(folders, tmp_path):
    """A process fails at a row, lists it, and is cut off before its part is written; the next one answers the row."""
    evaluated(folders, range(3), tmp_path)
    part = tmp_path / "predictions" / "part-00000"
    part.with_suffix(".parquet").unlink()
    part.with_suffix(".failed.json").write_text('[[1, "not_answered", "no memory"]]')
    assert len(evaluated_rows(folders, range(3), tmp_path)) == 3 and not read_failed(tmp_path)


def test_batch_composition_changes_no_text(folders, tmp_path, monkeypatch):
    rows = range(len(Features(folders)))
    evaluated(folders, rows, tmp_path)
    found = check_invariance(GENERATION, folders, rows, tmp_path, 5, use_ray=False)
    assert found == {"n": 5, "differing": 0, "ids": []}
    assert check_invariance(GENERATION, folders, rows, tmp_path, 99, use_ray=False)["n"] == len(rows)
    real = answerer.generate

    def other(model, family, front_end, rows, *, batch_size, search):
        for place, given in real(model, family, front_end, rows, batch_size=batch_size, search=search):
            text = given.text + "!" * (batch_size == 1 and rows[place].id == "sqa.val.jsonl:1")
            yield place, replace(given, text=text)

    monkeypatch.setattr(answerer, "generate", other)
    shutil.rmtree(tmp_path / "one_by_one")
    found = check_invariance(GENERATION, folders, rows, tmp_path, 99, use_ray=False)
    assert found == {"n": len(rows), "differing": 1, "ids": ["sqa.val.jsonl:1"]}


def test_models_share_out_the_cluster():
    def pool(number, gpus, cpus, parts=100, gpus_each=0.0):
        return plan_pool(ModelCount(number, gpus_each), gpus, cpus, parts)

    assert pool(0, 0, 8) == ActorPool(4, 4, None, 1.0, 2), "one model per two CPUs"
    assert pool(0, 4, 8) == ActorPool(4, 4, 1.0, None, 2), "one per GPU"
    assert pool(0, 2, 8, gpus_each=0.5) == ActorPool(4, 4, 0.5, None, 2), "two on each GPU"
    assert pool("1:3", 0, 8) == ActorPool(1, 3, None, 1.0, 2)
    assert pool("2:8", 0, 4, parts=1) == ActorPool(1, 1, None, 1.0, 4), "no more than there is to do"
    assert pool(8, 2, 8) == ActorPool(8, 8, 0.25, None, 1)
    with pytest.raises(SettingsError, match=r"^--num_models 3 with --gpus_per_model 1: the cluster has 2 GPU\(s\)"):
        pool(3, 2, 8, gpus_each=1)
    assert pool("1:3", 2, 8, gpus_each=1) == ActorPool(1, 3, 1, None, 2), "it grows as far as it can"
    assert pool(0, 0, 1) == ActorPool(1, 1, None, 1.0, 1)
