"""Contract 3, the plan: the order of the rows, the shares of the tasks, and one sequence for any number of workers."""

import collections
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxray.batches.packing import Batching
from voxray.batches.plan import MICROBATCH_STREAM, ORDER_STREAM, VARIANT_STREAM, Microbatch, Plan, _stream
from voxray.core.errors import SettingsError
from voxray.core.tasks import POSITIONAL_TASKS, TASKS

CODES = {name: code for code, name in enumerate(TASKS)}


def make_plan(
    *counts: int,
    weights: dict[str, float] | None = None,
    seed: int = 0,
    microbatch_size: int = 2,
    microbatches_per_step: int = 3,
    drop_last: bool = False,
) -> Plan:
    """A plan over so many rows of asr, sqa, tqa, mixed; row numbers start at 100 and have gaps."""
    task = np.random.default_rng(7).permutation(np.repeat(np.arange(len(counts), dtype=np.int8), counts))
    batching = Batching("fixed", microbatch_size=microbatch_size)
    return Plan(task, 100 + 3 * np.arange(len(task)), weights, seed, batching, microbatches_per_step, drop_last)


def tasks_of(plan: Plan, rows: np.ndarray) -> collections.Counter[str]:
    code_of = dict(zip(plan.rows.tolist(), plan.task.tolist(), strict=True))
    return collections.Counter(list(TASKS)[code_of[row]] for row in rows.tolist())


def counted(microbatches: list[Microbatch]) -> list[int]:
    return [row for microbatch in microbatches if not microbatch.is_filler for row in microbatch.rows.tolist()]


def same(left: list[Microbatch], right: list[Microbatch]) -> bool:
    """Whether two lists have equal microbatches in the same order."""
    pairs = list(zip(left, right, strict=True))
    return all(a.number == b.number and a.is_filler == b.is_filler and np.array_equal(a.rows, b.rows) for a, b in pairs)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(0, 20), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 2**40)
)
def test_every_row_once_per_epoch(asr: int, tqa: int, microbatch_size: int, count: int, drop_last: bool, seed: int):
    size = microbatch_size * count
    if drop_last and asr + tqa < size:
        return
    sizes = {"microbatch_size": microbatch_size, "microbatches_per_step": count}
    plan = make_plan(asr, 0, tqa, seed=seed, **sizes, drop_last=drop_last)
    for epoch in range(3):
        first = plan.total_steps(epoch)
        steps = [plan.step_microbatches(step) for step in range(first, first + plan.steps_in_epoch(epoch))]
        drawn = [row for step in steps for row in counted(step)]
        assert len(set(drawn)) == len(drawn)
        if drop_last:
            assert len(drawn) == len(plan.rows) // size * size and set(drawn) <= set(plan.rows.tolist())
        else:
            assert sorted(drawn) == plan.rows.tolist()
        assert all(len(step) == count and all(len(microbatch.rows) for microbatch in step) for step in steps)
        assert all(len(counted(step)) == size for step in steps[:-1])


def test_the_order_is_redrawn_each_epoch_and_with_each_seed():
    plan = make_plan(30, 30)
    epochs = [plan.epoch_rows(epoch).tolist() for epoch in range(4)]
    assert all(left != right for left, right in pairwise([*epochs, make_plan(30, 30, seed=1).epoch_rows(0).tolist()]))
    assert epochs[0] != sorted(epochs[0])
    weighted = make_plan(30, 30, weights={"asr": 1, "sqa": 1})
    assert weighted.epoch_rows(0).tolist() != weighted.epoch_rows(1).tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 400), min_size=3, max_size=3), st.lists(st.floats(0, 5), min_size=3, max_size=3))
def test_shares_by_largest_remainder(counts: list[int], shares: list[float]):
    if sum(shares) < 0.01:
        return
    weights = dict(zip(POSITIONAL_TASKS, shares, strict=True))
    plan = make_plan(*counts, weights=weights)
    total = sum(counts)
    exact = {name: total * share / sum(shares) for name, share in weights.items()}
    for epoch in (0, 3):
        drawn = plan.epoch_rows(epoch)
        draws = tasks_of(plan, drawn)
        assert len(drawn) == total
        assert all(abs(draws[name] - exact[name]) < 1 for name in weights)
        if total >= 200:
            assert all(abs(draws[name] / total - exact[name] / total) <= 0.01 for name in weights)
        # Rounded up are those that lost most by rounding down.
        rest = {name: exact[name] - int(exact[name]) for name in weights}
        up = [rest[name] for name in weights if draws[name] > int(exact[name])]
        down = [rest[name] for name in weights if draws[name] == int(exact[name])]
        assert not up or not down or min(up) >= max(down) - 1e-9


