"""Metrics from integer counts: equal to jiwer and rouge-score, computed from corpus sums, defined for empty texts."""

import unicodedata

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from voxray.metrics.counts import COUNT_NAMES, Counts, as_row, compute_metrics, count, rouge_units
from voxray.text.normalize import normalize_ko_v1

KOREAN = [
    ("혈압이 120/80 이고요", "혈압은 120/80 이고요"),
    ("흉부 엑스레이 찍어 봅시다.", "흉부엑스레이 찍어봅시다"),
    ("하루에 세 번 식후 30분에 드세요", "하루 세번 식후 삼십 분에 드세요"),
    ("네", "아니요 그렇지 않습니다"),
    ("체온은 36.5℃ 입니다", ""),
    ("3,000 mg", "3000mg"),
    ("타이레놀 500 mg", "Tylenol 500 mg"),
]

texts = st.text(st.sampled_from("가나다라마바 각값  abAB12.,/%!\u200b"), max_size=30)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=8)


def values(task: str, rows: list[tuple[str, str]]) -> dict[str, dict]:
    return compute_metrics(task, [as_row(count(reference, prediction)) for reference, prediction in rows])


def scored(rows: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """References that are not empty after normalisation, and their predictions."""
    normal = [(normalize_ko_v1(reference), normalize_ko_v1(prediction)) for reference, prediction in rows]
    not_empty = [pair for pair in normal if pair[0]]
    return [reference for reference, _ in not_empty], [prediction for _, prediction in not_empty]


def assert_equal_to_jiwer(rows: list[tuple[str, str]]) -> None:
    metrics = values("asr", rows)
    references, predictions = scored(rows)
    if not references:
        assert set(metrics) == {"exact_match"}
        return
    solid = [text.replace(" ", "") for text in references], [text.replace(" ", "") for text in predictions]
    assert metrics["cer"]["value"] == pytest.approx(jiwer.cer(references, predictions), abs=1e-12)
    assert metrics["cer_nospace"]["value"] == pytest.approx(jiwer.cer(*solid), abs=1e-12)
    assert metrics["wer"]["value"] == pytest.approx(jiwer.wer(references, predictions), abs=1e-12)
    assert {metrics[name]["n"] for name in ("cer", "cer_nospace", "wer")} == {len(references)}


def test_error_rates_equal_jiwer_on_korean():
    assert_equal_to_jiwer(KOREAN)
    for pair in KOREAN:
        assert_equal_to_jiwer([pair])


@settings(deadline=None)
@given(pairs)
def test_error_rates_equal_jiwer(rows: list[tuple[str, str]]):
    assert_equal_to_jiwer(rows)


class Units:
    """``rouge_units`` as a tokenizer of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return rouge_units(normalize_ko_v1(text))


def assert_equal_to_rouge_score(rows: list[tuple[str, str]]) -> None:
    scorer = RougeScorer(["rougeL"], tokenizer=Units())
    expected = []
    for reference, prediction in rows:
        both_empty = not Units().tokenize(reference) and not Units().tokenize(prediction)
        # rouge-score gives 0 to two empty texts; to voxray they are equal
        expected.append(1.0 if both_empty else scorer.score(reference, prediction)["rougeL"].fmeasure)
    rouge_l = values("sqa", rows)["rouge_l"]
    assert rouge_l["value"] == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    assert rouge_l["n"] == len(rows)


def test_rouge_l_equals_rouge_score_on_korean():
    assert_equal_to_rouge_score(KOREAN)
    for pair in KOREAN:
        assert_equal_to_rouge_score([pair])


@settings(deadline=None)
@given(pairs)
def test_rouge_l_equals_rouge_score(rows: list[tuple[str, str]]):
    assert_equal_to_rouge_score(rows)


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("", []),
        ("혈압 120/80", ["혈", "압", "120/80"]),
        ("bp 36.5 mmhg입니다", ["bp", "36.5", "mmhg", "입", "니", "다"]),
        ("covid 19", ["covid", "19"]),
    ],
)
def test_units(text: str, units: list[str]):
    assert rouge_units(text) == units


def test_counts_of_one_pair():
    assert count("흉부 엑스레이 a", "흉부엑스레이 b") == Counts(
        char_edits=2,
        char_ref=9,
        solid_edits=1,
        solid_ref=7,
        solid_sub=1,
        solid_del=0,
        solid_ins=0,
        solid_pred=7,
        solid_common=6,
        word_edits=3,
        word_ref=3,
        word_sub=2,
        word_del=1,
        word_ins=0,
        spaced_edits=1,
        phonetic_edits=1,
        phonetic_ref=7,
        best_edits=1,
        best_ref=7,
        two_readings=0,
        lcs_units=6,
        pred_units=7,
        ref_units=7,
        top_lcs_units=6,
        exact=0,
        looped=0,
    )
    assert tuple(as_row(count("a", "a"))) == COUNT_NAMES


def test_cer_counts_spaces_and_cer_nospace_does_not():
    metrics = values("asr", [("흉부 엑스레이", "흉부엑스레이")])
    assert metrics["cer"]["value"] == 1 / 7 and metrics["cer_nospace"]["value"] == 0
    assert metrics["wer"]["value"] == 1 and metrics["exact_match"]["value"] == 0


def test_rates_are_computed_from_sums_and_not_averaged():
    rows = [("가", "나다"), ("가나다라마바사아자", "가나다라마바사아자")]
    metrics = values("asr", rows)
    assert metrics["cer"] == {"value": 2 / 10, "n": 2}
    assert metrics["wer"] == {"value": 1 / 2, "n": 2}


@settings(deadline=None)
@given(pairs, st.integers(0, 8))
def test_counts_add_up_over_shards(rows: list[tuple[str, str]], cut: int):
    counted = [as_row(count(*pair)) for pair in rows]
    total = {name: sum(row[name] for row in counted) for name in COUNT_NAMES}
    halves = [counted[:cut], counted[cut:]]
    assert {name: sum(sum(row[name] for row in half) for half in halves) for name in COUNT_NAMES} == total
    assert compute_metrics("asr", iter(counted)) == compute_metrics("asr", counted)
    assert all(isinstance(value, int) and value >= 0 for row in counted for value in row.values())


@pytest.mark.parametrize("empty", ["", "   ", "\t\n", "...!?", "\u200b", "\u3000", "\u3164"])
def test_an_empty_reference_has_no_error_rate(empty: str):
    metrics = values("asr", [(empty, "환각입니다"), ("네", "네"), (empty, "")])
    assert metrics["cer"] == metrics["cer_nospace"] == metrics["wer"] == metrics["swer"] == {"value": 0.0, "n": 1}
    assert metrics["exact_match"] == {"value": 2 / 3, "n": 3}
    assert set(values("asr", [(empty, "환각")])) == {"exact_match"}


@pytest.mark.parametrize("empty", ["", "  ", "?!"])
def test_an_empty_prediction_has_error_rates_of_1(empty: str):
    metrics = values("asr", [("안녕 하세요", empty)])
    rates = {"cer": 1, "cer_nospace": 1, "wer": 1, "swer": 1}
    assert {name: metrics[name]["value"] for name in metrics} == {**rates, "exact_match": 0}
    assert values("sqa", [("안녕", empty)])["rouge_l"]["value"] == 0


def test_two_empty_texts_are_equal():
    assert values("sqa", [("", "")]) == {"rouge_l": {"value": 1.0, "n": 1}, "exact_match": {"value": 1.0, "n": 1}}


def test_no_rows_no_metrics():
    assert compute_metrics("asr", []) == compute_metrics("tqa", []) == {}


def test_the_headline_metric_comes_first():
    assert list(values("asr", [("a", "a")])) == ["cer_nospace", "cer", "wer", "swer", "exact_match"]
    assert list(values("tqa", [("a", "a")])) == ["rouge_l", "exact_match"]
    assert list(values("aac", [("a", "a")])) == ["rouge_l", "exact_match"], "CIDEr-D is not computed from counts"


def test_composed_and_decomposed_texts_are_equal():
    text = "흉부 엑스레이를 찍었습니다"
    assert values("asr", [(text, unicodedata.normalize("NFD", text))])["cer"]["value"] == 0
    assert count(unicodedata.normalize("NFD", text), text) == count(text, text)


@pytest.mark.parametrize("emoji", ["👍", "👍🏽", "❤️", "👨‍👩‍👧", "🇰🇷", "✅"])
def test_emoji_are_ignored_like_punctuation(emoji: str):
    assert count("좋아요", f"좋아요 {emoji}") == count("좋아요", "좋아요")
    assert count(emoji, "").char_ref == 0


def test_long_texts():
    text = "가나다라마 바사아자 " * 1000
    normalized = normalize_ko_v1(text)
    same, other = count(text, text), count(text, "하" * 10_000)
    assert (same.char_edits, same.char_ref, same.exact, same.lcs_units) == (0, len(normalized), 1, same.ref_units)
    assert other.char_edits == other.char_ref == len(normalized) == 10_999
    assert (other.word_ref, other.word_edits, other.lcs_units, other.pred_units) == (2000, 2000, 0, 10_000)
    changed = count(text, text.replace("마 바", "마 파", 500))
    assert (changed.char_edits, changed.solid_edits, changed.word_edits) == (500, 500, 500)
    assert changed.lcs_units == changed.ref_units - 500
    words = values("sqa", [("a b " * 2500, "a c " * 2500)])["rouge_l"]
    assert words["value"] == 0.5
