"""Answers compared with transformers' own generate, and interrupted evaluations."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, read_rows, write_rows
from helpers.library import library_batch
from transformers import VoxtralForConditionalGeneration, VoxtralProcessor

from voxray.audio.decode import decode
from voxray.batches.collate import collate_training
from voxray.cluster.actor_pool import ActorPool, _Item
from voxray.config.flag_groups import ScoreFlags
from voxray.core.errors import RunError, SettingsError
from voxray.evaluation import distribute
from voxray.evaluation.distribute import ModelCount, answer_rows, check_invariance, plan_model_pool, read_failed
from voxray.evaluation.prediction_actor import MAX_CRASHES_PER_ROW, PredictionActor
from voxray.evaluation.predictions import read_predictions, score_predictions
from voxray.features.crash_log import open_crash_log
from voxray.features.reader import Features
from voxray.generation import continuous_batching
from voxray.generation.engines import engine
from voxray.generation.engines import load as engine_loader
from voxray.generation.generate import SamplingParams, generate_texts, sort_by_expected_length
from voxray.generation.model import InferenceConfig
from voxray.models.registry import get_family

CONFIG = InferenceConfig(TINY, "", SamplingParams(24), batch_size=3)
pytestmark = pytest.mark.usefixtures("one_thread")


def evaluate(folders, rows, output_dir, config=CONFIG):
    answer_rows(config, folders, rows, output_dir, use_ray=False)
    return score_predictions(read_predictions(output_dir), ScoreFlags())


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
        expected = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == expected.strip()
    assert any(text for text in ours)


def _line(source: str) -> str:
    path, _, line = source.rpartition(":")
    return Path(path).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_long_answers_come_first_and_no_row_is_lost(folders):
    features = Features(folders)
    order = sort_by_expected_length(features, range(len(features)))
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
    metrics = evaluate(folders, range(len(features)), tmp_path)
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
    evaluate(folders, [0, 1], tmp_path / "o")
    one, two = read_predictions(tmp_path / "o")
    assert {name: one[name] for name in known} == known and one["id"] == "7"
    assert (two["speaker"], two["dataset"], two["domain"], two["references"]) == ("3", "m", None, None)


def test_an_interrupted_evaluation_resumes(folders, tmp_path, monkeypatch):
    """Finished parts are kept, the others are answered, and the result is that of an uninterrupted evaluation."""
    monkeypatch.setattr(distribute, "BATCHES_PER_PART", 1)
    rows = range(len(Features(folders)))
    whole = evaluate(folders, rows, tmp_path / "a")
    done = []

    class Dying(PredictionActor):
        def write_part(self, part, rows):
            if part == 2:
                raise KeyboardInterrupt
            super().write_part(part, rows)

    monkeypatch.setattr(distribute, "PredictionActor", Dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folders, rows, tmp_path / "b")

    class Noting(Dying.__base__):
        def write_part(self, part, rows):
            done.append(part)
            super().write_part(part, rows)

    monkeypatch.setattr(distribute, "PredictionActor", Noting)
    assert evaluate(folders, rows, tmp_path / "b") == whole
    assert done == [2, 3]
    assert evaluate(folders, rows, tmp_path / "b") == whole
    assert done == [2, 3], "nothing is answered twice"


def test_other_settings_do_not_reuse_predictions(folders, tmp_path):
    evaluate(folders, range(4), tmp_path)
    before = (tmp_path / "predictions" / "part-00000.parquet").stat().st_mtime_ns
    evaluate(folders, range(4), tmp_path, InferenceConfig(TINY, "", SamplingParams(1), batch_size=3))
    assert (tmp_path / "predictions" / "part-00000.parquet").stat().st_mtime_ns != before
    assert all(len(row["prediction"]) <= 4 for row in read_predictions(tmp_path))


def failing_on(monkeypatch, *ids):
    """The model fails whenever one of these rows is in its batch; returns the sizes of the batches."""
    sizes, collate = [], continuous_batching.collate_prompts

    def collated(rows, front_end):
        sizes.append(len(rows))
        if {row.id for row in rows} & set(ids):
            raise RuntimeError("no such expert")
        return collate(rows, front_end)

    monkeypatch.setattr(continuous_batching, "collate_prompts", collated)
    return sizes


def test_a_row_that_fails_is_listed_and_the_others_are_answered(folders, tmp_path, monkeypatch):
    rows = range(len(Features(folders)))
    whole = {row["id"]: row["prediction"] for row in evaluate_rows(folders, rows, tmp_path / "a")}
    failing_on(monkeypatch, "asr.val.jsonl:2", "tqa.val.jsonl:3")
    answers = {row["id"]: row["prediction"] for row in evaluate_rows(folders, rows, tmp_path / "b")}
    assert answers == {name: text for name, text in whole.items() if name not in ("asr.val.jsonl:2", "tqa.val.jsonl:3")}
    failed = sorted(read_failed(tmp_path / "b"))
    features = Features(folders)
    assert [features.ids([row])[0] for row, *_ in failed] == ["asr.val.jsonl:2", "tqa.val.jsonl:3"]
    assert {(reason, message) for _, reason, message in failed} == {("not_answered", "RuntimeError: no such expert")}
    with pytest.raises(RunError, match=r"not one row could be answered; .*asr.val.jsonl:2: RuntimeError: no such ex"):
        evaluate(folders, [1], tmp_path / "c")


def test_a_batch_that_does_not_fit_memory_is_made_smaller(folders, tmp_path, monkeypatch):
    """Batches of more than one row run out of memory, and all rows are answered nevertheless."""
    collate, sizes = continuous_batching.collate_prompts, []

    def collated(rows, front_end):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return collate(rows, front_end)

    monkeypatch.setattr(continuous_batching, "collate_prompts", collated)
    assert len(evaluate_rows(folders, range(6), tmp_path)) == 6 and not read_failed(tmp_path)
    assert max(sizes) == 3


def evaluate_rows(folders, rows, output_dir):
    evaluate(folders, rows, output_dir)
    return read_predictions(output_dir)


def test_rows_that_kill_their_process_are_skipped(tmp_path):
    """Two of them in one part: first all rows are answered together, then one by one; no other row is blamed."""
    path, rows, num_processes, skipped, killed = tmp_path / "p" / ".attempts", range(10, 18), 0, set(), []
    for _ in range(2 * MAX_CRASHES_PER_ROW + 2):
        context = open_crash_log(path, MAX_CRASHES_PER_ROW)
        killed.append(context)  # or it would be closed when it is collected
        crash_log, skipped = context.__enter__(), set()
        num_processes += 1
        assert crash_log.crashed_before == (num_processes > 1)
        for group in [[row] for row in rows] if crash_log.crashed_before else [list(rows)]:
            if not crash_log.start_rows(group):
                skipped.add(group[0])
            elif {12, 15} & set(group):
                break  # a killed process runs nothing after this, not even __exit__
        else:
            context.__exit__(None, None, None)
            break
    assert skipped == {12, 15} and num_processes == 2 * MAX_CRASHES_PER_ROW + 2
    assert not path.exists(), "the next run blames no row"


def test_skipped_rows_are_listed(folders, tmp_path, monkeypatch):
    """After a crash the rows of a part are answered one by one, with the same answers; the row to blame is skipped."""
    rows = range(6)
    whole = {row["id"]: row["prediction"] for row in evaluate_rows(folders, rows, tmp_path / "a")}
    monkeypatch.setattr(distribute, "_set_aside_other_evaluation", lambda predictions, key: None)
    path = tmp_path / "b" / "predictions" / ".attempts-00000"
    path.parent.mkdir(parents=True)
    path.write_text("\n" + "\n 4" * MAX_CRASHES_PER_ROW)
    sizes = failing_on(monkeypatch)
    answers = {row["id"]: row["prediction"] for row in evaluate_rows(folders, rows, tmp_path / "b")}
    [killer] = Features(folders).ids([4])
    assert answers == {name: text for name, text in whole.items() if name != killer}
    assert read_failed(tmp_path / "b") == [(4, "process_died", "2 processes died while they answered this row")]
    assert set(sizes) == {1} and not path.exists()


def test_reference_losses_are_those_of_transformers(folders, tmp_path, monkeypatch):
    """Row by row with the library's own loss; a row whose loss cannot be computed keeps its answer."""
    real, features = engine.reference_losses, Features(folders)

    def failing(model, family, front_end, rows):
        if any(row.id == "tqa.val.jsonl:2" for row in rows):
            raise RuntimeError("out of memory")
        return real(model, family, front_end, rows)

    monkeypatch.setattr(engine, "reference_losses", failing)
    metrics = evaluate(folders, range(len(features)), tmp_path, replace(CONFIG, perplexity="answers"))
    model = VoxtralForConditionalGeneration.from_pretrained(TINY).eval()
    front_end, predictions = get_family(TINY).front_end(TINY), {row["id"]: row for row in read_predictions(tmp_path)}
    assert len(predictions) == len(features)
    for row in (features.row(number) for number in range(len(features))):
        prediction = predictions[row.id]
        if row.task == "asr" or row.id == "tqa.val.jsonl:2":
            assert prediction["nll"] is None and prediction["num_tokens"] is None
            continue
        batch = collate_training([row], front_end)
        with torch.no_grad():
            loss = float(model(**library_batch(batch)).loss)
        assert prediction["num_tokens"] == len(row.target_ids)
        assert prediction["nll"] == pytest.approx(loss * prediction["num_tokens"], rel=1e-5)
    assert metrics["tqa"]["perplexity"]["n"] == 3 and metrics["sqa"]["perplexity"]["n"] == 4
    assert "perplexity" not in metrics["asr"]


