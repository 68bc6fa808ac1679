"""Korean transcripts: the notation of KsponSpeech, AI-Hub and NIKL, taken off without touching what medical text means.

The public cleaners delete every ``/``, ``+`` and ``*``, so that 120/80 becomes 12080. Here each mark is taken off only
in the place where the notation puts it.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

Reading = Literal["spelling", "phonetic"]

_PAIR = re.compile(r"\(([^()]*)\)\s*/\s*\(([^()]*)\)")
_TAGS = re.compile(r"(?<!\S)((?:[bnlou]/)+)(?=$|[\s가-힣(){*+.,?!])")
_EVENT = re.compile(r"\{[A-Za-z _-]+\}")  # NIKL: {laughing}
_ANONYMISED = re.compile(r"&[a-z-]+\d*&")  # NIKL: &name1&
_GUESSED = re.compile(r"\(\(([^()]*)\)\)")  # NIKL: ((guessed words))
_CUT_OFF = re.compile(r"(?<!\S)-([가-힣]+)-(?!\S)")  # NIKL: -word-, broken off
_MISPLACED_REPEAT = re.compile(r"(?<!\S)\++(?=[가-힣])")
_MARKED = re.compile(r"([^/+*]|.*[^/+*])([/+*]+)([.,?!]*)")
_BLOOD_GROUP = re.compile(r"(?:Rh|A|B|AB|O)")


@dataclass(frozen=True)
class KoreanText:
    """A transcript without its notation.

    Attributes:
        text: The reading that was asked for.
        phonetic: What was said, sound by sound; equal to ``spelling`` where no dual notation was used.
        spelling: What a reader would write.
        notes: What a consumer may act on, sorted: ``unk`` (words that nobody understood, or an anonymised name: the
            text is incomplete, so leave it out of scoring), ``unclear`` (words written down by guess), ``noise``,
            ``unbalanced_brackets``, ``nested_brackets`` and ``number_pair`` (kept as they were).
    """

    text: str
    phonetic: str
    spelling: str
    notes: tuple[str, ...] = ()


def clean_transcript(raw: str, reading: Reading = "spelling") -> KoreanText:
    """Take the transcription marks off one line; cleaning a clean line changes nothing, and no digit is ever lost.

    ``(spelling)/(reading)`` comes first and gives both texts; two numbers, ``(120)/(80)``, are no such pair. Noise
    tags ``b/ l/ n/ o/ u/`` go only at the beginning of a word, and not where they are a unit (``5 l/분``). The filler's
    ``/`` and the repeat's ``+`` go only at the end of a word (``+`` before a Hangul word too, where typists misplace
    it); ``Rh+``, ``ml/min``, ``120/80`` and ``1+1`` stay. Brackets that do not match are noted and kept.
    """
    notes: set[str] = set()
    spelling = _to_fixed_point(raw, 1, notes)
    phonetic = _to_fixed_point(raw, 2, notes)
    return KoreanText(phonetic if reading == "phonetic" else spelling, phonetic, spelling, tuple(sorted(notes)))


def _to_fixed_point(text: str, side: int, notes: set[str]) -> str:
    """Taking one mark off can bare another; ends because each round makes the text shorter or leaves it."""
    before = None
    while text != before:
        before, text = text, _clean_once(text, side, notes)
    if _unbalanced(text):
        notes.add("unbalanced_brackets")
    return text


def _clean_once(text: str, side: int, notes: set[str]) -> str:
    text = _take_reading(" ".join(unicodedata.normalize("NFC", text).split()), side, notes)

    def noted(note: str, replacement: str = " "):
        def replace(match: re.Match[str]) -> str:
            notes.add("unk" if match.lastindex and not match[1].strip() else note)
            return match.expand(replacement)

        return replace

    text = _GUESSED.sub(noted("unclear", r" \1 "), text)
    text = _EVENT.sub(noted("noise"), text)
    text = _ANONYMISED.sub(noted("unk"), text)
    text = _CUT_OFF.sub(r"\1", text)
    text = _TAGS.sub(lambda match: _take_tags(match, notes), text)
    text = _MISPLACED_REPEAT.sub("", text)
    words: list[str] = []
    for word in text.split():
        words.append(_take_end_marks(word, words[-1] if words else "", notes))
    return " ".join(filter(None, words))


def _take_reading(text: str, side: int, notes: set[str]) -> str:
    """Replace each ``(spelling)/(reading)`` by one side; where that would make another pair, leave all as it is."""
    number_pairs = [match[0] for match in _PAIR.finditer(text) if _is_number_pair(match)]
    if number_pairs:
        notes.add("number_pair")
    taken = {number: _one_side(text, number) for number in (1, 2)}
    # Both sides decide, whichever is asked for, or the two readings of one line would be cleaned by different rules.
    if any([match[0] for match in _PAIR.finditer(found)] != number_pairs for found in taken.values()):
        notes.add("nested_brackets")
        return text
    return taken[side]


def _one_side(text: str, side: int) -> str:
    return _PAIR.sub(lambda match: match[0] if _is_number_pair(match) else match[side].strip(), text)


def _is_number_pair(match: re.Match[str]) -> bool:
    return all(re.search(r"\d", part) and not re.search("[가-힣]", part) for part in match.groups())


def _take_tags(match: re.Match[str], notes: set[str]) -> str:
    """Drop noise tags, but not the unit in ``5 l/분``: a number before it, and the next word joined to it."""
    follows = match.string[match.end() : match.end() + 1]
    if re.search(r"\d\s*$", match.string[: match.start()]) and re.match("[가-힣]", follows):
        return match[0]
    notes.update("unk" if tag == "u" else "noise" for tag in match[1].replace("/", ""))
    return ""


def _take_end_marks(word: str, previous: str, notes: set[str]) -> str:
    """``아/`` and ``그+`` lose their mark, ``*`` goes anywhere at an end; ``5 ml/`` and ``3+`` keep theirs."""
    if word.strip("*") == "":
        notes.add("unclear")
        return ""
    match = _MARKED.fullmatch(word)
    if match is None:
        return word
    stem, marks, punctuation = match.groups()
    kept = marks.replace("*", "")
    if kept != marks:
        notes.add("unclear")
    is_unit = stem.isascii() and previous[-1:].isdigit()
    is_blood_group = kept == "+" and _BLOOD_GROUP.fullmatch(stem)
    if re.search("[가-힣A-Za-z)]$", stem) and not is_unit and not is_blood_group:
        kept = ""
    return stem + kept + punctuation


def _unbalanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            return True
    return depth != 0
