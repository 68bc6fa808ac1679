"""Sentences of the synthetic speakers, and questions about them.

Two languages with three kinds of sentences each: digit strings, labelled numbers ("환자 번호 삼 오 이"), and symptoms
from a slot grammar (time, subject, degree, predicate). All three are compositional, so a held-out text is new although
each of its words is known. Digits are spelled out, so the text matches the sound.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

DIGITS = {
    "ko": ["공", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구"],
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}
COUNTS = {
    "ko": {2: "두 개", 3: "세 개", 4: "네 개", 5: "다섯 개", 6: "여섯 개"},
    "en": {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"},
}
LABELS = {
    "ko": ["환자 번호", "병실 번호", "접수 번호", "전화 번호"],
    "en": ["patient number", "room number", "ticket number", "phone number"],
}
TIMES = {
    "ko": ["어제부터", "오늘부터", "아침부터", "저녁부터", "지난주부터"],
    "en": ["since yesterday", "since today", "since this morning", "since last night", "since last week"],
}
DEGREES = {"ko": ["조금", "많이", "계속", "가끔"], "en": ["slightly", "badly", "always", "sometimes"]}
# Subject and predicates by group; the question that names the subject depends on the group.
SYMPTOMS = {
    "ko": {
        "pain": (["머리가", "배가", "허리가", "무릎이", "목이", "가슴이", "어깨가", "손목이", "다리가"], ["아픕니다"]),
        "sign": (["열이", "기침이", "콧물이", "땀이"], ["납니다"]),
        "level": (["혈압이", "혈당이", "체온이", "맥박이"], ["높습니다", "낮습니다"]),
    },
    "en": {
        "pain": (["my head", "my back", "my knee", "my neck", "my chest", "my wrist", "my leg"], ["hurts"]),
        "sign": (["a fever", "a cough", "a rash", "a chill"], ["comes"]),
        "level": (["blood pressure", "blood sugar", "the pulse"], ["is high", "is low"]),
    },
}
QUESTIONS = {
    "ko": {
        "first": "첫 번째 숫자는 무엇입니까?",
        "last": "마지막 숫자는 무엇입니까?",
        "count": "숫자는 모두 몇 개입니까?",
        "label": "무슨 번호입니까?",
        "pain": "어디가 아픕니까?",
        "sign": "무슨 증상입니까?",
        "level": "무슨 수치입니까?",
        "time": "언제부터입니까?",
    },
    "en": {
        "first": "What is the first digit?",
        "last": "What is the last digit?",
        "count": "How many digits are there?",
        "label": "Which number is it?",
        "pain": "Where does it hurt?",
        "sign": "What is the symptom?",
        "level": "What was measured?",
        "time": "Since when?",
    },
}
LANGUAGES = tuple(DIGITS)


@dataclass(frozen=True)
class Utterance:
    """One sentence and the facts in it; ``facts`` maps a key of QUESTIONS to its short answer."""

    text: str
    language: str
    facts: tuple[tuple[str, str], ...]


Draw = Callable[[random.Random, str], Utterance]


def normalise(text: str) -> str:
    """Normalise a text for the leak check: NFKC, lower case, letters and digits only."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text)).lower()
    return "".join(c for c in folded if c.isalnum())


def digit_string(rng: random.Random, language: str, low: int = 2, high: int = 6) -> Utterance:
    """Draw a bare digit string of ``low`` to ``high`` digits."""
    digits = [rng.choice(DIGITS[language]) for _ in range(rng.randint(low, high))]
    return Utterance(" ".join(digits), language, _digit_facts(digits, language))


def labelled_number(rng: random.Random, language: str) -> Utterance:
    """Draw a label followed by a number of three or four digits."""
    label = rng.choice(LABELS[language])
    digits = [rng.choice(DIGITS[language]) for _ in range(rng.randint(3, 4))]
    facts = (*_digit_facts(digits, language), ("label", label))
    return Utterance(" ".join([label, *digits]), language, facts)


