"""The content of metrics.json, computed from prediction rows of every kind."""

import json
import math
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxray.core.console import console, metrics_table
from voxray.core.errors import RunError
from voxray.core.tasks import TASKS
from voxray.evaluation.score import by_task, score
from voxray.metrics.names import evaluation_metrics, higher_is_better
from voxray.metrics.terms import read_terms
from voxray.text.normalize import normalize_ko_v1, normalizers_from

Rows = list[dict[str, Any]]
WORDS = ["혈압이", "높습니다", "오늘은", "흉부", "엑스레이를", "찍어", "봅시다", "120/80", "mg", "네"]


def transcripts(num: int, seed: int = 0) -> Rows:
    """Random transcripts with about one wrong word in ten, of eight speakers with different error rates."""
    rng, rows = random.Random(seed), []
    for number in range(num):
        speaker = number % 8
        words = rng.choices(WORDS, k=rng.randint(2, 9))
        predicted = [rng.choice(WORDS) if rng.random() < 0.03 * speaker else word for word in words]
        row = {"task": "asr", "language": "ko", "reference": " ".join(words), "prediction": " ".join(predicted)}
        row |= {"id": f"r{number}", "speaker": f"s{speaker}", "source": f"/data/{'ab'[number % 2]}.jsonl:{number + 1}"}
        rows.append({**row, "domain": "clinic", "num_samples": 16_000 * (1 + number % 35), "snr_db": None})
    return rows


MIXED: Rows = [
    *transcripts(40),
    {"task": "asr", "language": "en", "reference": "I've twenty colours.", "prediction": "i have 20 colors"},
    {"task": "asr", "language": "de", "reference": "Größe: 36", "prediction": "größe 36"},
    {"task": "tqa", "reference": "고혈압입니다", "prediction": "고혈압 입니다", "nll": 6.0, "num_tokens": 4},
    {"task": "tqa", "reference": "네", "prediction": "아니요", "nll": 1.0, "num_tokens": 10},
    {"task": "aac", "references": ["a dog barks", "barking"], "prediction": "a dog"},
    {"task": "aac", "references": ["rain falls on a roof"], "prediction": "rain"},
]


def test_layout():
    result = score(MIXED, num_resamples=200)
    assert list(result)[:4] == ["asr", "tqa", "aac", "overall"] and list(by_task(result)) == ["asr", "tqa", "aac"]
    assert set(result) - set(TASKS) == {
        *("overall", "slices", "normalizer", "counts", "signatures", "intervals", "not_available"),
    }
    for task, metrics in by_task(result).items():
        assert set(metrics) <= set(evaluation_metrics(task)) and next(iter(metrics)) == TASKS[task].metrics[0]
        for name, entry in metrics.items():
            assert list(entry) == ["value", "low", "high", "n"], name
            assert math.isfinite(entry["value"]) and entry["n"] > 0 and higher_is_better(f"{task}/{name}") in (0, 1)
            assert (entry["low"] is None) == (entry["high"] is None)
            assert entry["low"] is None or entry["low"] <= entry["value"] + 1e-12, name
            assert entry["high"] is None or entry["value"] <= entry["high"] + 1e-12, name
    assert list(result["overall"]) == ["macro", "weighted", "balance"]
    assert result["normalizer"] == {"ko-v1": 44, "whisper-en-v1-nospelling": 1, "basic-v2": 1}
    assert json.loads(json.dumps(result, allow_nan=False)) == result, "plain JSON without NaN"
    assert set(result["not_available"]["aac"]) == {"meteor", "spice", "spider"}
    assert not set(result["aac"]) & {"meteor", "spice", "spider"}, "no substitutes"
    assert set(result["tqa"]) == {
        *("rouge_l", "exact_match", "char_f1", "bleu", "chrf", "distinct_1", "distinct_2"),
        *("repetition", "hallucination", "loss", "perplexity"),
    }


