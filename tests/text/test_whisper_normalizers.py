"""Normalisers of transcripts in other languages: basic-v2 and those of transformers, for any text."""

import json
import math
import pickle
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from voxray.core.errors import RunError
from voxray.metrics.counts import count
from voxray.metrics.rows import count_row
from voxray.text.normalize import (
    BASIC,
    BASIC_OF_WHISPER,
    ENGLISH,
    KOREAN,
    Normalizers,
    english_with,
    normalizers_from,
)

SENTENCES = [
    "Mr. Smith can't pay $20 million [laughs] (um) by the 5th of June!",
    "twenty one point five percent, and a half",
    "Größe: 36,5 °C – naïve café",
    "120/80 colour",
    "",
]
ALL = [KOREAN, BASIC, BASIC_OF_WHISPER, ENGLISH]
ANY = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aeinot one hundred 0159.%$'£ ")))


@pytest.mark.parametrize("text", SENTENCES)
def test_they_agree_with_transformers(text: str):
    assert BASIC_OF_WHISPER.normalize(text) == " ".join(BasicTextNormalizer()(text).split())
    assert ENGLISH.normalize(text) == " ".join(EnglishTextNormalizer({})(text).split())


def test_the_language_selects_the_normalizer():
    for name in ("basic-v2", "whisper-basic-v1"):
        names = [normalizers_from(name).select(language).name for language in ("", "ko", "en", "de", "hi")]
        assert names == ["ko-v1", "ko-v1", "whisper-en-v1-nospelling", name, name]
    assert Normalizers() == normalizers_from()
    assert KOREAN.normalize("twenty") == "twenty" and ENGLISH.normalize("twenty") == "20"


@pytest.mark.parametrize(
    ("language", "reference", "prediction", "characters", "words", "of_whisper"),
    [
        ("hi", "पानी में", "पाना मे।", (2, 7), (2, 2), (0, 3)),  # ी -> ा, ं lost: Whisper's rules drop both
        ("ta", "வணக்கம் நண்பா", "வணக்கம், நண்பர்", (2, 12), (1, 2), (1, 8)),
        ("th", "น้ำเย็น", "นาเย็น", (2, 8), (1, 1), (0, 5)),  # NFKC writes ำ as two characters
        ("ar", "كَتَبَ الدرس", "كُتِبَ الدرس؟", (2, 11), (1, 2), (0, 8)),
        ("ko", "혈압이 120/80, 네.", "혈압은 120/80 네", (1, 10), (1, 3), (1, 10)),
        ("fr", "L'été, [bruit] déjà !", "l'ete deja", (4, 8), (2, 3), (4, 8)),
    ],
)
def test_combining_marks_count(language, reference, prediction, characters, words, of_whisper):
    """Edits and lengths worked out by hand."""
    row = {"task": "asr", "language": language, "reference": reference, "prediction": prediction}
    counts = count_row(row)
    assert (counts.solid_edits, counts.solid_ref) == characters and (counts.word_edits, counts.word_ref) == words
    counts = count_row(row, normalizers_from("whisper-basic-v1"))
    assert (counts.solid_edits, counts.solid_ref) == of_whisper


@settings(deadline=None, max_examples=300)
@given(ANY)
@example("ﷺ ⑴ ㈱ (a) [b] <c ﬁ ǅ İ")
def test_basic_v2_differs_from_whispers_rules_on_marks_only(text: str):
    once = BASIC.normalize(text)
    assert BASIC.normalize(once) == once
    if not any(unicodedata.category(char)[0] == "M" for char in unicodedata.normalize("NFKC", text.lower()).lower()):
        assert once == BASIC_OF_WHISPER.normalize(text)


def test_spellings_come_from_a_checkpoints_file(tmp_path: Path):
    table = tmp_path / "normalizer.json"
    table.write_text(json.dumps({"colour": "color"}), encoding="utf-8")
    english = english_with(table)
    assert english.name == "whisper-en-v1" and english.normalize("Colours, the colour") == "colours the color"
    assert ENGLISH.normalize("the colour") == "the colour"
    normalizers = normalizers_from(spellings_path=str(table))
    assert normalizers.select("en").name == "whisper-en-v1" and normalizers.select("fr") is BASIC
    for content in ("[]", '{"a": 1}', "{"):
        table.write_text(content, encoding="utf-8")
        with pytest.raises(RunError, match=r"normalizer.json: (no|cannot read the) table of spellings"):
            english_with(table)
    with pytest.raises(RunError, match="cannot read the table"):
        english_with(tmp_path / "nowhere.json")


@settings(deadline=None, max_examples=200)
@given(ANY)
@example("9" * 5000)
@example("$1 and a half oh o'clock 1.2.3 ½ ² ٣ Ⅳ")
@example("👨‍👩‍👧 ❤️\u200b")
def test_any_text_is_accepted(text: str):
    for normalizer in (BASIC, BASIC_OF_WHISPER, ENGLISH):
        once = normalizer.normalize(text)
        assert once == " ".join(once.split())
        assert not any(unicodedata.category(char) == "Cf" for char in once)
        composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert count(composed, decomposed, normalizer).solid_ref == count(composed, composed, normalizer).solid_ref


@pytest.mark.parametrize("normalizer", ALL, ids=lambda normalizer: normalizer.name)
@pytest.mark.parametrize("text", ["", "   \t\n\u3000", "👍🏽", "👨‍👩‍👧", "\u200b\ufeff", "...", "-"])
def test_texts_without_words_are_empty(text: str, normalizer):
    counts = count(text, text, normalizer)
    assert normalizer.normalize(text) == "" and counts.exact == 1 and counts.char_ref == counts.solid_ref == 0


@pytest.mark.parametrize("normalizer", ALL, ids=lambda normalizer: normalizer.name)
def test_long_texts_and_other_forms(normalizer):
    text = "the quick 갈색 여우 jumps " * 500
    counts = count(text, unicodedata.normalize("NFD", text), normalizer)
    assert counts.exact == 1 and counts.char_edits == 0 and math.isclose(counts.char_ref, 11_000, rel_tol=0.2)
    other = count("a" * 10_000, "b" * 10_000, normalizer)
    assert other.solid_edits == other.solid_sub == 10_000 and other.word_edits == other.spaced_edits == 1


def test_a_normalizer_can_be_pickled(tmp_path: Path):
    """The actors of an evaluation receive it."""
    table = tmp_path / "normalizer.json"
    table.write_text('{"colour": "color"}', encoding="utf-8")
    for normalizer in (*ALL, english_with(table)):
        copy = pickle.loads(pickle.dumps(normalizer))
        assert copy.normalize("My COLOUR, twenty") == normalizer.normalize("My COLOUR, twenty")
