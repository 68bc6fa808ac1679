"""Bootstrap intervals: right where the answer is known, wider over speakers, quick, and the same for one seed."""

import time

import numpy as np
import pytest

from voxray.metrics.bootstrap import Groups, group_by_speaker, interval, resampled_sums, resamples_for
from voxray.metrics.counts import Ratio


def utterances(num: int) -> Groups:
    return Groups(np.arange(num), num, "utterance")


def ratio_interval(top: np.ndarray, bottom: np.ndarray, groups: Groups, num_resamples: int = 4000) -> tuple:
    columns = Ratio(top, bottom, len(top)).columns
    return interval(Ratio.of_sums(resampled_sums(columns, groups, seed=1, num_resamples=num_resamples)))


def test_an_interval_is_that_of_theory():
    """A mean's is its standard error times 1.96 on either side."""
    values = np.random.default_rng(0).binomial(1, 0.3, 1500).astype(float)
    low, high = ratio_interval(values, np.ones_like(values), utterances(1500), 10_000)
    error = values.std() / np.sqrt(1500)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Error rates of drawn corpora, of utterances of different lengths, whose true rate is known."""
    rng, held = np.random.default_rng(2), 0
    for _ in range(200):
        lengths = rng.integers(5, 40, 120)
        low, high = ratio_interval(
            rng.binomial(lengths, 0.1).astype(float), lengths.astype(float), utterances(120), 500
        )
        held += low <= 0.1 <= high
    assert 0.89 <= held / 200 <= 0.99


def test_speakers_are_drawn_whole():
    """Twenty speakers that each err on all of their utterances or on none: over utterances it looks certain."""
    rows = [{"speaker": f"s{at // 50}"} for at in range(1000)]
    wrong = np.array([(at // 50) % 2 for at in range(1000)], float)
    groups = group_by_speaker(rows)
    assert (groups.unit, groups.num) == ("speaker", 20)
    over_speakers = ratio_interval(wrong, np.ones(1000), groups)
    over_utterances = ratio_interval(wrong, np.ones(1000), utterances(1000))
    assert over_speakers[1] - over_speakers[0] > 4 * (over_utterances[1] - over_utterances[0])


def test_rows_without_a_speaker_are_drawn_alone():
    rows = [{"speaker": "a"}, {"speaker": "a"}, {"speaker": "b"}, {"speaker": None}, {}, {"speaker": ""}]
    groups = group_by_speaker(rows)
    assert groups.unit == "speaker" and groups.num == 5 and groups.index.tolist() == [0, 0, 1, 2, 3, 4]
    for one in ([{"speaker": "a"}] * 3, [{}] * 3, [{"speaker": "a"}, {}]):
        assert group_by_speaker(one).unit == "utterance" and group_by_speaker(one).num == len(one)


def test_sums_are_of_whole_draws():
    columns = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    sums = resampled_sums(columns, Groups(np.array([0, 0, 1]), 2, "speaker"), seed=3, num_resamples=500)
    assert sums.shape == (500, 2) and (sums[:, 1] == 10 * sums[:, 0]).all()
    assert set(sums[:, 0]) == {6.0, 7.0, 8.0}, "twice the first, one each, twice the second"
    assert abs((sums[:, 0] == 7).mean() - 0.5) < 0.1


def test_the_seed_decides_and_systems_are_drawn_alike():
    rng = np.random.default_rng(0)
    one, other = rng.random((50, 1)), rng.random((50, 1))
    single = resampled_sums(one, utterances(50), seed=7, num_resamples=300)
    assert (single == resampled_sums(one, utterances(50), seed=7, num_resamples=300)).all()
    assert (single != resampled_sums(one, utterances(50), seed=8, num_resamples=300)).any()
    both = resampled_sums(np.hstack([one, other]), utterances(50), seed=7, num_resamples=300)
    assert np.allclose(both[:, :1], single)
    assert np.allclose(both[:, 1:], resampled_sums(other, utterances(50), seed=7, num_resamples=300))


def test_nothing_below_is_no_number():
    assert interval(np.array([np.nan, np.nan])) == (None, None) == interval(np.array([]))
    assert ratio_interval(np.zeros(4), np.zeros(4), utterances(4)) == (None, None)
    low, high = ratio_interval(np.array([1.0, 0.0]), np.array([1.0, 0.0]), utterances(2))
    assert low == high == 1, "draws without the scored row are left out"


def test_many_groups_take_fewer_draws():
    assert resamples_for(2000, 10_000) == 10_000 and resamples_for(1_000_000, 10_000) == 1000
    assert resamples_for(1_000_000, 500) == 500
    began = time.perf_counter()
    columns = np.random.default_rng(0).random((2000, 12))
    assert resampled_sums(columns, utterances(2000), num_resamples=10_000).shape == (10_000, 12)
    assert time.perf_counter() - began < 5, "well under a second on a free machine"