def test_languages_are_normalised_as_in_manifests():
    for language in ("en", "EN", "en-US", "en_GB", "English", "eng"):
        assert list(score([{**MIXED[40], "language": language}], num_resamples=0)["normalizer"]) == [
            "whisper-en-v1-nospelling"
        ]
    for language, name in ((None, "ko-v1"), ("", "ko-v1"), ("Korean", "ko-v1"), ("cmn", "basic-v2")):
        assert score([{**MIXED[40], "language": language}], num_resamples=0)["normalizer"] == {name: 1}
    question = {"task": "tqa", "language": "en", "reference": "twenty", "prediction": "20"}
    assert score([question], num_resamples=0)["normalizer"] == {"ko-v1": 1}, "answers are not transcripts"


def test_rates_equal_jiwer_and_are_ratios_of_counts():
    rows = transcripts(60)
    metrics = score(rows, num_resamples=0)
    texts = [normalize_ko_v1(row["reference"]) for row in rows], [normalize_ko_v1(row["prediction"]) for row in rows]
    solid = [[text.replace(" ", "") for text in side] for side in texts]
    assert metrics["asr"]["cer_nospace"]["value"] == pytest.approx(jiwer.cer(*solid))
    assert metrics["asr"]["wer"]["value"] == pytest.approx(jiwer.wer(*texts))
    expected, word_counts = jiwer.process_words(*texts), metrics["counts"]["asr"]["words"]
    for kind in ("substitutions", "deletions", "insertions"):
        assert word_counts[kind] == getattr(expected, kind)
    for unit, metric in (("words", "wer"), ("characters", "cer_nospace")):
        sums = metrics["counts"]["asr"][unit]
        errors = sums["substitutions"] + sums["deletions"] + sums["insertions"]
        assert errors / sums["reference"] == pytest.approx(metrics["asr"][metric]["value"])
    assert metrics["asr"]["wer"] | {"value": 0} == {"value": 0, "low": None, "high": None, "n": 60}


def test_intervals_resample_speakers_if_there_are_any():
    rows = transcripts(400)
    over_speakers = score(rows, num_resamples=2000)
    over_utterances = score([{**row, "speaker": None} for row in rows], num_resamples=2000)
    assert over_speakers["intervals"]["asr"] == {
        "level": 0.95,
        "resampled": "speaker",
        "groups": 8,
        "num_resamples": 2000,
    }
    intervals = over_utterances["intervals"]["asr"]
    assert (intervals["resampled"], intervals["groups"]) == ("utterance", 400)
    wide, narrow = over_speakers["asr"]["cer_nospace"], over_utterances["asr"]["cer_nospace"]
    assert wide["value"] == narrow["value"]
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"]) > 0
    assert score(rows, num_resamples=2000) == over_speakers, "seeded"
    assert score(rows, num_resamples=2000, seed=1)["asr"]["wer"]["low"] != over_speakers["asr"]["wer"]["low"]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert score(shuffled, num_resamples=2000) == over_speakers, "in any order"


def test_metrics_without_interval_are_listed():
    metrics = score(MIXED, num_resamples=100)
    assert "without" not in metrics["intervals"]["asr"]
    for task in ("tqa", "aac"):
        assert set(metrics["intervals"][task]["without"]) == {"distinct_1", "distinct_2"}
        assert {name for name, entry in metrics[task].items() if entry["low"] is None} == {"distinct_1", "distinct_2"}
    single = score(MIXED[41:42], num_resamples=100)
    assert single["asr"]["cer_nospace"] == {"value": 0.0, "low": None, "high": None, "n": 1}
    assert single["overall"]["macro"] == {"value": 1.0, "low": None, "high": None, "n": 1}


