"""Error counts against jiwer's, and alignments in columns with characters that are two columns wide."""

from collections import Counter

import jiwer
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from voxray.comparison.alignments import align, aligned_lines, changed_rows, display_width, length_slices, pieces, tally

PAIRS = [
    ("흉부 엑스레이 찍어 봅시다", "흉부엑스레이 찍어 봅시다"),
    ("오늘 혈압이 120/80 이고요", "오늘은 혈압이 120/80 입니다"),
    ("하루에 세 번 드세요", "하루 세 번 번 드세요"),
    ("take two aspirin a day", "take to aspirins day"),
    ("네", "아니요 그렇지 않습니다"),
    ("머리가 아픕니다", ""),
]
words = st.lists(st.sampled_from(["혈압", "이", "높다", "a", "bc", "120"]), min_size=1, max_size=7)
texts = st.lists(st.sampled_from("가나다 ab1é漢"), max_size=12).map("".join)


def jiwers(pairs: list[tuple[str, str]]) -> tuple[Counter, Counter, Counter]:
    """Substitutions, insertions and deletions by word, as jiwer's alignment has them."""
    counters: tuple[Counter, Counter, Counter] = (Counter(), Counter(), Counter())
    output = jiwer.process_words([one for one, _ in pairs], [other for _, other in pairs])
    for reference, hypothesis, chunks in zip(output.references, output.hypotheses, output.alignments, strict=True):
        for chunk in chunks:
            left = reference[chunk.ref_start_idx : chunk.ref_end_idx]
            right = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type == "substitute":
                counters[0].update(zip(left, right, strict=True))
            counters[1].update(right if chunk.type == "insert" else ())
            counters[2].update(left if chunk.type == "delete" else ())
    return counters


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_confusions_are_jiwers(pairs):
    errors = tally(pairs)
    expected = jiwers([(" ".join(one), " ".join(other)) for one, other in pairs])
    assert (errors.substitutions, errors.insertions, errors.deletions) == expected
    assert errors.num_reference == sum(len(one) for one, _ in pairs)


def test_confusions_of_real_sentences_are_jiwers():
    errors = tally([(one.split(), other.split()) for one, other in PAIRS])
    assert (errors.substitutions, errors.insertions, errors.deletions) == jiwers(PAIRS)
    expected = jiwer.process_characters([one for one, _ in PAIRS], [other for _, other in PAIRS])
    errors = tally(PAIRS)
    assert errors.substitutions.total() == expected.substitutions
    assert (errors.insertions.total(), errors.deletions.total()) == (expected.insertions, expected.deletions)


@settings(max_examples=200, deadline=None)
@given(texts, texts)
@example("", "")
def test_joined_pieces_are_the_texts(reference, prediction):
    parts = pieces(reference, prediction)
    assert "".join(one for _, one, _ in parts) == reference and "".join(other for *_, other in parts) == prediction
    for kind, one, other in parts:
        assert (kind == "equal") == (one == other) and (kind == "insert") == (not one)
        assert (kind == "delete") == (not other) and (kind != "substitute" or len(one) == len(other))
    by_word = pieces(reference, prediction, by_word=True)
    assert " ".join(filter(None, (one for _, one, _ in by_word))) == " ".join(reference.split())


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("abc", 3),
        ("혈압", 4),
        ("漢字", 4),
        ("é", 1),
        ("e\u0301", 1),
        ("ＡＢ", 4),
        ("ｱ", 1),
        ("a\u200bb", 2),
        ("", 0),
        ("😀", 2),
    ],
)
def test_display_width_is_that_of_terminals(text, columns):
    """rich, which lays out tables in terminals, counts the same."""
    from rich.cells import cell_len

    assert display_width(text) == columns
    assert text == "a\u200bb" or cell_len(text) == columns


@settings(max_examples=150, deadline=None)
@given(texts, texts, st.sampled_from(["", " "]))
def test_columns_line_up(reference, prediction, joint):
    """Every unit of the reference has its answer and its mark below it in the same column, however wide they are."""
    units = (reference, prediction) if not joint else (reference.split(), prediction.split())
    shown = aligned_lines(*units, width=10_000, joint=joint).split("\n")
    top, below, marks = ([*shown, "", ""][index] for index in range(3))
    column = 5
    for step in align(*units):
        size = max(display_width(step.reference), display_width(step.prediction), 1)
        for line, unit in ((top, step.reference), (below, step.prediction)):
            assert cut(line, column, size).strip() == ((unit.strip()) or ("" if unit else "*" * size))
        assert (
            cut(marks, column, size).strip()
            == {"equal": "", "substitute": "S", "insert": "I", "delete": "D"}[step.kind]
        )
        column += size + len(joint)


def cut(line: str, start: int, size: int) -> str:
    """The part of a line that a terminal shows in some columns."""
    visible, column = "", 0
    for char in line:
        visible += char if start <= column < start + size else ""
        column += display_width(char)
    return visible


def test_aligned_lines():
    shown = aligned_lines(["혈압", "이", "120", "매우", "높다"], ["혈압", "이는", "매우", "높다", "요"], width=60)
    assert shown == "\n".join(
        ["REF: 혈압 이   120 매우 높다 **", "HYP: 혈압 이는 *** 매우 높다 요", "          S    D             I"]
    )
    long = aligned_lines(["가나다라"] * 30, ["가나다"] * 30, width=60)
    assert max(display_width(line) for line in long.split("\n")) <= 60 and long.count("REF:") == 5
    endless = aligned_lines(["가" * 90, "나"], ["가" * 90, "다" * 80], width=60).split("\n")
    assert max(map(display_width, endless)) <= 60 and endless[0] == "REF: " + "가" * 25 + "…(90)"
    assert endless[-1] == "     S" and "다…(80)" in endless[-2]


def test_lengths_and_changes():
    slices = length_slices(["", "가 나", "가나다라마바", "x" * 101])
    assert slices == {"length": {"empty": [0], "1-5 chars": [1], "6-10 chars": [2], "over 100 chars": [3]}}
    before = [{"error": e, "exact": e == 0} for e in (0.0, 0.0, 0.5, 0.5, 0.5, 0.2)]
    after = [{"error": e, "exact": e == 0} for e in (0.1, 0.9, 0.0, 0.6, 0.1, 0.2)]
    assert changed_rows(before, after) == {"broken": [1, 0], "mended": [2], "worse": [3], "better": [4]}
