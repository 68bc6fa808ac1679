"""Metrics of free text against sacrebleu and naive implementations; aggregates over tasks against sums by hand."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from voxray.core.tasks import TASKS
from voxray.evaluation.score import score
from voxray.metrics.counts import as_row, compute_metrics, count
from voxray.metrics.names import headline, higher_is_better, validation_metrics
from voxray.metrics.ngrams import _bleu, script_tokenizer
from voxray.metrics.overall import likelihood_metrics, overall_metrics
from voxray.metrics.texts import score_texts, text_metrics
from voxray.text.normalize import normalize_ko_v1

KOREAN = [
    ("혈압이 120/80 이고요", "혈압은 120/80 이고요"),
    ("흉부 엑스레이 찍어 봅시다.", "흉부엑스레이 찍어봅시다"),
    ("하루에 세 번 식후 30분에 드세요", "하루 세번 식후 삼십 분에 드세요"),
    ("네", "아니요 그렇지 않습니다"),
    ("타이레놀 500 mg", "Tylenol 500 mg"),
]
texts = st.text(st.sampled_from("가나다라 각값 ab12.%"), max_size=20)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=6)


def values(rows: list[tuple[str, str]], task: str = "sqa") -> dict[str, float]:
    return {name: entry["value"] for name, entry in text_metrics(task, rows).items()}


def char_f1(rows: list[tuple[str, str]]) -> float:
    return compute_metrics("sqa", [as_row(count(*pair)) for pair in rows], ("char_f1",))["char_f1"]["value"]


def naive_distinct(predictions: list[str], size: int) -> float:
    """For text without Latin letters and digits, in which every unit is a character."""
    seen, total = [], 0
    for text in predictions:
        chars = [char for char in normalize_ko_v1(text) if char != " "]
        for start in range(len(chars) - size + 1):
            total += 1
            if chars[start : start + size] not in seen:
                seen.append(chars[start : start + size])
    return len(seen) / total


def korquad_f1(reference: str, prediction: str) -> float:
    """Precision and recall by removing matching characters one by one."""
    remaining, predicted, num_matches = list(reference.replace(" ", "")), list(prediction.replace(" ", "")), 0
    for char in predicted:
        if char in remaining:
            remaining.remove(char)
            num_matches += 1
    if not num_matches:
        return 0.0
    precision, recall = num_matches / len(predicted), num_matches / len(reference.replace(" ", ""))
    return 2 * precision * recall / (precision + recall)


def corpus_score(
    metric: BLEU | CHRF,
    rows: list[tuple[list[str], str]],
    normalize: Callable[[str], str] = normalize_ko_v1,
    **options: int,
) -> Any:
    """The corpus score of sacrebleu. Rows with fewer references than others are padded with None."""
    normal = [(list(map(normalize, references)), normalize(prediction)) for references, prediction in rows]
    streams = list(itertools.zip_longest(*(references for references, _ in normal)))
    return metric.corpus_score([prediction for _, prediction in normal], streams, **options)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), texts), min_size=1, max_size=5), st.randoms())
def test_bleu_and_chrf_equal_sacrebleu_to_the_last_digit(rows: list[tuple[list[str], str]], rng: random.Random):
    """With equal or different numbers of references per row; for the whole set and for a bootstrap draw."""
    summed, _, signatures = score_texts("sqa", rows)
    draw = [rng.randrange(len(rows)) for _ in rows]
    for name, metric in (("bleu", BLEU(tokenize="char")), ("chrf", CHRF())):
        assert summed[name].value == corpus_score(metric, rows).score
        assert signatures[name] == f"{metric.get_signature().format()}|norm:ko-v1"
        values = summed[name].from_sums(summed[name].columns[draw].sum(axis=0, keepdims=True))
        assert values[0] == corpus_score(metric, [rows[index] for index in draw]).score


def test_intervals_of_bleu_and_chrf_are_as_wide_as_sacrebleus():
    """sacrebleu's own bootstrap reports the mean of the draws and half the width of the interval."""
    rng = random.Random(0)
    rows = [
        {"task": "tqa", "reference": "".join(chars), "prediction": "".join(rng.choices([*chars, "x"], k=12))}
        for chars in (rng.choices("가나다라마바사", k=rng.randint(4, 20)) for _ in range(150))
    ]
    metrics = score(rows, num_resamples=2000)["tqa"]
    for name, metric in (("bleu", BLEU(tokenize="char")), ("chrf", CHRF())):
        expected = corpus_score(metric, [([row["reference"]], row["prediction"]) for row in rows], n_bootstrap=1000)
        low, high = metrics[name]["low"], metrics[name]["high"]
        assert (high - low) / 2 == pytest.approx(float(expected._ci), rel=0.15)
        assert (high + low) / 2 == pytest.approx(float(expected._mean), abs=0.3 * float(expected._ci))


