"""Metrics of transcripts beyond error rates: kinds of edits, spacing, second readings, silence, loops, terms."""

import itertools
import random
import unicodedata

import jiwer
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from voxray.core.errors import RunError
from voxray.metrics.counts import as_row, compute_metrics, count
from voxray.metrics.loops import has_loop
from voxray.metrics.rows import check_row, count_row, row_readings
from voxray.metrics.second_readings import best_of_readings, spans
from voxray.metrics.terms import Terms
from voxray.text.normalize import KOREAN, normalize_ko_v1

texts = st.text(st.sampled_from("가나다라 각  abAB12"), max_size=20)


def row(reference: str, prediction: str, **more: object) -> dict[str, object]:
    return {"task": "asr", "language": "ko", "reference": reference, "prediction": prediction, **more}


def rates(*rows: dict[str, object]) -> dict[str, float]:
    names = ("cer_nospace", "swer", "cer_phonetic", "cer_best", "silence_hallucination", "repetition", "hallucination")
    metrics = compute_metrics("asr", [as_row(count_row(each)) for each in rows], names)
    return {name: entry["value"] for name, entry in metrics.items()}


@settings(deadline=None)
@given(texts, texts)
def test_kinds_of_edits_equal_jiwer(reference: str, prediction: str):
    ref, pred = normalize_ko_v1(reference), normalize_ko_v1(prediction)
    counts, words = count(reference, prediction), jiwer.process_words(ref, pred)
    assert (counts.word_sub, counts.word_del, counts.word_ins) == edits(words)
    solid = jiwer.process_characters(ref.replace(" ", ""), pred.replace(" ", ""))
    assert counts.solid_sub + counts.solid_del + counts.solid_ins == counts.solid_edits
    assert (counts.solid_sub, counts.solid_del, counts.solid_ins) == edits(solid)


def edits(output: jiwer.WordOutput | jiwer.CharacterOutput) -> tuple[int, int, int]:
    return output.substitutions, output.deletions, output.insertions


@pytest.mark.parametrize(
    ("reference", "prediction", "errors"),
    [
        ("흉부 엑스레이 찍어 봅시다", "흉부엑스레이 찍어봅시다", 0),
        ("흉부 엑스레이 찍어 봅시다", "흉 부 엑 스 레 이 찍어봅시다", 0),
        ("흉부 엑스레이 찍어 봅시다", "흉부엑스레이 찌거봅시다", 1),  # only the word with the error is wrong
        ("네 그렇습니다", "", 2),
        ("네", "네 아니요", 1),  # inserted words keep their own spacing
        ("네", "네아니요", 1),
        ("혈압이 높습니다", "혈앞이높습니다", 1),
    ],
)
def test_swer_ignores_spacing(reference: str, prediction: str, errors: int):
    assert count(reference, prediction).spaced_edits == errors


@settings(deadline=None)
@given(texts)
def test_spacing_alone_is_never_an_edit_in_swer(text: str):
    spaced = " ".join(normalize_ko_v1(text).replace(" ", ""))
    if " " in spaced:
        assert count(text, spaced).spaced_edits == 0 == count(spaced, text).spaced_edits


def naive_best(spelling: str, phonetic: str, prediction: str) -> tuple[int, int]:
    paths = ["".join(path) for path in itertools.product(*spans(spelling, phonetic))]
    num_edits, length = min((Levenshtein.distance(path, prediction), -len(path)) for path in paths)
    return num_edits, -length


@settings(deadline=None)
@given(texts, texts, texts)
def test_best_of_readings_equals_trying_all_paths(spelling: str, phonetic: str, prediction: str):
    spelling, phonetic = normalize_ko_v1(spelling), normalize_ko_v1(phonetic)
    solid = normalize_ko_v1(prediction).replace(" ", "")
    assert best_of_readings(spelling, phonetic, solid) == naive_best(spelling, phonetic, solid)
    assert "".join(choices[0] for choices in spans(spelling, phonetic)) == spelling.replace(" ", "")
    assert "".join(choices[-1] for choices in spans(spelling, phonetic)) == phonetic.replace(" ", "")


def test_dual_references():
    """The rate is 0 only if the reading may change within the sentence."""
    raw, prediction = "(70%)/(칠십 퍼센트) 확률로 (5mg)/(오 밀리그램)이에요", "70% 확률로 오 밀리그램이에요"
    readings = {"reference": "70% 확률로 5mg이에요", "reference_phonetic": "칠십 퍼센트 확률로 오 밀리그램이에요"}
    for metrics in (rates(row(raw, prediction)), rates({**row("", prediction), **readings})):
        assert metrics["cer_best"] == 0 and 0.2 < metrics["cer_phonetic"] < 0.5 and 0.3 < metrics["cer_nospace"] < 0.6
    plain, other = row("네", "네"), row(raw, "칠십 퍼센트 확률로 5mg이에요", transcript_phonetic=None)
    assert rates(plain, other)["cer_best"] == 0 and count_row(plain).two_readings == 0
    assert count_row(row("혈압 (120)/(80) 이고", "혈압 120 80 이고")).two_readings == 0, (
        "two numbers are not two readings"
    )
    neighbours = row("(5mg)/(오밀리그램) (70%)/(칠십퍼센트)", "5mg 칠십퍼센트")
    assert rates(neighbours)["cer_best"] == 0, "adjacent spans are independent"
    wrong = count_row(row(raw, "칠십 퍼센트 확률로 6mg이에요"))
    assert (wrong.best_edits, wrong.best_ref) == (1, len("칠십퍼센트확률로5mg이에요"))