def test_shares_of_a_known_case():
    plan = make_plan(70, 20, 10, weights={"asr": 1.0, "sqa": 1.5, "tqa": 1.2})
    assert tasks_of(plan, plan.epoch_rows(0)) == {"asr": 27, "sqa": 41, "tqa": 32}  # 27.03, 40.54, 32.43


def test_a_task_without_weight_is_not_drawn():
    plan = make_plan(10, 10, 10, weights={"asr": 1, "tqa": 0})
    assert tasks_of(plan, plan.epoch_rows(0)) == {"asr": 30}


@pytest.mark.parametrize("weights", [{"asr": 1, "sqa": 1, "tqa": 1}, {"asr": 0.01, "sqa": 5, "tqa": 1.3}, {"sqa": 1}])
def test_each_task_runs_through_its_own_rows(weights: dict[str, float]):
    plan = make_plan(53, 7, 20, weights=weights)
    drawn: dict[int, int] = dict.fromkeys(plan.rows.tolist(), 0)
    for epoch in range(41):
        for row in plan.epoch_rows(epoch).tolist():
            drawn[row] += 1
        for name, rows in plan.rows_by_task.items():
            times = {drawn[row] for row in rows.tolist()}
            assert max(times) - min(times) <= 1, (epoch, name, times)
    assert {drawn[row] > 0 for row in plan.rows_by_task["sqa"].tolist()} == {True}


def test_a_task_is_shuffled_anew_each_time_it_starts_over():
    plan = make_plan(40, weights={"asr": 1}, microbatch_size=40, microbatches_per_step=1)
    rounds = [plan._draws("asr", start, 40).tolist() for start in (0, 40, 80)]
    assert [sorted(part) for part in rounds] == [plan.rows.tolist()] * 3
    assert rounds[0] != rounds[1] != rounds[2]
    assert plan._draws("asr", 30, 20).tolist() == rounds[0][30:] + rounds[1][:10]


@pytest.mark.parametrize("weights", [None, {"asr": 2, "sqa": 1, "tqa": 1}])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches_per_step", [1, 3, 8])
def test_the_same_sequence_for_any_number_of_workers(weights, world_size: int, microbatches_per_step: int):
    plan = make_plan(21, 9, 8, weights=weights, microbatches_per_step=microbatches_per_step)
    for step in range(2 * plan.steps_in_epoch(0) + 1):
        whole = plan.step_microbatches(step)
        ranks = [plan.rank_microbatches(step, rank, world_size) for rank in range(world_size)]
        assert len({len(microbatches) for microbatches in ranks}) == 1
        assert all(microbatches and all(len(microbatch.rows) for microbatch in microbatches) for microbatches in ranks)
        merged = [microbatch for microbatches in ranks for microbatch in microbatches if not microbatch.is_filler]
        merged.sort(key=lambda microbatch: microbatch.number)
        assert same(merged, [microbatch for microbatch in whole if not microbatch.is_filler])
        # Round robin: what the ranks hold, read in turns, is the step itself, and only fillers follow.
        in_turns = [microbatches[turn] for turn in range(len(ranks[0])) for microbatches in ranks]
        assert same(in_turns[: len(whole)], whole)
        assert not any(not microbatch.is_filler for microbatch in in_turns[len(whole) :])


@pytest.mark.parametrize("weights", [None, {"asr": 1, "sqa": 3}])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batch_4_holds_the_rows_of_2_times_batch_2(weights, drop_last: bool):
    one = make_plan(17, 8, weights=weights, microbatch_size=4, microbatches_per_step=1, drop_last=drop_last)
    two = make_plan(17, 8, weights=weights, microbatch_size=2, microbatches_per_step=2, drop_last=drop_last)
    assert one.steps_in_epoch(0) == two.steps_in_epoch(0)
    for step in range(3 * one.steps_in_epoch(0)):
        assert counted(one.step_microbatches(step)) == counted(two.step_microbatches(step))