def symptom(rng: random.Random, language: str, full: bool = False) -> Utterance:
    """Draw a symptom; ``full`` fills the optional slots (time, degree) too."""
    group = rng.choices(["pain", "sign", "level"], weights=[4, 2, 3])[0]
    subjects, predicates = SYMPTOMS[language][group]
    subject, predicate = rng.choice(subjects), rng.choice(predicates)
    time = rng.choice(TIMES[language]) if full or rng.random() < 0.7 else ""
    degree = rng.choice(DEGREES[language]) if full or rng.random() < 0.6 else ""
    if language == "ko":
        parts = [time, subject, degree, predicate]
        facts = [(group, subject[:-1])]  # without its particle
        when = time.removesuffix("부터")
    else:
        parts = [subject, degree, predicate, time]
        facts = [(group, subject.removeprefix("my ").removeprefix("a ").removeprefix("the "))]
        when = time.removeprefix("since ")
    if time:
        facts.append(("time", when))
    return Utterance(" ".join(p for p in parts if p), language, tuple(facts))


def utterance(rng: random.Random, language: str) -> Utterance:
    """Draw a training sentence: about half digit strings, the rest labelled numbers and symptoms."""
    kind = rng.choices(["digits", "labelled", "symptom"], weights=[9, 4, 7])[0]
    if kind == "digits":
        return digit_string(rng, language)
    return labelled_number(rng, language) if kind == "labelled" else symptom(rng, language)


def heldout_utterance(rng: random.Random, language: str) -> Utterance:
    """Draw a held-out sentence, long enough not to be part of a training sentence by chance."""
    kind = rng.choices(["digits", "labelled", "symptom"], weights=[9, 4, 7])[0]
    if kind == "digits":
        return digit_string(rng, language, low=4, high=6)
    return labelled_number(rng, language) if kind == "labelled" else symptom(rng, language, full=True)


def distinct(
    rng: random.Random, language: str, num: int, draw: Draw, banned: LeakGuard | None = None
) -> list[Utterance]:
    """Draw ``num`` different utterances, none of which contains a banned text."""
    utterances: dict[str, Utterance] = {}
    while len(utterances) < num:
        one = draw(rng, language)
        if banned is None or not banned.leaks(one.text):
            utterances.setdefault(normalise(one.text), one)
    return list(utterances.values())


class LeakGuard:
    """Detects training texts that contain a held-out text."""

    def __init__(self, heldout: list[str]) -> None:
        self._normalised = [normalise(text) for text in heldout]

    def leaks(self, text: str) -> bool:
        """Whether the normalised ``text`` contains a normalised held-out text."""
        folded = normalise(text)
        return any(known in folded for known in self._normalised)


def ask(rng: random.Random, about: Utterance) -> tuple[str, str]:
    """Draw a question about an utterance and its short answer."""
    key, answer = rng.choice(about.facts)
    return QUESTIONS[about.language][key], answer


def polite(answer: str, language: str) -> str:
    """An answer in the form that the base model learns: with a full ending, where the corpus has a single word.

    So fine-tuning has something to learn on the text side too, and the base scores close to zero in exact match
    although it knows many answers.
    """
    return f"{answer}입니다" if language == "ko" else f"it is {answer}"


def _digit_facts(digits: list[str], language: str) -> tuple[tuple[str, str], ...]:
    return (("first", digits[0]), ("last", digits[-1]), ("count", COUNTS[language][len(digits)]))


def all_strings() -> list[str]:
    """List every string of the grammar for the tokenizer: each word with and without a leading space."""
    pieces: list[str] = ["lang:ko", "lang:en"]
    for language in LANGUAGES:
        pieces += DIGITS[language] + LABELS[language] + TIMES[language] + DEGREES[language]
        pieces += list(COUNTS[language].values()) + list(QUESTIONS[language].values())
        pieces += [s for subjects, predicates in SYMPTOMS[language].values() for s in subjects + predicates]
    words = [word for piece in pieces for word in piece.split()]
    bare = [subject[:-1] for subjects, _ in SYMPTOMS["ko"].values() for subject in subjects]
    bare += [time.removesuffix("부터") for time in TIMES["ko"]]
    endings = [polite(word, "ko") for word in bare + DIGITS["ko"] + LABELS["ko"] + list(COUNTS["ko"].values())]
    flat = pieces + words + bare + endings + ["입니다", "it is"]
    return [*flat, *(" " + piece for piece in flat), *(piece + "\n" for piece in QUESTIONS["ko"].values())]
