"""Text normalisation before scoring, versioned: results name the one used, because it moves error rates by points.

``ko-v1`` is voxray's own, for Korean and for everything that is no transcript. Transcripts in other languages are
scored as Whisper's papers and leaderboards do, by the normalisers of transformers; ``get_normalizer`` chooses.
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


class _Replacing(dict[int, int | str | None]):
    """A table for ``str.translate`` that decides on a character when it first comes up: there are a million.

    Args:
        taken: Whether a character is replaced.
        by: What by; None takes it out.
    """

    def __init__(self, taken: Callable[[str], object], by: str | None) -> None:
        super().__init__()
        self._taken, self._by = taken, by

    def __missing__(self, code: int) -> int | str | None:
        self[code] = self._by if self._taken(chr(code)) else code
        return self[code]


_SHOWN = _Replacing(lambda char: unicodedata.category(char) == "Cf" or _INVISIBLE.match(char), None)
_SPACED = _Replacing(lambda char: unicodedata.category(char)[0] in "PS", " ")


@dataclass(frozen=True)
class Normalizer:
    """A normaliser and the name that results carry.

    Attributes:
        name: Its version; a rule that changes makes another one.
        normalize: Text -> text whose words stand apart by one space each, with none around them.
    """

    name: str
    normalize: Callable[[str], str]


def normalize_ko_v1(text: str) -> str:
    """Normalise Korean (and any other) text without losing what medical text means.

    NFKC and NFC, so that full-width and decomposed forms compare equal and Hangul stays whole; lower case; thousands
    commas removed; ``. / : % -`` kept between digits (120/80, 36.5), every other punctuation mark or symbol a space;
    invisible characters (zero width, fillers, the selector after an emoji) removed; runs of white space one space.
    """
    text = _without_invisible(unicodedata.normalize("NFKC", text).lower())
    # Composed last: lower case and what an invisible character kept apart (two halves of a syllable) can compose anew.
    text = _THOUSANDS.sub("", unicodedata.normalize("NFC", text))
    parts = _INNER.split(text)  # every other one is a mark to keep
    parts[::2] = [part.translate(_SPACED) for part in parts[::2]]
    return " ".join("".join(parts).split())


def normalize_whisper_basic(text: str) -> str:
    """Whisper's normaliser for any language: lower case, no brackets with what is in them, no punctuation.

    Never with its ``remove_diacritics``, which takes Hangul apart. Invisible characters, which Whisper's leaves in, go
    first. Letters are not split for zh, ja, th, lo and my, as Whisper's WER does: take ``cer_nospace`` for those.
    """
    return " ".join(_basic()(_without_invisible(text)).split())


def normalize_whisper_en(text: str, rules: Callable[[str], str] | None = None) -> str:
    """Whisper's normaliser for English: as the basic one, and contractions, titles and numbers written one way.

    It takes Hangul apart, which is put together again, and may leave a mark alone ("..." -> "."), which goes. What its
    number rules cannot take (over 4,300 digits in a row) goes through the basic one.

    Args:
        rules: Whisper's, with a table of spellings; without, none is spelled anew.
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
        language: Two-letter code; "" (unknown) and ``ko`` take ko-v1, ``en`` takes ``english``, others Whisper's basic.
        english: Another than the one without spellings, see ``english_with``.
    """
    if language in ("", "ko"):
        return KOREAN
    return english if language == "en" else BASIC


def english_with(spellings_path: str | Path) -> Normalizer:
    """Whisper's English normaliser with a table of spellings: the ``normalizer.json`` of any Whisper checkpoint.

    Raises:
        RunError: The file cannot be read, or is no table of words.
    """
    try:
        found = json.loads(Path(spellings_path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{spellings_path}: cannot read the table of spellings: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(word, str) for word in found.values()):
        raise RunError(f"{spellings_path}: no table of spellings; Whisper's checkpoints have one, normalizer.json")
    return Normalizer(WHISPER_EN, partial(normalize_whisper_en, rules=_english_rules(found)))


def _without_invisible(text: str) -> str:
    return text if text.isascii() else text.translate(_SHOWN)


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
