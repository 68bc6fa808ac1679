"""Codes of languages: every way to write a language gives one code, and unknown ones are refused with a suggestion."""

import pycountry
import pytest
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from voxray.core.errors import BadRow
from voxray.core.languages import LANGUAGE_CODES, LANGUAGE_NAMES, check_language, language_code, language_name


def test_the_table_is_whispers():
    """Whisper writes Javanese as jw; its names, and the older names that it accepts, are known too."""
    assert {("jw" if code == "jv" else code): name for code, name in LANGUAGE_NAMES.items()} == LANGUAGES
    assert all(language_code(name) == language_code(code) for name, code in TO_LANGUAGE_CODE.items())


def test_the_codes_are_those_of_iso_639():
    two_letters = {language.alpha_2 for language in pycountry.languages if hasattr(language, "alpha_2")}
    assert two_letters - LANGUAGE_CODES == {"kr", "nb", "sh"} and LANGUAGE_CODES - two_letters == {"yue", "haw"}
    for language in filter(lambda language: hasattr(language, "alpha_2"), pycountry.languages):
        if language.alpha_2 in LANGUAGE_NAMES:
            assert language_code(language.alpha_3) == language.alpha_2


@pytest.mark.parametrize(
    ("code", "forms"),
    [
        ("", (None, "", " auto ")),
        ("ko", ("ko", "KO", "ko-KR", "ko_kr", "Korean", "kor", " korean ")),
        ("no", ("no", "nb", "nb-NO", "nob", "Norwegian")),
        ("jv", ("jv", "jw", "Javanese")),
        ("zh", ("zh-Hans", "zh_CN", "cmn", "Mandarin", "chi")),
        ("pt", ("pt_BR", "Portuguese")),
        ("yue", ("yue", "yue-HK", "Cantonese")),
        ("haw", ("haw", "Hawaiian")),
        ("ht", ("Haitian Creole", "ht")),
        ("ga", ("ga", "ga-IE")),
    ],
)
def test_one_language_has_one_code(code: str, forms: tuple[str | None, ...]):
    assert {language_code(form) for form in forms} == {code}


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("kr", r"did you mean 'ko' \(korean\)\?"),
        ("jp", "did you mean 'ja'"),
        ("Koreen", "did you mean 'ko'"),
        ("kab", "write a two-letter code of ISO 639-1, haw, yue, or an English name such as Korean"),
        ("한국어", "write a two-letter code"),
        ("xx", "write a two-letter code"),
    ],
)
def test_an_unknown_language_is_refused(value: str, hint: str):
    with pytest.raises(BadRow, match=f"language '{value}' is not known; {hint}") as error:
        language_code(value)
    assert error.value.reason == "bad_language"


@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("", (None, "", "auto")),
        ("Korean", ("ko", "KO-kr", "kor", "korean")),
        ("Haitian Creole", ("ht", "Haitian")),
        ("Javanese", ("jw",)),
        ("Irish", ("ga", "Irish")),
        ("Scottish Gaelic", ("gd-GB",)),
        ("Chinese", ("zh-Hant",)),
    ],
)
def test_english_names(name: str, forms: tuple[str | None, ...]):
    assert {language_name(form) for form in forms} == {name}


def test_every_language_has_a_name_that_is_read_as_the_language():
    names = {code: language_name(code) for code in LANGUAGE_CODES}
    assert all(name and language_code(name) == code for code, name in names.items())


def test_a_model_without_the_language_is_named_with_its_languages():
    check_language("fr", None, "base")
    check_language("", frozenset({"en"}), "base")
    with pytest.raises(BadRow, match="language 'fr' is none of the 2 that base has: en, ko"):
        check_language("fr", frozenset({"ko", "en"}), "base")
