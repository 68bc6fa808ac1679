"""Intervals and p-values against full enumeration in plain Python, textbook values, and simulated runs."""

from itertools import product

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from voxray.comparison import significance as paired
from voxray.comparison.significance import MIN_SPEAKERS, compare_rows, holm, resampling_units
from voxray.metrics.bootstrap import Groups
from voxray.metrics.counts import Ratio
from voxray.metrics.texts import score_texts

# Edits of two systems on seven utterances, and reference lengths; two rows have the same speaker.
FIRST = [3, 0, 4, 2, 5, 1, 2]
SECOND = [1, 0, 5, 1, 2, 1, 0]
LENGTHS = [10, 4, 8, 9, 12, 6, 7]
SPEAKERS = [0, 0, 1, 2, 3, 4, 4]


def ratio(values, lengths) -> list[Ratio]:
    return [Ratio(np.array(values, float), np.array(lengths, float), len(values))]


def alone(num: int) -> Groups:
    return Groups(np.arange(num), num, "utterance")


def grouped(numbers) -> Groups:
    return Groups(np.array(numbers), max(numbers) + 1, "speaker")


def compared(first, second, lengths, units, **options):
    """One metric; the divisor of the second run may differ."""
    first_lengths, second_lengths = lengths if isinstance(lengths, tuple) else (lengths, lengths)
    return compare_rows(ratio(first, first_lengths), ratio(second, second_lengths), units, **options)[0]


def exchanged(first, second, first_lengths, second_lengths, speakers) -> float:
    """p-value by going through all exchanges with loops: how many give a difference as large as the real one."""
    names, sizes = sorted(set(speakers)), []
    for swaps in product((False, True), repeat=len(names)):
        sums = [0.0] * 4
        for index, speaker in enumerate(speakers):
            row = (first[index], first_lengths[index], second[index], second_lengths[index])
            sums = [a + b for a, b in zip(sums, row[2:] + row[:2] if swaps[speaker] else row, strict=True)]
        sizes.append(abs(sums[2] / sums[3] - sums[0] / sums[1]))
    return sum(size >= sizes[0] - 1e-12 for size in sizes) / len(sizes)


@pytest.mark.parametrize("other", [LENGTHS, [9, 4, 9, 9, 12, 5, 8]], ids=["same divisor", "divisors of their own"])
@pytest.mark.parametrize("speakers", [SPEAKERS, list(range(7))], ids=["speakers", "rows"])
def test_p_value_equals_full_enumeration(speakers, other):
    result = compared(FIRST, SECOND, (LENGTHS, other), grouped(speakers))
    assert result.p == exchanged(FIRST, SECOND, LENGTHS, other, speakers)
    assert result.first == sum(FIRST) / sum(LENGTHS) and result.second == sum(SECOND) / sum(other)
    assert (result.num_rows, result.num_units) == (7, len(set(speakers)))


# Twenty rows, and what scipy 1.17.1 says of them: permutation_test(..., permutation_type="samples", n_resamples=inf) on
# the difference of the two rates, and bootstrap(..., paired=True, method="percentile", n_resamples=1_000_000).
SCIPY_FIRST = [3, 0, 4, 2, 5, 1, 2, 3, 1, 0, 6, 2, 4, 1, 2, 5, 3, 0, 1, 2]
SCIPY_SECOND = [1, 0, 5, 1, 2, 1, 0, 3, 0, 1, 3, 2, 2, 1, 1, 2, 3, 0, 0, 1]
SCIPY_LENGTHS = [10, 4, 8, 9, 12, 6, 7, 9, 5, 6, 14, 8, 11, 6, 7, 10, 9, 4, 5, 8]
SCIPY_P, SCIPY_INTERVAL = 0.0078125, (-0.16853932584269662, -0.05185185185185185)


def test_values_equal_scipy(monkeypatch):
    """Exactly if all exchanges are enumerated; within four standard errors if they are drawn."""
    result = compared(SCIPY_FIRST, SCIPY_SECOND, SCIPY_LENGTHS, alone(20), num_resamples=100_000)
    assert result.p == SCIPY_P and result.is_shown
    assert result.interval == pytest.approx(SCIPY_INTERVAL, abs=0.002)
    monkeypatch.setattr(paired, "MAX_EXACT_UNITS", 0)
    drawn = compared(SCIPY_FIRST, SCIPY_SECOND, SCIPY_LENGTHS, alone(20), num_resamples=100_000)
    assert drawn.p != SCIPY_P
    assert drawn.p == pytest.approx(SCIPY_P, abs=4 * (SCIPY_P * (1 - SCIPY_P) / 100_000) ** 0.5)