def test_overall():
    metrics = score(MIXED, num_resamples=500)
    asr, tqa, aac = (metrics[task] for task in ("asr", "tqa", "aac"))
    scores = [1 - asr["cer_nospace"]["value"], tqa["rouge_l"]["value"], aac["rouge_l"]["value"]]
    macro, weighted, balance = (metrics["overall"][name] for name in ("macro", "weighted", "balance"))
    assert macro["value"] == pytest.approx(np.mean(scores))
    assert weighted["value"] == pytest.approx(np.average(scores, weights=[42, 2, 2]))
    assert balance["value"] == pytest.approx(min(scores) / max(scores))
    assert macro["low"] < macro["value"] < macro["high"] and macro["n"] == 46
    looping = [{"task": "asr", "reference": "네", "prediction": "네" * 90}] * 2
    assert score(looping, num_resamples=50)["overall"]["macro"]["value"] == 0, "1 - min(CER, 1)"


def test_perplexity_is_weighted_by_tokens():
    metrics = score(MIXED, num_resamples=100)["tqa"]
    loss, perplexity = metrics["loss"], metrics["perplexity"]
    assert loss["value"] == pytest.approx(0.5) and perplexity["value"] == pytest.approx(math.exp(0.5))
    assert perplexity["n"] == 2 and perplexity["low"] == pytest.approx(math.exp(loss["low"]))
    assert "perplexity" not in score(MIXED[:40], num_resamples=0)["asr"]
    overflowing = score([{**MIXED[42], "nll": 1e9}], num_resamples=0)["tqa"]
    assert overflowing["loss"]["value"] == 2.5e8 and "perplexity" not in overflowing
    assert "loss" not in score([{**MIXED[42], "nll": math.nan}], num_resamples=0)["tqa"]


def test_slices():
    rows = transcripts(80)
    for number, row in enumerate(rows):
        row |= {
            "snr_db": None if number < 10 else number - 20.0,
            "language": ("", "ko", "KO-kr", "Korean")[number % 4],
            "domain": "",
        }
    rows[3]["dataset"] = "extra"
    slices = score(rows, num_resamples=100)["slices"]["asr"]
    assert set(slices) == {"dataset", "language", "speaker", "duration", "snr"}, "no row has a domain"
    assert {label: entry["n"] for label, entry in slices["dataset"].items()} == {"a": 40, "b": 39, "extra": 1}
    assert {label: entry["n"] for label, entry in slices["language"].items()} == {"ko": 60, "unknown": 20}
    assert list(slices["language"]) == ["ko", "unknown"]
    assert list(slices["duration"]) == ["0-2 s", "2-5 s", "5-10 s", "10-20 s", "20-30 s", "30 s and over"]
    assert list(slices["snr"]) == [
        *("under 0 dB", "0-5 dB", "5-10 dB", "10-15 dB", "15-20 dB", "20 dB and over", "unknown"),
    ]
    assert [entry["n"] for entry in slices["duration"].values()] == [3, 9, 15, 21, 20, 12]
    assert [entry["n"] for entry in slices["snr"].values()] == [10, 5, 5, 5, 5, 40, 10]
    for dimension in ("dataset", "language", "duration", "snr"):
        assert sum(entry["n"] for entry in slices[dimension].values()) == 80
    all_rows, dataset_a = score(rows, num_resamples=0)["asr"], slices["dataset"]["a"]
    expected = score([row for row in rows if row["source"].startswith("/data/a")], num_resamples=0)["asr"]
    for name in TASKS["asr"].metrics:
        assert dataset_a[name]["value"] == expected[name]["value"]
    wer = dataset_a["wer"]
    assert wer["low"] <= wer["value"] <= wer["high"] and set(dataset_a) - {"n"} < set(all_rows)
    assert slices["speaker"]["num_speakers"] == 8
    best, worst = slices["speaker"]["best"], slices["speaker"]["worst"]
    assert len(best) == len(worst) == 5 and best[0]["cer_nospace"] == 0 < worst[0]["cer_nospace"]
    assert best[0]["speaker"] == "s0" and all(entry["n"] == 10 for entry in best)