ALPHABETS = {"13a": "Thé cat-3.5,'&amp; \n\t", "zh": "中文字，。A b3.5", "char": "가나다 かなไทA b.\u3000"}
SCRIPTS = {"13a": "Before", "zh": "中文", "char": "한글"}
"""Text before each reference of the tests below, which decides its script."""


@pytest.mark.parametrize("tokenizer", ALPHABETS)
@settings(deadline=None, max_examples=40)
@given(st.data(), st.randoms())
def test_translations_equal_sacrebleu_on_raw_text(tokenizer: str, data: st.DataObject, rng: random.Random):
    """To the last digit, for the whole set and for a bootstrap draw; predictions may be empty."""
    text = st.text(st.sampled_from(ALPHABETS[tokenizer]), max_size=25)
    reference = text.map(lambda rest: SCRIPTS[tokenizer] * 5 + rest)
    prediction = st.one_of(reference, text)
    rows = data.draw(
        st.lists(st.tuples(st.lists(reference, min_size=1, max_size=3), prediction), min_size=1, max_size=5)
    )
    summed, distinct, signatures = score_texts("ast", rows)
    assert set(summed) == {"bleu", "chrf"} == set(signatures) and not distinct
    draw = [rng.randrange(len(rows)) for _ in rows]
    for name, metric in (("bleu", BLEU(tokenize=tokenizer)), ("chrf", CHRF())):
        assert summed[name].value == corpus_score(metric, rows, str).score
        assert signatures[name] == metric.get_signature().format()
        drawn = summed[name].select(np.array(draw))
        assert drawn.value == corpus_score(metric, [rows[index] for index in draw], str).score


def test_case_and_punctuation_of_translations_count():
    rows = [("The blood pressure is high.", "the blood pressure is high"), ("No.", "No.")]
    assert values(rows, "sqa")["bleu"] == pytest.approx(100) and values(rows, "ast")["bleu"] < 70
    assert values([("Yes, it is high.", "Yes, it is high.")], "ast") == pytest.approx({"bleu": 100, "chrf": 100})
    assert values([("Yes.", "")], "ast") == {"bleu": 0, "chrf": 0}


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("", "13a"),
        ("120/80", "13a"),
        ("The blood pressure is high.", "13a"),
        ("Привет, как дела?", "13a"),
        ("नमस्ते, आप कैसे हैं?", "13a"),
        ("血压很高。", "zh"),
        ("MRI 检查", "zh"),
        ("血圧が高いです。", "char"),
        ("ＭＲＩカタカナ", "char"),
        ("혈압이 높습니다.", "char"),
        ("MRI 검사", "char"),
        ("ความดันสูง", "char"),
        ("ຄວາມດັນ", "char"),
        ("សម្ពាធឈាម", "char"),
        ("သွေးပေါင်", "char"),
        ("The word 안녕 means hello in Korean.", "13a"),
        ("Li·Ming・Wang", "13a"),
    ],
)
def test_the_tokenizer_follows_from_the_script(text: str, tokenizer: str):
    assert script_tokenizer(text) == tokenizer


