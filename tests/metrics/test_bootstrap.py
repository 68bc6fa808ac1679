"""Bootstrap intervals: equal to theory where it is known, wider over speakers, fast, and reproducible by seed."""

import time

import numpy as np
import pytest

from voxray.metrics.bootstrap import Groups, group_by_speaker, interval, resampled_sums, resamples_for
from voxray.metrics.counts import Ratio


def utterances(num: int) -> Groups:
    return Groups(np.arange(num), num, "utterance")


def ratio_interval(numerator: np.ndarray, denominator: np.ndarray, groups: Groups, num_resamples: int = 4000) -> tuple:
    columns = Ratio(numerator, denominator, len(numerator)).columns
    return interval(Ratio.from_sums(resampled_sums(columns, groups, seed=1, num_resamples=num_resamples)))


def test_interval_of_a_mean_equals_theory():
    """The interval of a mean is 1.96 standard errors on either side."""
    values = np.random.default_rng(0).binomial(1, 0.3, 1500).astype(float)
    low, high = ratio_interval(values, np.ones_like(values), utterances(1500), 10_000)
    error = values.std() / np.sqrt(1500)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_coverage_of_intervals():
    """Error rates of random corpora with utterances of different lengths and a known true rate."""
    rng, num_covering = np.random.default_rng(2), 0
    for _ in range(200):
        lengths = rng.integers(5, 40, 120)
        low, high = ratio_interval(
            rng.binomial(lengths, 0.1).astype(float), lengths.astype(float), utterances(120), 500
        )
        num_covering += low <= 0.1 <= high
    assert 0.89 <= num_covering / 200 <= 0.99


def test_speakers_are_resampled_with_all_their_utterances():
    """20 speakers err on all utterances or on none: resampling utterances gives intervals that are too narrow."""
    rows = [{"speaker": f"s{index // 50}"} for index in range(1000)]
    wrong = np.array([(index // 50) % 2 for index in range(1000)], float)
    groups = group_by_speaker(rows)
    assert (groups.unit, groups.num) == ("speaker", 20)
    over_speakers = ratio_interval(wrong, np.ones(1000), groups)
    over_utterances = ratio_interval(wrong, np.ones(1000), utterances(1000))
    assert over_speakers[1] - over_speakers[0] > 4 * (over_utterances[1] - over_utterances[0])


def test_rows_without_a_speaker_are_groups_of_one():
    rows = [{"speaker": "a"}, {"speaker": "a"}, {"speaker": "b"}, {"speaker": None}, {}, {"speaker": ""}]
    groups = group_by_speaker(rows)
    assert groups.unit == "speaker" and groups.num == 5 and groups.index.tolist() == [0, 0, 1, 2, 3, 4]
    for rows in ([{"speaker": "a"}] * 3, [{}] * 3, [{"speaker": "a"}, {}]):
        assert group_by_speaker(rows).unit == "utterance" and group_by_speaker(rows).num == len(rows)


def test_sums_per_draw():
    columns = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    sums = resampled_sums(columns, Groups(np.array([0, 0, 1]), 2, "speaker"), seed=3, num_resamples=500)
    assert sums.shape == (500, 2) and (sums[:, 1] == 10 * sums[:, 0]).all()
    assert set(sums[:, 0]) == {6.0, 7.0, 8.0}, "twice the first, one each, twice the second"
    assert abs((sums[:, 0] == 7).mean() - 0.5) < 0.1


def test_draws_depend_on_the_seed_and_not_on_the_system():
    rng = np.random.default_rng(0)
    first, second = rng.random((50, 1)), rng.random((50, 1))
    sums = resampled_sums(first, utterances(50), seed=7, num_resamples=300)
    assert (sums == resampled_sums(first, utterances(50), seed=7, num_resamples=300)).all()
    assert (sums != resampled_sums(first, utterances(50), seed=8, num_resamples=300)).any()
    both = resampled_sums(np.hstack([first, second]), utterances(50), seed=7, num_resamples=300)
    assert np.allclose(both[:, :1], sums)
    assert np.allclose(both[:, 1:], resampled_sums(second, utterances(50), seed=7, num_resamples=300))


def test_zero_denominators_give_no_interval():
    assert interval(np.array([np.nan, np.nan])) == (None, None) == interval(np.array([]))
    assert ratio_interval(np.zeros(4), np.zeros(4), utterances(4)) == (None, None)
    low, high = ratio_interval(np.array([1.0, 0.0]), np.array([1.0, 0.0]), utterances(2))
    assert low == high == 1, "draws without the scored row are left out"


def test_many_groups_get_fewer_draws():
    assert resamples_for(2000, 10_000) == 10_000 and resamples_for(1_000_000, 10_000) == 1000
    assert resamples_for(1_000_000, 500) == 500
    start_sec = time.perf_counter()
    columns = np.random.default_rng(0).random((2000, 12))
    assert resampled_sums(columns, utterances(2000), num_resamples=10_000).shape == (10_000, 12)
    assert time.perf_counter() - start_sec < 5, "well under a second on a free machine"