def test_the_closest_of_several_references_is_used():
    several = {"references": ["아니요", "네 그렇습니다"], "reference": "아니요"}
    assert rates({**row("", "네 그렇습니다"), **several})["cer_nospace"] == 0
    answers = {"task": "tqa", "references": ["혈압", "고혈압 입니다"], "prediction": "고혈압입니"}
    assert count_row(answers).ref_units == 6
    assert count_row({**answers, "prediction": "혈압"}).exact == 1
    words = {"task": "tqa", "references": ["x y z d", "d"], "prediction": "a b c d"}
    assert count_row(words).ref_units == 1, "answers are compared by ROUGE-L, not by edits"
    assert count_row({**words, "task": "asr"}).solid_ref == 4


def test_predictions_for_empty_references():
    silent = [row("", "환각입니다"), row("...", ""), row("", "?!")]
    metrics = rates(row("네", "네"), *silent)
    assert metrics["cer_nospace"] == 0
    assert metrics["silence_hallucination"] == 1 / 3 and metrics["hallucination"] == 1 / 4
    assert "silence_hallucination" not in rates(row("네", "네"))


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("감사합니다" * 4, True),
        ("감사합니다" * 3, False),
        ("네" * 16, True),
        ("네" * 15, False),
        ("네 네 네 네 하하하하", False),
        ("오늘은 " + "구독과 좋아요 " * 4 + "끝", True),
        ("가나다라마바사아자차카타파하" * 2, False),
        ("", False),
        ("ab" * 5000, True),
    ],
)
def test_loops(text: str, loops: bool):
    assert has_loop(text.replace(" ", "")) is loops
    assert bool(count("아무 말", text).looped) is loops
    assert count(text, text).looped == 0, "the speaker repeats it too"


def naive_loop(text: str) -> bool:
    """Try every piece at every position; the last repetition may be incomplete."""
    for size in range(1, len(text) // 4 + 1):
        length = max(16, 4 * size)
        for start in range(len(text) - length + 1):
            repeated = text[start : start + size] * length
            if text[start : start + length] == repeated[:length]:
                return True
    return False


def test_has_loop_equals_trying_all_pieces():
    rng, seen = random.Random(0), set()
    for _ in range(2000):
        piece = "".join(rng.choices("가나다", k=rng.randint(1, 6))) * rng.randint(1, 8)
        text = "".join(rng.choices("가나다라", k=rng.randint(0, 9))) + piece + "".join(rng.choices("가나", k=3))
        assert has_loop(text) is naive_loop(text), text
        seen.add(has_loop(text))
    assert seen == {True, False}


def test_hallucination():
    assert rates(row("네", "네 그런데 오늘은 날씨가 참 좋네요"))["hallucination"] == 1
    assert rates(row("네", "네 네 네 네"))["hallucination"] == 0, "fewer than 10 inserted characters"
    assert rates(row("오늘은 날씨가 참 좋네요", "오늘은 날씨가 참 좋네요 그런데 내일은요"))["hallucination"] == 0


def test_terms():
    terms = Terms(["흉부 엑스레이", "혈압", "고혈압", "mg", "Tylenol", "36.5", "", "혈압 계", "  "], KOREAN)
    assert len(terms) == 7
    for text, counts in [
        ("흉부엑스레이, 흉부 엑스레이", {"흉부 엑스레이": 2}),
        ("고혈압과 혈압", {"고혈압": 1, "혈압": 1}),
        ("혈압계로 혈압을", {"혈압 계": 1, "혈압": 1}),
        ("5mg, 5 mg 그리고 omg mgs", {"mg": 2}),
        ("tylenol은 TYLENOL이고 tylenols는 아니다", {"Tylenol": 2}),
        ("체온 36.5도, 136.5", {"36.5": 1}),
        (unicodedata.normalize("NFD", "혈압"), {"혈압": 1}),
        ("", {}),
    ]:
        assert terms.count(text) == counts, text


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"task": "speech"}, "row 3: task is 'speech', not one of asr, sqa, tqa, aac, ast, chat, text_chat"),
        ({"prediction": None}, "row 3: prediction is missing, not text"),
        ({"reference": 5}, "row 3: reference is int, not text"),
        ({"references": "a"}, "row 3: references is str, not a list of texts"),
        ({"references": ["a", None]}, "row 3: references is missing, not text"),
        ({"language": 1}, "row 3: language is int, not text"),
    ],
)
def test_error_of_a_row_that_cannot_be_scored(broken: dict[str, object], message: str):
    with pytest.raises(RunError) as error:
        check_row({**row("a", "a"), **broken}, "row 3")
    assert str(error.value) == message


@pytest.mark.parametrize(("language", "num_readings"), [("en", 1), ("ko", 2), ("", 1)])
def test_brackets_are_two_readings_only_in_korean(language: str, num_readings: int):
    """A reference without language is Korean if it has Hangul."""
    readings = row_readings(row("(either)/(or) way", "", language=language))
    assert len(set(filter(None, readings))) == num_readings
    assert row_readings(row("(70%)/(칠십)", "", language="")) == ("70%", "칠십")