def test_rows_of_several_scripts_sum_their_ngrams():
    rows = [
        (["The blood pressure is too high today."], "The blood pressure is high today."),
        (["혈압이 오늘 너무 높습니다."], "혈압이 오늘 높습니다."),
        (["今天血压太高了。"], "今天血压很高。"),
    ]
    tokenizers = [script_tokenizer(references[0]) for references, _ in rows]
    assert tokenizers == ["13a", "char", "zh"]
    summed, _, signatures = score_texts("ast", rows)
    assert "|tok:13a+char+zh|" in signatures["bleu"]
    of_rows = [corpus_score(BLEU(tokenize=name), [row], str) for name, row in zip(tokenizers, rows, strict=True)]
    counts = [sum(column) for column in zip(*(each.counts for each in of_rows), strict=True)]
    totals = [sum(column) for column in zip(*(each.totals for each in of_rows), strict=True)]
    lengths = [sum(getattr(each, name) for each in of_rows) for name in ("sys_len", "ref_len")]
    assert summed["bleu"].value == BLEU.compute_bleu(counts, totals, *lengths, smooth_method="exp").score
    assert 20 < summed["bleu"].value < 80


def test_bleu_of_many_sums_equals_sacrebleus():
    """With orders that have no match, no n-gram, or nothing at all."""
    rng = np.random.default_rng(0)
    totals = np.sort(rng.integers(0, 60, (3000, 4)), axis=1)[:, ::-1]
    matches = np.where(rng.random((3000, 4)) < 0.2, 0, rng.integers(0, totals + 1))
    lengths = np.stack([totals[:, 0], np.maximum(totals[:, 0] + rng.integers(-30, 40, 3000), 0)], axis=1)
    sums = np.concatenate([lengths, matches, totals], axis=1)
    expected = [
        BLEU.compute_bleu(row[2:6], row[6:], row[0], row[1], smooth_method="exp").score for row in sums.tolist()
    ]
    assert _bleu(sums.astype(float)).tolist() == expected
    assert 0 < sum(value == 0 for value in expected) < 2000 and max(expected) > 50


def test_translations_have_intervals_slices_and_a_score():
    rng = random.Random(0)
    words = ["the", "patient", "has", "had", "a", "high", "fever", "and", "a", "cough", "since", "last", "night"]
    rows = []
    for number in range(60):
        reference = rng.choices(words, k=8)
        prediction = [word if rng.random() < 0.8 else "pain" for word in reference]
        row = {"reference": " ".join(reference), "prediction": " ".join(prediction), "domain": "ab"[number % 2]}
        rows.append({"task": "ast", **row, "speaker": f"s{number % 8}"})
    metrics = score(rows, num_resamples=500)
    bleu = metrics["ast"]["bleu"]
    assert set(metrics["ast"]) == {"bleu", "chrf", "repetition", "hallucination"}
    assert bleu["low"] < bleu["value"] < bleu["high"] and bleu["n"] == 60
    assert metrics["overall"]["macro"]["value"] == bleu["value"] / 100 and metrics["normalizer"] == {"none": 60}
    assert metrics["overall"]["macro"]["low"] == pytest.approx(bleu["low"] / 100)
    part = metrics["slices"]["ast"]["domain"]["a"]
    assert part["bleu"]["value"] == score(rows[::2], num_resamples=0)["ast"]["bleu"]["value"]
    assert part["bleu"]["low"] < part["bleu"]["value"] < part["bleu"]["high"] and part["chrf"]["n"] == 30
    speakers = metrics["slices"]["ast"]["speaker"]
    assert speakers["best"][0]["bleu"] > speakers["worst"][0]["bleu"]


def test_bleu_of_a_corpus_is_not_a_mean():
    corpus_bleu, row_bleus = values(KOREAN)["bleu"], [values([pair])["bleu"] for pair in KOREAN]
    assert 0 < corpus_bleu < 100 and abs(corpus_bleu - sum(row_bleus) / len(row_bleus)) > 1
    assert values([(text, text) for text, _ in KOREAN])["bleu"] == pytest.approx(100)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.sampled_from("가나다라마 "), min_size=2, max_size=20), min_size=1, max_size=5))
def test_distinct_counts_different_ngrams(predictions: list[str]):
    metrics = text_metrics("tqa", [("", text) for text in predictions])
    for size in (1, 2):
        num_ngrams = sum(max(0, len(text.replace(" ", "")) - size + 1) for text in predictions)
        if num_ngrams:
            assert metrics[f"distinct_{size}"]["value"] == pytest.approx(naive_distinct(predictions, size))
            assert metrics[f"distinct_{size}"]["n"] == num_ngrams
        else:
            assert f"distinct_{size}" not in metrics


