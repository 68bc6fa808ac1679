"""Text normalisation before scoring. It changes error rates by points, so results name the version used.

``ko-v1`` is for Korean and for all texts other than transcripts and translations. English transcripts use Whisper's
English normaliser from transformers, as its papers and leaderboards do. Transcripts in other languages use
``basic-v2``, or on request ``whisper-basic-v1``, which Whisper's papers and leaderboards use. ``Normalizers`` selects
by language. Translations keep case and punctuation (``none``), as sacrebleu scores them.

The two differ on combining marks only. Whisper's rules replace them by spaces, which deletes the vowels of Hindi, Tamil
or Thai and cuts their words. A text without such marks is the same by both rules, so no list of scripts is needed.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from voxray.core.errors import RunError
from voxray.core.manifest import open_regular

NONE = "none"
KO_V1 = "ko-v1"
BASIC_V2 = "basic-v2"
WHISPER_BASIC = "whisper-basic-v1"
WHISPER_EN = "whisper-en-v1"
WHISPER_EN_PLAIN = "whisper-en-v1-nospelling"
"""Whisper's English rules without its table of British and American spellings, which only its checkpoints carry."""

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_INVISIBLE = re.compile("[\u115f\u1160\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # Hangul fillers, variation selectors
_BRACKETED, _IN_PARENTHESES = re.compile(r"[<\[][^>\]]*[>\]]"), re.compile(r"\([^)]+\)")
_INNER = re.compile(r"((?<=\d)[./:%-](?=\d))")


class _TranslationTable(dict[int, int | str | None]):
    """A table for ``str.translate`` that is filled as characters occur: Unicode has a million.

    Args:
        matches: Whether to replace a character.
        replacement: Its replacement; None removes it.
    """

    def __init__(self, matches: Callable[[str], object], replacement: str | None) -> None:
        super().__init__()
        self._matches, self._replacement = matches, replacement

    def __missing__(self, code: int) -> int | str | None:
        self[code] = self._replacement if self._matches(chr(code)) else code
        return self[code]


_REMOVE_INVISIBLE = _TranslationTable(lambda char: unicodedata.category(char) == "Cf" or _INVISIBLE.match(char), None)
_PUNCTUATION_TO_SPACE = _TranslationTable(lambda char: unicodedata.category(char)[0] in "PS", " ")


@dataclass(frozen=True)
class Normalizer:
    """A normaliser and its name in results.

    Attributes:
        name: Its version. Any change of a rule needs a new name.
        normalize: Text -> text with single spaces between words and none at the ends.
    """

    name: str
    normalize: Callable[[str], str]


def normalize_ko_v1(text: str) -> str:
    """Normalise Korean (and any other) text without changing the meaning of medical text.

    NFKC and NFC, so that full-width and decomposed forms compare equal and Hangul syllables stay composed. Lower case.
    Thousands commas are removed. ``. / : % -`` stay between digits (120/80, 36.5); every other punctuation mark or
    symbol becomes a space. Invisible characters (zero width, fillers, variation selectors) are removed. Runs of white
    space become one space.
    """
    text = _without_invisible(unicodedata.normalize("NFKC", text).lower())
    # NFC comes last: lower-casing, or removing an invisible character between two halves of a syllable, can leave
    # characters to compose.
    text = _THOUSANDS.sub("", unicodedata.normalize("NFC", text))
    parts = _INNER.split(text)  # every second part is a mark between digits, which stays
    parts[::2] = [part.translate(_PUNCTUATION_TO_SPACE) for part in parts[::2]]
    return " ".join("".join(parts).split())


def normalize_spaces(text: str) -> str:
    """The text with single spaces between words and none at the ends."""
    return " ".join(text.split())


def normalize_basic_v2(text: str) -> str:
    """Normalise text of any language: ``normalize_whisper_basic`` with combining marks (vowel signs, tones) kept.

    Lower case, without brackets and their content, NFKC. Every punctuation mark or symbol becomes a space. Invisible
    characters are removed. The vowel signs of Arabic and Hebrew, which most texts leave out, count as characters.
    """
    text = _IN_PARENTHESES.sub("", _BRACKETED.sub("", _without_invisible(text).lower()))
    text = _without_invisible(unicodedata.normalize("NFKC", text).lower()).translate(_PUNCTUATION_TO_SPACE)
    return " ".join(unicodedata.normalize("NFC", text).split())


def normalize_whisper_basic(text: str) -> str:
    """Whisper's normaliser for any language: lower case, without punctuation and without brackets and their content.

    Combining marks that do not merge with their letter become spaces as well.

    ``remove_diacritics`` is off, since it decomposes Hangul. Invisible characters, which Whisper's normaliser keeps,
    are removed first. Letters of zh, ja, th, lo and my are not split as in Whisper's WER: use ``cer_nospace`` for
    these languages.
    """
    return " ".join(_basic()(_without_invisible(text)).split())


def normalize_whisper_en(text: str, rules: Callable[[str], str] | None = None) -> str:
    """Whisper's normaliser for English: the basic rules, and one form of contractions, titles and numbers.

    Whisper's rules decompose Hangul, so the result is composed again. They can leave a lone punctuation mark
    ("..." -> "."), which is removed. Text that their number rules cannot process (over 4,300 digits in a row) is
    normalised by the basic rules.

    Args:
        rules: Whisper's rules with a table of spellings. None leaves spellings unchanged.
    """
    text = _without_invisible(text)
    try:
        words = unicodedata.normalize("NFC", (rules or _english())(text)).split()
    except (ValueError, TypeError, IndexError):
        return normalize_whisper_basic(text)
    return " ".join(word for word in words if any(map(str.isalnum, word)))


RAW = Normalizer(NONE, normalize_spaces)
KOREAN = Normalizer(KO_V1, normalize_ko_v1)
BASIC = Normalizer(BASIC_V2, normalize_basic_v2)
BASIC_OF_WHISPER = Normalizer(WHISPER_BASIC, normalize_whisper_basic)
ENGLISH = Normalizer(WHISPER_EN_PLAIN, normalize_whisper_en)


@dataclass(frozen=True)
class Normalizers:
    """The normalisers of transcripts.

    Attributes:
        english: Normaliser of English, see ``english_with``. The default has no table of spellings.
        basic: Normaliser of languages other than Korean and English.
    """

    english: Normalizer = ENGLISH
    basic: Normalizer = BASIC

    def select(self, language: str) -> Normalizer:
        """The normaliser of a language's code (``core/languages.py``). "" (unknown) and ``ko`` use ko-v1."""
        if language in ("", "ko"):
            return KOREAN
        return self.english if language == "en" else self.basic


DEFAULT_NORMALIZERS = Normalizers()


def normalizers_from(name: str = BASIC_V2, spellings_path: str = "") -> Normalizers:
    """The normalisers that the settings of an evaluation name.

    Args:
        name: ``basic-v2`` or ``whisper-basic-v1``, for languages other than Korean and English.
        spellings_path: Whisper's table of English spellings, see ``english_with``; "" uses none.
    Raises:
        RunError: The table cannot be used.
    """
    english = english_with(spellings_path) if spellings_path else ENGLISH
    return Normalizers(english, BASIC_OF_WHISPER if name == WHISPER_BASIC else BASIC)


def english_with(spellings_path: str | Path) -> Normalizer:
    """Whisper's English normaliser with a table of spellings: the ``normalizer.json`` of any Whisper checkpoint.

    Raises:
        RunError: The file cannot be read, or is not a table of words.
    """
    try:
        with open_regular(spellings_path) as file:
            spellings = json.loads(file.read())
    except (OSError, ValueError) as error:
        raise RunError(f"{spellings_path}: cannot read the table of spellings: {error}") from None
    if not isinstance(spellings, dict) or not all(isinstance(word, str) for word in spellings.values()):
        raise RunError(f"{spellings_path}: no table of spellings; Whisper's checkpoints have one, normalizer.json")
    return Normalizer(WHISPER_EN, partial(normalize_whisper_en, rules=_english_rules(spellings)))


def _without_invisible(text: str) -> str:
    return text if text.isascii() else text.translate(_REMOVE_INVISIBLE)


@cache
def _basic() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    return BasicTextNormalizer()


@cache
def _english() -> Callable[[str], str]:
    return _english_rules({})


def _english_rules(spellings: Mapping[str, str]) -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return EnglishTextNormalizer(spellings)
