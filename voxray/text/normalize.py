"""Text normalisation before scoring, versioned: results name the one used, because it moves error rates by points."""

import re
import unicodedata

KO_V1 = "ko-v1"

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_INVISIBLE = re.compile("[\u115f\u1160\ufe00-\ufe0f\U000e0100-\U000e01ef]")  # Hangul fillers, variation selectors
_INNER = re.compile(r"(?<=\d)[./:%-](?=\d)")


def normalize_ko_v1(text: str) -> str:
    """Normalise Korean (and any other) text without losing what medical text means.

    NFKC and NFC, so that full-width and decomposed forms compare equal and Hangul stays whole; lower case; thousands
    commas removed; ``. / : % -`` kept between digits (120/80, 36.5), every other punctuation mark or symbol a space;
    invisible characters (zero width, fillers, the selector after an emoji) removed; runs of white space one space.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    text = _INVISIBLE.sub("", "".join(char for char in text if unicodedata.category(char) != "Cf"))
    # Composed last: lower case and what an invisible character kept apart (two halves of a syllable) can compose anew.
    text = _THOUSANDS.sub("", unicodedata.normalize("NFC", text))
    kept = {match.start() for match in _INNER.finditer(text)}
    shown = (
        char if index in kept or unicodedata.category(char)[0] not in "PS" else " " for index, char in enumerate(text)
    )
    return " ".join("".join(shown).split())
