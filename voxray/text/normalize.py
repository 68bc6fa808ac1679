"""Text normalisation before scoring. It changes error rates by points, so results name the version used.

``ko-v1`` is voxray's own normaliser, for Korean and for all texts other than transcripts. Transcripts in other
languages use Whisper's normalisers from transformers, as its papers and leaderboards do. ``get_normalizer`` selects.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from voxray.core.errors import RunError

KO_V1 = "ko-v1"
WHISPER_BASIC = "whisper-basic-v1"
WHISPER_EN = "whisper-en-v1"
WHISPER_EN_PLAIN = "whisper-en-v1-nospelling"
"""Whisper's English rules without its table of British and American spellings, which only its checkpoints carry."""

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_INVISIBLE = re.compile("[\u115f\u1160\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # Hangul fillers, variation selectors
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


def normalize_whisper_basic(text: str) -> str:
    """Whisper's normaliser for any language: lower case, without punctuation and without brackets and their content.

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


KOREAN = Normalizer(KO_V1, normalize_ko_v1)
BASIC = Normalizer(WHISPER_BASIC, normalize_whisper_basic)
ENGLISH = Normalizer(WHISPER_EN_PLAIN, normalize_whisper_en)


def get_normalizer(language: str, english: Normalizer = ENGLISH) -> Normalizer:
    """The normaliser of transcripts in a language.

    Args:
        language: Two-letter code. "" (unknown) and ``ko`` use ko-v1, ``en`` uses ``english``, others Whisper's basic
            rules.
        english: Normaliser of English, see ``english_with``. The default has no table of spellings.
    """
    if language in ("", "ko"):
        return KOREAN
    return english if language == "en" else BASIC


def english_with(spellings_path: str | Path) -> Normalizer:
    """Whisper's English normaliser with a table of spellings: the ``normalizer.json`` of any Whisper checkpoint.

    Raises:
        RunError: The file cannot be read, or is not a table of words.
    """
    try:
        spellings = json.loads(Path(spellings_path).read_text(encoding="utf-8"))
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