def test_empty_references():
    rows = [{"task": "asr", "reference": "", "prediction": "환각", "source": "/a.jsonl:1"}, *transcripts(3)]
    metrics = score(rows, num_resamples=20)
    assert metrics["slices"]["asr"]["dataset"]["a"]["n"] == 3
    assert metrics["asr"]["cer_nospace"]["n"] == 3 and metrics["asr"]["exact_match"]["n"] == 4
    silence = metrics["asr"]["silence_hallucination"]
    assert (silence["value"], silence["n"]) == (1, 1)
    empty = {"n": 1, "inserted_characters": 2, "inserted_words": 1}
    assert metrics["counts"]["asr"]["empty_references"] == empty
    only_empty = score(rows[:1], num_resamples=20)
    assert set(only_empty["asr"]) == {"exact_match", "silence_hallucination", "repetition", "hallucination"}
    assert only_empty["overall"] == {}, "there is no headline metric"


def test_terms_of_contexts():
    """Without a list, the terms of each row's own prompt; a leak is one that nobody said."""
    texts = [
        ("타이레놀, 와파린", "타이레놀 드세요", "타이레놀 드세요"),
        ("타이레놀, 와파린, Tylenol", "네", "와파린 와파린"),
        ("와파린", "와 파린 5mg", "아스피린"),
        ("", "타이레놀", "와파린"),
    ]
    rows = [{"task": "asr", "prompt": each[0], "reference": each[1], "prediction": each[2]} for each in texts]
    metrics = score(rows, num_resamples=20)
    assert metrics["asr"]["context_leak"]["value"] == 1 / 4 and metrics["asr"]["context_leak"]["n"] == 4
    assert metrics["asr"]["term_recall"]["value"] == 1 / 2 and metrics["terms"]["n"] == 2
    listed = score(rows, terms=("타이레놀",), num_resamples=0)["asr"]
    assert listed["term_recall"]["n"] == 2 and listed["context_leak"]["value"] == 1 / 4
    assert not {"context_leak", "term_recall"} & set(score(rows[3:], num_resamples=0)["asr"])


def test_terms_that_are_said_in_any_form_are_not_absent():
    """Within longer terms, in other references and readings, and as numbers with commas."""
    row = {"task": "asr", "prompt": "pain, chest pain", "reference": "chest pain", "prediction": "pain in chest"}
    assert "context_leak" not in score([row], num_resamples=0)["asr"], "nothing is absent"
    row |= {"prompt": "1,000 mg, Tylenol", "reference": "1,000 mg", "prediction": "Tylenol"}
    assert score([row], num_resamples=0)["asr"]["context_leak"] == {"value": 1, "low": None, "high": None, "n": 1}
    del row["reference"]
    row |= {"references": ["x", "Tylenol"], "prompt": "Tylenol"}
    assert "context_leak" not in score([row], num_resamples=0)["asr"]


def test_terms(tmp_path: Path):
    path = tmp_path / "terms.txt"
    path.write_text("\ufeff# drugs\n타이레놀\n\n  흉부 엑스레이 \n타이레놀\n", encoding="utf-8")
    terms = read_terms(path)
    assert terms == ("타이레놀", "흉부 엑스레이")
    pairs = [
        ("타이레놀 드세요", "타이네롤 드세요"),
        ("흉부 엑스레이, 타이레놀", "흉부엑스레이 타이레놀"),
        ("네", "타이레놀"),
    ]
    rows = [{"task": "asr", "reference": reference, "prediction": text} for reference, text in pairs]
    metrics = score(rows, terms=terms, num_resamples=50)
    recall = metrics["asr"]["term_recall"]
    assert recall["value"] == 2 / 3 and recall["n"] == 3 and recall["low"] is not None
    missed = [{"term": "타이레놀", "n": 2, "found": 1}]
    assert metrics["terms"] == {"num_terms": 2, "n": 3, "found": 2, "missed": missed}
    several = [{"task": "asr", "references": ["타이레놀", "네"], "prediction": "네"}]
    assert score(several, terms=terms, num_resamples=0)["asr"]["term_recall"]["value"] == 0, (
        "terms of the first reference"
    )
    raw = [{"task": "asr", "reference": "(타이레놀)/(타이레노르) 드세요", "prediction": "타이레노르"}]
    assert score(raw, terms=terms, num_resamples=0)["terms"]["n"] == 1
    assert "term_recall" not in score(rows[2:], terms=terms, num_resamples=0)["asr"], "no term in the references"
    path.write_text("# none\n", encoding="utf-8")
    for bad_path in (path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=r"terms.txt: no term|nowhere: cannot read"):
            read_terms(bad_path)