def test_the_last_step_of_an_epoch():
    smaller = make_plan(14, microbatch_size=2, microbatches_per_step=3)
    assert smaller.steps_in_epoch(0) == 3
    microbatches = smaller.step_microbatches(2)
    assert [len(microbatch.rows) for microbatch in microbatches] == [2, 1, 1] and [
        microbatch.is_filler for microbatch in microbatches
    ] == [False, True, True]
    assert [microbatch.number for microbatch in microbatches] == [0, 1, 2]
    assert make_plan(14, drop_last=True).steps_in_epoch(0) == 2
    assert make_plan(12).steps_in_epoch(0) == make_plan(12, drop_last=True).steps_in_epoch(0) == 2


@pytest.mark.parametrize("weights", [None, {"asr": 1, "sqa": 3}])
def test_a_step_does_not_depend_on_the_steps_before(weights):
    in_turn = make_plan(17, 8, weights=weights)
    steps = [in_turn.step_microbatches(step) for step in range(20)]
    jumping = make_plan(17, 8, weights=weights)
    for step in [19, 0, 7, 7, 13, 1, 18, 3]:
        assert same(jumping.step_microbatches(step), steps[step])
        assert same(make_plan(17, 8, weights=weights).step_microbatches(step), steps[step])


def test_a_plan_pinned_to_its_values():
    """A run that resumes under a newer numpy or voxray must draw what it would have drawn before."""
    plan = make_plan(6, 3, 3, weights={"asr": 1, "sqa": 1, "tqa": 1}, seed=5)
    assert [plan.epoch_rows(epoch).tolist() for epoch in range(2)] == PINNED
    assert make_plan(4, seed=5).epoch_rows(0).tolist() == PINNED_UNWEIGHTED


PINNED = [
    [106, 121, 133, 118, 115, 118, 103, 124, 109, 130, 130, 112],
    [133, 127, 112, 121, 100, 100, 130, 118, 103, 106, 106, 121],
]
PINNED_UNWEIGHTED = [109, 103, 100, 106]


def test_a_task_more_leaves_the_plan_of_the_others_as_it_was(monkeypatch):
    """And its own draws come from a stream of their own, not from one that orders an epoch or draws variants."""
    monkeypatch.setitem(TASKS, "more", TASKS["tqa"])
    test_a_plan_pinned_to_its_values()
    streams = [_stream(code) for code in range(len(TASKS))]
    assert len({*streams, ORDER_STREAM, VARIANT_STREAM, MICROBATCH_STREAM}) == len(TASKS) + 3
    weighted = make_plan(0, 0, 0, 7, 0, 0, 0, 7, weights={"aac": 1, "more": 2})
    assert tasks_of(weighted, weighted.epoch_rows(0)) == {"aac": 5, "more": 9}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 0), {"weights": {"asr": 1, "sqa": 0.5}}, "--task_weights: sqa has weight 0.5, but there is no sqa row"),
        ((), {}, "--train_jsonl: no row to train on"),
        ((5,), {"drop_last": True}, "--drop_last: 5 rows do not fill one step of 6"),
    ],
)
def test_plans_that_cannot_be(arguments: tuple[int, ...], options: dict, message: str):
    with pytest.raises(SettingsError, match=message):
        make_plan(*arguments, **options)


def test_a_weight_of_zero_needs_no_rows():
    assert make_plan(4, weights={"asr": 1, "tqa": 0}).steps_in_epoch(0) == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 200), st.integers(1, 30), st.floats(0.01, 0.9), st.booleans(), st.integers(0, 2**40))
def test_a_share_of_every_epoch_is_replayed(count: int, num_replayed: int, share: float, weighted: bool, seed: int):
    """All rows of the training once per epoch, and the replayed ones in turn, none twice before all were drawn."""
    rows, task = np.arange(count + num_replayed), np.zeros(count + num_replayed, np.int8)
    weights = {"asr": 1.0} if weighted else None
    options = {"is_replay": rows >= count, "replay_share": share}
    plan = Plan(task, rows, weights, seed, Batching("fixed", microbatch_size=2), 3, **options)
    drawn = [plan.epoch_rows(epoch) for epoch in range(4)]
    replayed = np.concatenate([epoch_rows[epoch_rows >= count] for epoch_rows in drawn])
    per_epoch = max(1, round(count * share / (1 - share)))
    for epoch_rows in drawn:
        assert sorted(epoch_rows[epoch_rows < count].tolist()) == list(range(count))
        assert (epoch_rows >= count).sum() == per_epoch
    times = np.bincount(replayed - count, minlength=num_replayed)
    assert times.max() - times.min() <= 1
    without = Plan(task[:count], rows[:count], weights, seed, Batching("fixed", microbatch_size=2), 3)
    assert without.rows_by_task.keys() == {"asr"}
