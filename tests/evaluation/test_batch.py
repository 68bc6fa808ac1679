"""Answers against transformers' own generate, and evaluations that were cut off."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY
from transformers import VoxtralForConditionalGeneration, VoxtralProcessor

from voxray.audio.decode import decode
from voxray.data.features import Features
from voxray.evaluation.batch import Generation, evaluate, part_path, read_predictions
from voxray.evaluation.generate import answers, length_batches
from voxray.models.family import family_of

GENERATION = Generation(TINY, "", bf16=False, batch_size=3, max_new_tokens=24)


@pytest.fixture(scope="module")
def folders(small, make_features):
    return make_features(*(small[f"{task}.val"] for task in ("asr", "sqa", "tqa")))


def test_answers_equal_transformers_one_by_one(folders):
    """Our features, prompts and left-padded batches give the texts of processor + generate without any batch."""
    family, features = family_of(TINY), Features(folders)
    model = VoxtralForConditionalGeneration.from_pretrained(TINY).eval()
    front_end, processor = family.front_end(TINY), VoxtralProcessor.from_pretrained(TINY)
    shape = {"audio_kwargs": {"pad_to_multiple_of": 64_000, "max_source_positions": 400}}
    rows = [features.row(number) for number in range(4)]
    ours = answers(model, family, front_end, rows, max_new_tokens=24)
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


def test_longest_rows_come_first_and_none_is_lost(folders):
    features = Features(folders)
    batches = list(length_batches(features, range(len(features)), 5))
    assert sorted(row for batch in batches for row in batch) == list(range(len(features)))
    lengths = [features.num_prompt_tokens[batch[0]] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)


def test_metrics_and_predictions_agree(folders, tmp_path):
    features = Features(folders)
    metrics = evaluate(GENERATION, folders, range(len(features)), tmp_path, use_ray=False)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert set(metrics) == {"asr", "sqa", "tqa"}
    assert set(metrics["asr"]) == {"cer", "cer_nospace", "wer", "exact_match"}
    assert set(metrics["sqa"]) == {"rouge_l", "exact_match"}
    assert all(entry["n"] == 4 for task in metrics.values() for entry in task.values())
    rows = read_predictions(tmp_path)
    assert [row["id"] for row in rows if row["task"] == "asr"] == [f"asr.val.jsonl:{line}" for line in (1, 2, 3, 4)]
    asr = [row for row in rows if row["task"] == "asr"]
    assert metrics["asr"]["cer"]["value"] == sum(row["char_edits"] for row in asr) / sum(row["char_ref"] for row in asr)
    stored = pq.read_schema(part_path(tmp_path / "predictions", 0)).metadata
    assert stored[b"normalizer"] == b"ko-v1"


def test_an_evaluation_goes_on_where_it_was_cut_off(folders, tmp_path, monkeypatch):
    """Finished parts stay, the missing one is answered, and the result is that of an uninterrupted evaluation."""
    from voxray.evaluation import batch

    monkeypatch.setattr(batch, "BATCHES_PER_PART", 1)
    rows = range(len(Features(folders)))
    whole = evaluate(GENERATION, folders, rows, tmp_path / "a", use_ray=False)
    answered = []

    class Dying(batch.Answerer):
        def write_part(self, part, rows):
            if part == 2:
                raise KeyboardInterrupt
            super().write_part(part, rows)

    monkeypatch.setattr(batch, "Answerer", Dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(GENERATION, folders, rows, tmp_path / "b", use_ray=False)

    class Noting(Dying.__base__):
        def write_part(self, part, rows):
            answered.append(part)
            super().write_part(part, rows)

    monkeypatch.setattr(batch, "Answerer", Noting)
    assert evaluate(GENERATION, folders, rows, tmp_path / "b", use_ray=False) == whole
    assert answered == [2, 3]
    assert evaluate(GENERATION, folders, rows, tmp_path / "b", use_ray=False) == whole
    assert answered == [2, 3], "nothing is answered twice"


def test_other_settings_do_not_reuse_predictions(folders, tmp_path):
    rows = range(4)
    evaluate(GENERATION, folders, rows, tmp_path, use_ray=False)
    before = (tmp_path / "predictions" / "part-00000.parquet").stat().st_mtime_ns
    other = Generation(TINY, "", bf16=False, batch_size=3, max_new_tokens=1)
    evaluate(other, folders, rows, tmp_path, use_ray=False)
    assert (tmp_path / "predictions" / "part-00000.parquet").stat().st_mtime_ns != before
    assert all(len(row["prediction"]) <= 4 for row in read_predictions(tmp_path))