def test_english_spelling(tmp_path: Path):
    table = tmp_path / "normalizer.json"
    table.write_text('{"colours": "colors"}', encoding="utf-8")
    assert score(MIXED[40:41], num_resamples=0)["asr"]["wer"]["value"] == 0.25
    spelled = score(MIXED[40:41], num_resamples=0, normalizers=normalizers_from(spellings_path=str(table)))
    assert spelled["asr"]["wer"]["value"] == 0 and spelled["normalizer"] == {"whisper-en-v1": 1}


ANY = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("가나다 abc12.\u200b👍")), max_size=30
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(list(TASKS)), ANY, ANY, st.sampled_from(["", "ko", "en", "fr"])), max_size=6))
def test_metrics_of_any_texts_are_finite(rows: list[tuple[str, str, str, str]]):
    rows = [("asr", "네", "네", "ko"), *rows]
    metrics = score(
        [dict(zip(("task", "reference", "prediction", "language"), row, strict=True)) for row in rows], num_resamples=20
    )
    assert json.dumps(metrics, allow_nan=False)
    for row in rows:
        for task, text, _, language in (row, (row[0], unicodedata.normalize("NFD", row[1]), row[2], row[3])):
            same = {"task": task, "reference": text, "prediction": row[1], "language": language}
            entry = score([same], num_resamples=0)[task]
            assert entry.get("cer_nospace", {"value": 0})["value"] == 0
            assert task == "ast" or entry["exact_match"]["value"] == 1, "translations are scored by BLEU and chrF only"


def test_long_texts_are_fast():
    text = "가나다라마 바사아자 " * 1000
    rows = [{"task": task, "reference": text, "prediction": text[:-5]} for task in TASKS]
    rows.append({"task": "asr", "reference": "네", "prediction": "네 " * 5000})
    rows.append({"task": "asr", "reference": "(70%)/(칠십) " + text, "prediction": "칠십 " + text})
    start_sec = time.perf_counter()
    asr = score(rows, num_resamples=50)["asr"]
    assert asr["cer_best"]["value"] < asr["cer_nospace"]["value"]
    assert asr["repetition"]["value"] == 1 / 3 and time.perf_counter() - start_sec < 30


def test_rows_that_cannot_be_scored():
    with pytest.raises(RunError, match=r"row 2 \(b\): task is None"):
        score([MIXED[0], {"id": "b", "reference": "a", "prediction": "a"}])
    with pytest.raises(RunError, match=r"row 1 \(/x.jsonl:7\): prediction is missing"):
        score([{"task": "asr", "source": "/x.jsonl:7", "reference": "a"}])
    with pytest.raises(RunError, match="no prediction to score"):
        score([])


def test_table_shows_intervals_and_overall_metrics():
    with console.capture() as shown:
        console.print(metrics_table("title", score(MIXED, num_resamples=50)))
    text = shown.get()
    assert "95 %" in text and "overall" in text and "cer_nospace" in text and "normalizer" not in text
    assert "normalised by ko-v1, basic-v2, whisper-en-v1-nospelling" in text
    with console.capture() as shown:
        console.print(metrics_table("title", {"asr": {"cer": {"value": 0.25, "n": 3}}}))
    assert "0.2500" in shown.get() and "95 %" not in shown.get()
    with console.capture() as shown:
        console.print(metrics_table("title", score(transcripts(4), num_resamples=50)))
    assert "cer_nospace" in shown.get() and "overall" not in shown.get(), "of one task they repeat its scores"


def test_scoring_does_not_import_torch():
    """Predictions of any system can be scored on a machine without torch."""
    code = "import sys, voxray.evaluation.score as s; s.score([dict(task='asr', reference='a', prediction='a')])"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)
