"""Contract 3, the plan: every row in its turn, shares held, and the same sequence whoever computes it."""

import collections
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voxray.batches.packing import Batching
from voxray.batches.plan import ORDER, PACKS, VARIANTS, Microbatch, Plan, _stream
from voxray.core.errors import SettingsError
from voxray.core.tasks import POSITIONAL_TASKS, TASKS

CODES = {name: code for code, name in enumerate(TASKS)}


def plan(
    *counts: int,
    weights: dict[str, float] | None = None,
    seed: int = 0,
    pack_size: int = 2,
    microbatches_per_step: int = 3,
    drop_last: bool = False,
) -> Plan:
    """A plan over so many rows of asr, sqa, tqa, mixed; row numbers start at 100 and have gaps."""
    task = np.random.default_rng(7).permutation(np.repeat(np.arange(len(counts), dtype=np.int8), counts))
    batching = Batching("fixed", pack_size=pack_size)
    return Plan(task, 100 + 3 * np.arange(len(task)), weights, seed, batching, microbatches_per_step, drop_last)


def tasks_of(made: Plan, rows: np.ndarray) -> collections.Counter[str]:
    code_of = dict(zip(made.rows.tolist(), made.task.tolist(), strict=True))
    return collections.Counter(list(TASKS)[code_of[row]] for row in rows.tolist())


def counted(packs: list[Microbatch]) -> list[int]:
    return [row for pack in packs if not pack.is_filler for row in pack.rows.tolist()]


def same(left: list[Microbatch], right: list[Microbatch]) -> bool:
    """Equal packs, in order."""
    pairs = list(zip(left, right, strict=True))
    return all(a.number == b.number and a.is_filler == b.is_filler and np.array_equal(a.rows, b.rows) for a, b in pairs)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(0, 20), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 2**40)
)
def test_every_row_once_per_epoch(asr: int, tqa: int, pack_size: int, packs: int, drop_last: bool, seed: int):
    size = pack_size * packs
    if drop_last and asr + tqa < size:
        return
    made = plan(asr, 0, tqa, seed=seed, pack_size=pack_size, microbatches_per_step=packs, drop_last=drop_last)
    for epoch in range(3):
        first = made.steps_in(epoch) if epoch else 0
        steps = [made.step_packs(step) for step in range(first, first + made.steps_of(epoch))]
        drawn = [row for step in steps for row in counted(step)]
        assert len(set(drawn)) == len(drawn)
        if drop_last:
            assert len(drawn) == len(made.rows) // size * size and set(drawn) <= set(made.rows.tolist())
        else:
            assert sorted(drawn) == made.rows.tolist()
        assert all(len(step) == packs and all(len(pack.rows) for pack in step) for step in steps)
        assert all(len(counted(step)) == size for step in steps[:-1])


def test_the_order_is_redrawn_each_epoch_and_with_each_seed():
    made = plan(30, 30)
    epochs = [made.epoch_rows(epoch).tolist() for epoch in range(4)]
    assert all(left != right for left, right in pairwise([*epochs, plan(30, 30, seed=1).epoch_rows(0).tolist()]))
    assert epochs[0] != sorted(epochs[0])
    weighted = plan(30, 30, weights={"asr": 1, "sqa": 1})
    assert weighted.epoch_rows(0).tolist() != weighted.epoch_rows(1).tolist()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 400), min_size=3, max_size=3), st.lists(st.floats(0, 5), min_size=3, max_size=3))
def test_shares_by_largest_remainder(counts: list[int], shares: list[float]):
    if sum(shares) < 0.01:
        return
    weights = dict(zip(POSITIONAL_TASKS, shares, strict=True))
    made = plan(*counts, weights=weights)
    total = sum(counts)
    exact = {name: total * share / sum(shares) for name, share in weights.items()}
    for epoch in (0, 3):
        drawn = made.epoch_rows(epoch)
        found = tasks_of(made, drawn)
        assert len(drawn) == total
        assert all(abs(found[name] - exact[name]) < 1 for name in weights)
        if total >= 200:
            assert all(abs(found[name] / total - exact[name] / total) <= 0.01 for name in weights)
        # Rounded up are those that lost most by rounding down.
        rest = {name: exact[name] - int(exact[name]) for name in weights}
        up = [rest[name] for name in weights if found[name] > int(exact[name])]
        down = [rest[name] for name in weights if found[name] == int(exact[name])]
        assert not up or not down or min(up) >= max(down) - 1e-9


def test_shares_of_a_known_case():
    made = plan(70, 20, 10, weights={"asr": 1.0, "sqa": 1.5, "tqa": 1.2})
    assert tasks_of(made, made.epoch_rows(0)) == {"asr": 27, "sqa": 41, "tqa": 32}  # 27.03, 40.54, 32.43


def test_a_task_without_weight_is_not_drawn():
    made = plan(10, 10, 10, weights={"asr": 1, "tqa": 0})
    assert tasks_of(made, made.epoch_rows(0)) == {"asr": 30}