def test_distinct_counts_latin_words_over_the_whole_set():
    assert values([("", "take two pills, take two more")])["distinct_1"] == 4 / 6
    assert values([("", "네 네"), ("", "네 네")]) == pytest.approx(
        {"bleu": 0, "chrf": 0, "distinct_1": 1 / 4, "distinct_2": 1 / 2}
    )
    assert values([("네", "")]) == {"bleu": 0, "chrf": 0}, "an empty answer has no n-gram"


@settings(deadline=None, max_examples=50)
@given(pairs)
def test_char_f1_equals_korquad(rows: list[tuple[str, str]]):
    normal = [tuple(map(normalize_ko_v1, pair)) for pair in rows]
    expected = [1.0 if not "".join(pair).strip() else korquad_f1(*pair) for pair in normal]
    assert char_f1(rows) == pytest.approx(sum(expected) / len(expected))


def test_transcription_has_no_text_metrics():
    assert text_metrics("asr", KOREAN) == {} == text_metrics("tqa", [])


def test_aggregates_over_tasks():
    values = {"asr/cer_nospace": 0.25, "asr/cer": 0.5, "sqa/rouge_l": 0.6, "tqa/rouge_l": 0.3}
    assert overall_metrics(values, {"asr": 10, "sqa": 10, "tqa": 80}) == pytest.approx(
        {
            "overall/macro": (0.75 + 0.6 + 0.3) / 3,
            "overall/weighted": 0.1 * 0.75 + 0.1 * 0.6 + 0.8 * 0.3,
            "overall/balance": 0.3 / 0.75,
        }
    )
    assert overall_metrics({"ast/bleu": 40.0, "sqa/rouge_l": 0.5}, {"ast": 1, "sqa": 1})["overall/macro"] == 0.45
    looping = overall_metrics({"asr/cer_nospace": 7.0, "sqa/rouge_l": 0.5}, {"asr": 1, "sqa": 3, "tqa": 0})
    assert looping == {"overall/macro": 0.25, "overall/weighted": 0.375, "overall/balance": 0}
    assert overall_metrics({"asr/cer_nospace": 2.0}, {"asr": 5})["overall/balance"] == 0
    assert overall_metrics({"asr/exact_match": 1.0}, {"asr": 5}) == {} == overall_metrics({}, {})


def test_perplexity_is_weighted_by_tokens_and_finite():
    assert likelihood_metrics(6.0, 4) == pytest.approx({"loss": 1.5, "perplexity": 4.481689})
    assert likelihood_metrics(float("nan"), 4) == {} == likelihood_metrics(0.0, 0)
    assert likelihood_metrics(1e6, 1) == {"loss": 1e6}, "exp(loss) overflows"


def test_every_metric_is_higher_or_lower_is_better():
    lower = {key for key in validation_metrics() if not higher_is_better(key)}
    assert {key.partition("/")[2] for key in lower} == {"cer_nospace", "cer", "wer", "swer", "loss", "perplexity"}
    faults = ("cer_best", "cer_phonetic", "silence_hallucination", "repetition", "asr/hallucination")
    assert not any(map(higher_is_better, faults))
    assert all(map(higher_is_better, ("term_recall", "aac/cider_d", "spider", "bleu_4", "chrf", "tqa/distinct_2")))
    assert higher_is_better("overall/macro") and higher_is_better("sqa/bleu") and higher_is_better("rouge_l")
    assert not higher_is_better("tqa/perplexity") and not higher_is_better("cer")
    assert [headline(task) for task in TASKS] == ["cer_nospace", *["rouge_l"] * 3, "bleu", *["rouge_l"] * 2]
    for unknown in ("asr/speed", "nobody/cer", "overall/cer", "asr/macro", "asr/rouge_l", "sqa/cider_d", ""):
        with pytest.raises(ValueError, match="unknown metric"):
            higher_is_better(unknown)