def test_without_a_model_the_job_ends_in_one_line(folders, tmp_path, monkeypatch):
    """Also on Ray, which retries an actor whose constructor raises and then prints a traceback."""
    batch = {"item": [_Item({"part": 0, "rows": [0]})]}
    damaged = replace(CONFIG, adapter=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("[")
    [item] = PredictionActor(damaged, folders, tmp_path / "p", 1)(batch)["item"]
    assert "cannot read the adapter's configuration" in item.error

    def load(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    monkeypatch.setattr(engine_loader, "load_model", load)
    message = "the model cannot be loaded: OutOfMemoryError: CUDA out of memory"
    [item] = PredictionActor(CONFIG, folders, tmp_path / "p", 1)(batch)["item"]
    assert item.error == message
    with pytest.raises(RunError, match=message):
        evaluate(folders, [0], tmp_path / "q")


def test_a_list_of_failed_rows_does_not_outlive_their_answers(folders, tmp_path):
    """A process fails at a row, lists it, and is killed before it writes its part; the next one answers the row."""
    evaluate(folders, range(3), tmp_path)
    part = tmp_path / "predictions" / "part-00000"
    part.with_suffix(".parquet").unlink()
    part.with_suffix(".failed.json").write_text('[[1, "not_answered", "no memory"]]')
    assert len(evaluate_rows(folders, range(3), tmp_path)) == 3 and not read_failed(tmp_path)


def test_batch_composition_changes_no_text(folders, tmp_path, monkeypatch):
    rows = range(len(Features(folders)))
    evaluate(folders, rows, tmp_path)
    result = check_invariance(CONFIG, folders, rows, tmp_path, 5, use_ray=False)
    assert result == {"n": 5, "differing": 0, "ids": []}
    assert check_invariance(CONFIG, folders, rows, tmp_path, 99, use_ray=False)["n"] == len(rows)
    real = engine.generate

    def other(model, family, front_end, rows, *, batch_size, **options):
        for index, answer in real(model, family, front_end, rows, batch_size=batch_size, **options):
            text = answer.text + "!" * (batch_size == 1 and rows[index].id == "sqa.val.jsonl:1")
            yield index, replace(answer, text=text)

    monkeypatch.setattr(engine, "generate", other)
    shutil.rmtree(tmp_path / "one_by_one")
    result = check_invariance(CONFIG, folders, rows, tmp_path, 99, use_ray=False)
    assert result == {"n": len(rows), "differing": 1, "ids": ["sqa.val.jsonl:1"]}


def test_models_share_the_cluster():
    def plan(number, gpus, cpus, parts=100, gpus_each=0.0):
        return plan_model_pool(ModelCount(number, gpus_each), gpus, cpus, parts)

    assert plan(0, 0, 8) == (ActorPool(4, 4, None, 1.0), 2), "one model per two CPUs"
    assert plan(0, 4, 8) == (ActorPool(4, 4, 1.0, None), 2), "one per GPU"
    assert plan(0, 2, 8, gpus_each=0.5) == (ActorPool(4, 4, 0.5, None), 2), "two on each GPU"
    assert plan("1:3", 0, 8) == (ActorPool(1, 3, None, 1.0), 2)
    assert plan("2:8", 0, 4, parts=1) == (ActorPool(1, 1, None, 1.0), 4), "no more than there is to do"
    assert plan(8, 2, 8) == (ActorPool(8, 8, 0.25, None), 1)
    with pytest.raises(SettingsError, match=r"^--num_models 3 with --gpus_per_model 1: the cluster has 2 GPU\(s\)"):
        plan(3, 2, 8, gpus_each=1)
    assert plan("1:3", 2, 8, gpus_each=1) == (ActorPool(1, 3, 1, None), 2), "it grows as far as it can"
    assert plan(0, 0, 1) == (ActorPool(1, 1, None, 1.0), 1)
