"""Remove the transcription notation of KsponSpeech, AI-Hub and NIKL without changing the meaning of medical text.

The public cleaners delete every ``/``, ``+`` and ``*``, so 120/80 becomes 12080. Here a mark is removed only at the
positions where the notation puts it.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from voxray.text.korean_numbers import is_reading

Reading = Literal["spelling", "phonetic"]

_HANGUL = re.compile("[가-힣ᄀ-ᇿㄱ-ㆎ]")  # syllables, and their letters as macOS writes them

_PAIR = re.compile(
    r"(?P<outer>\()?[(（](?P<spelling>[^()（）]*)[)）]\s*[/／]\s*[(（](?P<reading>[^()（）]*)[)）](?(outer)\)(?!\s*/))"
)
_MISTYPED_PAIR = re.compile(  # another mark than "/" between the brackets, or none
    r"(?P<outer>\()?[(（](?P<spelling>[0-9０-９A-Za-z][^()（）]*)[)）](?P<mark>\s*(?![/／]\s*[(（])[/／?:;|\\+.,~-]{0,2}\s*)"
    r"[(（](?P<reading>[가-힣][^()（）]*)[)）](?(outer)\)(?!\s*/))"
)
_PAIR_IN_ONE_BRACKET = re.compile(
    r"[(（](?P<spelling>[0-9０-９][^()（）/]*)/(?P<reading>(?!일[)）])[가-힣][^()（）/]*)[)）]"
)
_PAIRS = (_PAIR, _MISTYPED_PAIR, _PAIR_IN_ONE_BRACKET)
_TAGS = re.compile(r"(?<!\S)((?:[bnlou]/)+)(?=$|[\s가-힣(){*+.,?!])")
_EVENT = re.compile(  # NIKL: {laughing}; AI-Hub: /(noise), @웃음
    r"\{[A-Za-z _-]+\}|(?<![^\s가-힣.,?!])/\((?:noise|bgm|music|laugh|cough|sing|applause|breath)[a-z]*\)"
    r"|(?<!\S)@(?:웃음|박수|노래|목청|숨|잡음|기침)[가-힣]*"
)
_ANONYMISED = re.compile(r"&[a-z-]+\d*&")  # NIKL: &name1&
_GUESSED = re.compile(r"\(\(([^()]*)\)\)")  # NIKL: ((guessed words))
_CUT_OFF = re.compile(r"(?<!\S)-([가-힣]+)-(?!\S)")  # NIKL: -word-, broken off
_MISPLACED_REPEAT = re.compile(r"(?<!\S)\++(?=[가-힣])")
_REPEAT = re.compile(r"(?<!\S)([가-힣]+) ?\+ ?(?=\1)")  # 그 + 그 사람, 아+아+
_UNKNOWN_MARK = re.compile(r"(?<!\S)(?:@[가-힣]|/\([A-Za-z])|(?<=[가-힣])(?: \+ |\+)(?=[가-힣])")
_MARKED = re.compile(r"([^/+*]|.*[^/+*])([/+*]+)([.,?!]*)")


@dataclass(frozen=True)
class KoreanText:
    """A transcript without its notation.

    Attributes:
        text: The requested reading.
        phonetic: The words as they are pronounced. Equal to ``spelling`` without dual notation.
        spelling: The words in standard orthography.
        notes: Sorted codes: ``unk`` (unintelligible words or an anonymised name: the text is incomplete, do not score
            it), ``unclear`` (words that the transcriber guessed), ``noise``, and for notation that is left unchanged
            ``unbalanced_brackets``, ``nested_brackets``, ``number_pair``, ``odd_pair`` (two brackets that may be a
            mistyped pair) and ``unknown_mark``.
    """

    text: str
    phonetic: str
    spelling: str
    notes: tuple[str, ...] = ()


def has_notation(text: str, language: str) -> bool:
    """Whether marks in a transcript are notation of Korean corpora: it is in Korean, or has Hangul and no language.

    Args:
        language: Code of its language, "" if it is unknown.
    """
    return language == "ko" or (not language and bool(_HANGUL.search(text)))


def clean_transcript(raw: str, reading: Reading = "spelling") -> KoreanText:
    """Remove the transcription marks of one line. Cleaning a clean line changes nothing, and no digit is ever lost.

    ``(spelling)/(reading)`` is resolved first and gives both texts. Two numbers, ``(120)/(80)``, are not such a pair.
    A number and its reading are a pair however they are typed: ``(3)?(세)``, ``(100%)(백 프로)``, ``(1/하나)``.
    Noise tags ``b/ l/ n/ o/ u/`` are removed only at the start of a word, and not if they are a unit (``5 l/분``). The
    ``/`` of fillers and the ``+`` of repetitions are removed only at the end of a word (``+`` also before a Hangul
    word, where typists misplace it, and before a word that repeats the one before it). ``Rh+``, ``ER+``, ``ml/min``,
    ``120/80`` and ``1+1`` stay. Unbalanced brackets are noted and stay.
    """
    notes: set[str] = set()
    spelling = _to_fixed_point(raw, 1, notes)
    phonetic = _to_fixed_point(raw, 2, notes)
    return KoreanText(phonetic if reading == "phonetic" else spelling, phonetic, spelling, tuple(sorted(notes)))


def _to_fixed_point(text: str, side: int, notes: set[str]) -> str:
    """Clean until nothing changes: removing a mark can expose another. Each round shortens the text or is the last."""
    before = None
    while text != before:
        before, text = text, _clean_once(text, side, notes)
    if _unbalanced(text):
        notes.add("unbalanced_brackets")
    if _UNKNOWN_MARK.search(text):
        notes.add("unknown_mark")
    return text


def _clean_once(text: str, side: int, notes: set[str]) -> str:
    text = _resolve_pairs(" ".join(unicodedata.normalize("NFC", text).split()), side, notes)

    def with_note(note: str, replacement: str = " "):
        def replace(match: re.Match[str]) -> str:
            notes.add("unk" if match.lastindex and not match[1].strip() else note)
            return match.expand(replacement)

        return replace

    text = _GUESSED.sub(with_note("unclear", r" \1 "), text)
    text = _EVENT.sub(with_note("noise"), text)
    text = _ANONYMISED.sub(with_note("unk"), text)
    text = _CUT_OFF.sub(r"\1", text)
    text = _REPEAT.sub(r"\1 ", text)
    text = _TAGS.sub(lambda match: _remove_tags(match, notes), text)
    text = _MISPLACED_REPEAT.sub("", text)
    words: list[str] = []
    for word in text.split():
        words.append(_remove_end_marks(word, words[-1] if words else "", notes))
    return " ".join(filter(None, words))


def _resolve_pairs(text: str, side: int, notes: set[str]) -> str:
    """Replace each ``(spelling)/(reading)`` by one side. If that would create a new pair, change nothing."""
    no_pairs = [match for match in _bracket_matches(text) if not _is_pair(match)]
    for match in no_pairs:
        if match.re is _PAIR:
            notes.add("number_pair")
        elif match.re is _MISTYPED_PAIR and not match["mark"].isspace():
            notes.add("odd_pair")
    sides = {name: _one_side(text, name) for name in ("spelling", "reading")}
    # Check both sides, so that the two readings of a line are cleaned by the same rules.
    unchanged = [match[0] for match in no_pairs]
    if any([match[0] for match in _bracket_matches(reading)] != unchanged for reading in sides.values()):
        notes.add("nested_brackets")
        return text
    return sides["spelling" if side == 1 else "reading"]


def _bracket_matches(text: str) -> list[re.Match[str]]:
    return [match for pattern in _PAIRS for match in pattern.finditer(text)]


def _one_side(text: str, name: str) -> str:
    for pattern in _PAIRS:
        text = pattern.sub(lambda match: match[name].strip() if _is_pair(match) else match[0], text)
    return text


def _is_pair(match: re.Match[str]) -> bool:
    """Whether brackets are one: ``(A)/(B)`` unless both are numbers; typed otherwise, a number and its reading."""
    spelling, reading = match["spelling"], match["reading"]
    if match.re is _PAIR:
        return not all(re.search(r"\d", part) and not re.search("[가-힣]", part) for part in (spelling, reading))
    return is_reading(spelling.strip(), reading)


def _remove_tags(match: re.Match[str], notes: set[str]) -> str:
    """Remove noise tags, but not the unit in ``5 l/분``: a number before it, a Hangul letter directly after it."""
    next_char = match.string[match.end() : match.end() + 1]
    if re.search(r"\d\s*$", match.string[: match.start()]) and re.match("[가-힣]", next_char):
        return match[0]
    notes.update("unk" if tag == "u" else "noise" for tag in match[1].replace("/", ""))
    return ""


def _remove_end_marks(word: str, previous: str, notes: set[str]) -> str:
    """Remove ``/`` and ``+`` of ``아/`` and ``그+`` but not of ``5 ml/`` and ``3+``, and ``*`` at any word's end."""
    if word.strip("*") == "":
        notes.add("unclear")
        return ""
    match = _MARKED.fullmatch(word)
    if match is None:
        return word
    stem, marks, punctuation = match.groups()
    suffix = marks.replace("*", "")
    if suffix != marks:
        notes.add("unclear")
    is_unit = stem.isascii() and previous[-1:].isdigit()
    is_name = "/" not in suffix and re.search("[A-Z][A-Za-z]*$", stem)  # Rh+, ER+, Na+, C++
    if "/" in suffix and re.search("[가-힣]~+$", stem):  # 어~/, a long filler
        stem = stem.rstrip("~")
    if re.search("[가-힣A-Za-z)]$", stem) and not is_unit and not is_name:
        suffix = ""
    return stem + suffix + punctuation


def _unbalanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            return True
    return depth != 0
