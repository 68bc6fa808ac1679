"""Normaliser ko-v1: examples of medical Korean, and that normalising twice changes nothing."""

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from voxray.text.normalize import KO_V1, normalize_ko_v1

PAIRS = [
    ("", ""),
    (" \t\n\u3000 ", ""),
    ("혈압이 120/80 이고요.", "혈압이 120/80 이고요"),
    ("체온은 36.5℃", "체온은 36.5 c"),
    ("3,000 원", "3000 원"),
    ("1,234,567", "1234567"),
    ("1,2", "1 2"),
    ("1,2345", "1 2345"),
    ("3,000.5", "3000.5"),
    ("가,000", "가 000"),
    ("１２０／８０", "120/80"),
    ("３，０００", "3000"),
    ("５㎎/㎖", "5mg ml"),
    ("㎎", "mg"),
    ("70%", "70"),
    ("70%-80%", "70 80"),
    ("10-20", "10-20"),
    ("10:30", "10:30"),
    ("10~20", "10 20"),
    ("-5", "5"),
    ("3.", "3"),
    ("1..2", "1 2"),
    ("5 . 5", "5 5"),
    ("(그) 네, 네!", "그 네 네"),
    ("“따옴표” ‘작은’ …", "따옴표 작은"),
    ("A형 mmHg", "a형 mmhg"),
    ("가\u200b나\u200d다\ufeff라\u00ad", "가나다라"),
    ("좋아요 ❤️👍🏽", "좋아요"),
    ("1️⃣", "1\u20e3"),
    ("가\u3164나", "가나"),
    ("㈜", "주"),
    ("Ⅳ기", "iv기"),
    ("한   글\n두 줄", "한 글 두 줄"),
    (unicodedata.normalize("NFD", "흉부 엑스레이"), "흉부 엑스레이"),
    ("ᄀ\u200bᅡ", "가"),
    ("I\u0327\u0307", "i\u0327\u0307"),
]


@pytest.mark.parametrize(("raw", "normalized"), PAIRS)
def test_pairs(raw: str, normalized: str):
    assert normalize_ko_v1(raw) == normalized


@settings(deadline=None, max_examples=300)
@given(
    st.text(
        st.one_of(
            st.characters(exclude_categories=["Cs"]),
            st.sampled_from("가각각ㄳㅋ\u200b\u115f\ufe0f,.:/%-0123 ㎎℃ſİΣ\u0327\u0307\u00ad"),
        )
    )
)
@example("ᄀ\u200bᅡ")
@example("İ\u0327")
@example("1,2,345")
def test_twice_is_once(text: str):
    once = normalize_ko_v1(text)
    assert normalize_ko_v1(once) == once
    assert once == " ".join(once.split())
    assert once == unicodedata.normalize("NFC", once)


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3)))
def test_hangul_is_never_split(text: str):
    assert normalize_ko_v1(text) == text
    assert normalize_ko_v1(unicodedata.normalize("NFD", text)) == text


def test_the_version_in_results():
    assert KO_V1 == "ko-v1"  # changed rules need a new version