def test_equal_runs_and_hopeless_ones():
    same = compared(FIRST, FIRST, LENGTHS, alone(7))
    assert same.p == 1 and same.difference == 0 and same.interval == (0, 0) and not same.is_shown
    rng = np.random.default_rng(0)
    lengths = np.full(200, 10)
    worlds_apart = compared(rng.integers(4, 9, 200), rng.integers(0, 3, 200), lengths, alone(200))
    assert worlds_apart.p == pytest.approx(1 / 10_001) and worlds_apart.is_shown, "drawn p-values are never 0"
    one = compared([3], [1], [10], alone(1))
    assert one.interval is None and one.p == 1 and not one.is_shown, "one row shows nothing"


def test_interval_equals_full_enumeration():
    """Four units can be drawn in 256 ways: the percentiles of the difference over all of them, weighted alike."""
    first, second, lengths = FIRST[:4], SECOND[:4], LENGTHS[:4]
    all_draws = []
    for drawn in product(range(4), repeat=4):
        length = sum(lengths[index] for index in drawn)
        all_draws.append((sum(second[index] for index in drawn) - sum(first[index] for index in drawn)) / length)
    result = compared(first, second, lengths, alone(4), num_resamples=200_000)
    low, high = np.quantile(all_draws, [0.025, 0.975])
    assert result.interval == pytest.approx((low, high), abs=0.004)
    expected = np.quantile(
        [sum(first[index] for index in d) / sum(lengths[index] for index in d) for d in product(range(4), repeat=4)],
        [0.025, 0.975],
    )
    assert result.first_interval == pytest.approx(tuple(expected), abs=0.004)


def test_draws_are_reproducible():
    again = [compared(FIRST, SECOND, LENGTHS, alone(7), seed=seed, num_resamples=500) for seed in (5, 5, 6)]
    assert again[0] == again[1] != again[2]


def test_rows_without_the_metric_are_left_out():
    """An empty reference has no error rate: as if the row was not there."""
    result = compared([*FIRST, 0], [*SECOND, 0], [*LENGTHS, 0], alone(8), num_resamples=50_000)
    without = compared(FIRST, SECOND, LENGTHS, alone(7), num_resamples=50_000)
    assert (result.first, result.second, result.p, result.num_rows) == (without.first, without.second, without.p, 7)
    nothing = compare_rows(ratio([0, 0], [0, 0]), ratio([0, 0], [0, 0]), alone(2))
    assert nothing == [None]


REFERENCES = [
    "The patient has had a high fever since last night.",
    "Please take this medicine three times a day after meals.",
    "The blood pressure is much too high today.",
    "I would like to see the results of the blood test.",
    "Does it hurt when you take a deep breath?",
    "Come back in two weeks for another check.",
]
WORSE = [
    "The patient has fever since last night.",
    "Please take this medicine three time a day.",
    "The pressure of the blood is high today.",
    "I want to see the result of blood tests.",
    "Does it hurt when you breathe deep?",
    "",
]
BETTER = [
    "The patient has had a fever since last night.",
    "Please take this three times a day after meals.",
    "The blood pressure is too high today.",
    "I would like to see the results of the test.",
    "Does it hurt when you take deep breaths?",
    "Come back in two weeks for a check.",
]