@pytest.mark.parametrize("weights", [{"asr": 1, "sqa": 1, "tqa": 1}, {"asr": 0.01, "sqa": 5, "tqa": 1.3}, {"sqa": 1}])
def test_each_task_runs_through_its_own_rows(weights: dict[str, float]):
    made = plan(53, 7, 20, weights=weights)
    drawn: dict[int, int] = dict.fromkeys(made.rows.tolist(), 0)
    for epoch in range(41):
        for row in made.epoch_rows(epoch).tolist():
            drawn[row] += 1
        for name, rows in made.rows_of_task.items():
            times = {drawn[row] for row in rows.tolist()}
            assert max(times) - min(times) <= 1, (epoch, name, times)
    assert {drawn[row] > 0 for row in made.rows_of_task["sqa"].tolist()} == {True}


def test_a_task_is_shuffled_anew_each_time_it_starts_over():
    made = plan(40, weights={"asr": 1}, pack_size=40, microbatches_per_step=1)
    rounds = [made._draws("asr", start, 40).tolist() for start in (0, 40, 80)]
    assert [sorted(part) for part in rounds] == [made.rows.tolist()] * 3
    assert rounds[0] != rounds[1] != rounds[2]
    assert made._draws("asr", 30, 20).tolist() == rounds[0][30:] + rounds[1][:10]


@pytest.mark.parametrize("weights", [None, {"asr": 2, "sqa": 1, "tqa": 1}])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("microbatches_per_step", [1, 3, 8])
def test_the_same_sequence_for_any_number_of_workers(weights, world_size: int, microbatches_per_step: int):
    made = plan(21, 9, 8, weights=weights, microbatches_per_step=microbatches_per_step)
    for step in range(2 * made.steps_of(0) + 1):
        whole = made.step_packs(step)
        ranks = [made.rank_packs(step, rank, world_size) for rank in range(world_size)]
        assert len({len(packs) for packs in ranks}) == 1
        assert all(packs and all(len(pack.rows) for pack in packs) for packs in ranks)
        merged = [pack for packs in ranks for pack in packs if not pack.is_filler]
        merged.sort(key=lambda pack: pack.number)
        assert same(merged, [pack for pack in whole if not pack.is_filler])
        # Round robin: what the ranks hold, read in turns, is the step itself, and only fillers follow.
        in_turns = [packs[turn] for turn in range(len(ranks[0])) for packs in ranks]
        assert same(in_turns[: len(whole)], whole)
        assert not any(not pack.is_filler for pack in in_turns[len(whole) :])


@pytest.mark.parametrize("weights", [None, {"asr": 1, "sqa": 3}])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batch_4_holds_the_rows_of_2_times_batch_2(weights, drop_last: bool):
    one = plan(17, 8, weights=weights, pack_size=4, microbatches_per_step=1, drop_last=drop_last)
    two = plan(17, 8, weights=weights, pack_size=2, microbatches_per_step=2, drop_last=drop_last)
    assert one.steps_of(0) == two.steps_of(0)
    for step in range(3 * one.steps_of(0)):
        assert counted(one.step_packs(step)) == counted(two.step_packs(step))


def test_the_last_step_of_an_epoch():
    smaller = plan(14, pack_size=2, microbatches_per_step=3)
    assert smaller.steps_of(0) == 3
    packs = smaller.step_packs(2)
    assert [len(pack.rows) for pack in packs] == [2, 1, 1] and [pack.is_filler for pack in packs] == [False, True, True]
    assert [pack.number for pack in packs] == [0, 1, 2]
    assert plan(14, drop_last=True).steps_of(0) == 2
    assert plan(12).steps_of(0) == plan(12, drop_last=True).steps_of(0) == 2


@pytest.mark.parametrize("weights", [None, {"asr": 1, "sqa": 3}])
def test_a_step_does_not_depend_on_the_steps_before(weights):
    in_turn = plan(17, 8, weights=weights)
    steps = [in_turn.step_packs(step) for step in range(20)]
    jumping = plan(17, 8, weights=weights)
    for step in [19, 0, 7, 7, 13, 1, 18, 3]:
        assert same(jumping.step_packs(step), steps[step])
        assert same(plan(17, 8, weights=weights).step_packs(step), steps[step])


def test_a_plan_pinned_to_its_values():
    """A run that resumes under a newer numpy or voxray must draw what it would have drawn before."""
    made = plan(6, 3, 3, weights={"asr": 1, "sqa": 1, "tqa": 1}, seed=5)
    assert [made.epoch_rows(epoch).tolist() for epoch in range(2)] == PINNED
    assert plan(4, seed=5).epoch_rows(0).tolist() == PINNED_UNWEIGHTED


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
    assert len({*streams, ORDER, VARIANTS, PACKS}) == len(TASKS) + 3
    weighted = plan(0, 0, 0, 7, 7, weights={"aac": 1, "more": 2})
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
        plan(*arguments, **options)


def test_a_weight_of_zero_needs_no_rows():
    assert plan(4, weights={"asr": 1, "tqa": 0}).steps_of(0) == 1
