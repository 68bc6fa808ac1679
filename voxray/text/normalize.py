"""Text normalisation before scoring, versioned: results name the one used, because it moves error rates by points."""

import re
import unicodedata

KO_V1 = "ko-v1"

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_INNER = re.compile(r"(?<=\d)[./:%-](?=\d)")


def normalize_ko_v1(text: str) -> str:
    """Normalise Korean (and any other) text without losing what medical text means.

    NFKC then NFC, so that full-width and decomposed forms compare equal and Hangul stays whole; lower case; thousands
    commas removed; ``. / : % -`` kept between digits (120/80, 36.5), every other punctuation mark or symbol a space;
    invisible format characters removed; runs of white space one space.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text)).lower()
    text = _THOUSANDS.sub("", "".join(char for char in text if unicodedata.category(char) != "Cf"))
    kept = {match.start() for match in _INNER.finditer(text)}
    shown = (
        char if index in kept or unicodedata.category(char)[0] not in "PS" else " " for index, char in enumerate(text)
    )
    return " ".join("".join(shown).split())