def sacrebleu_score(metric, answers, rows=range(6)) -> float:
    rows = list(rows)
    return metric.corpus_score([answers[row] for row in rows], [[REFERENCES[row] for row in rows]]).score


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_bleu_and_chrf_are_compared_like_sacrebleus_values(name):
    """The p-value by going through all exchanges, and the intervals by drawing rows, with sacrebleu's corpus scores."""
    metric = {"bleu": BLEU(), "chrf": CHRF()}[name]
    runs = [score_texts("ast", list(zip(REFERENCES, each, strict=True)))[0][name] for each in (WORSE, BETTER)]
    [result] = compare_rows([runs[0]], [runs[1]], alone(6), num_resamples=20_000)
    assert (result.first, result.second) == (sacrebleu_score(metric, WORSE), sacrebleu_score(metric, BETTER))
    assert (result.num_rows, result.num_units) == (6, 6)
    sizes = []
    for swaps in product((False, True), repeat=6):
        pairs = [
            pair[::-1] if swap else pair for swap, pair in zip(swaps, zip(WORSE, BETTER, strict=True), strict=True)
        ]
        one, other = zip(*pairs, strict=True)
        sizes.append(abs(sacrebleu_score(metric, other) - sacrebleu_score(metric, one)))
    assert result.p == sum(size >= sizes[0] - 1e-9 for size in sizes) / 64 and result.p < 0.2
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, 6, 6) for _ in range(1500)]
    drawn = np.array([[sacrebleu_score(metric, answers, draw) for answers in (WORSE, BETTER)] for draw in draws])
    for interval, values in (
        (result.first_interval, drawn[:, 0]),
        (result.second_interval, drawn[:, 1]),
        (result.interval, drawn[:, 1] - drawn[:, 0]),
    ):
        assert interval == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=3)


def test_metrics_of_different_kinds_are_compared_together():
    """Each as it is alone."""
    texts = [score_texts("ast", list(zip(REFERENCES, each, strict=True)))[0] for each in (WORSE, BETTER)]
    ratios = ratio(FIRST[:6], LENGTHS[:6])[0], ratio(SECOND[:6], LENGTHS[:6])[0]
    runs = [[rate, *of_run.values()] for rate, of_run in zip(ratios, texts, strict=True)]
    together = compare_rows(*runs, alone(6), num_resamples=500)
    assert together == [
        compare_rows([one], [other], alone(6), num_resamples=500)[0] for one, other in zip(*runs, strict=True)
    ]


def simulated(rng, num_speakers: int, rows_each: int, spread: float, effect: float = 0.0):
    """Error counts of two systems: speakers differ in how much the second one helps them."""
    index = np.repeat(np.arange(num_speakers), rows_each)
    lengths = rng.integers(5, 40, len(index))
    easy = rng.normal(0, spread, num_speakers)[index]
    first = rng.binomial(lengths, 0.3)
    second = rng.binomial(lengths, np.clip(0.3 + effect + easy, 0.01, 0.99))
    return first, second, lengths, index


def test_coverage_of_intervals():
    """Rows on their own, and rows of speakers who differ: there drawing rows would be sure of far too much."""
    rng = np.random.default_rng(1)
    covered = {"rows": 0, "speakers": 0, "rows of speakers": 0}
    times = 300
    for _ in range(times):
        first, second, lengths, _ = simulated(rng, 80, 1, 0.0, -0.05)
        low, high = compared(first, second, lengths, alone(80), num_resamples=400).interval
        covered["rows"] += low <= -0.05 <= high
        first, second, lengths, index = simulated(rng, 40, 8, 0.08, -0.05)
        for name, units in (("speakers", grouped(index)), ("rows of speakers", alone(len(index)))):
            low, high = compared(first, second, lengths, units, num_resamples=400).interval
            covered[name] += low <= -0.05 <= high
    shares = {name: number / times for name, number in covered.items()}
    assert 0.91 < shares["rows"] < 0.98 and 0.91 < shares["speakers"] < 0.98
    assert shares["rows of speakers"] < 0.8


def test_false_positive_rate_of_equal_systems():
    rng = np.random.default_rng(2)
    p_values = []
    for _ in range(400):
        first, second, lengths, index = simulated(rng, 20, 5, 0.0)
        p_values.append(compared(first, second, lengths, grouped(index), num_resamples=400).p)
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.06)


def test_holm_equals_r():
    """p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") of R gives these."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1] and holm([]) == [] and holm([0.2]) == [0.2]


def test_few_speakers_are_not_resampled():
    def rows(num):
        return [{"speaker": f"s{index % num}"} for index in range(60)]

    assert (
        resampling_units(rows(MIN_SPEAKERS)).unit == "speaker"
        and resampling_units(rows(MIN_SPEAKERS)).num == MIN_SPEAKERS
    )
    assert (
        resampling_units(rows(MIN_SPEAKERS - 1)).unit == "utterance"
        and resampling_units(rows(MIN_SPEAKERS - 1)).num == 60
    )
    assert resampling_units([{"speaker": None}, {}]).num == 2
