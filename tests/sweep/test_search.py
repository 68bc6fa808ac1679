"""Search: every combination once, the same choices for the same seed, Optuna proposals; never one twice."""

import itertools
import math
import statistics
from typing import Any

import pytest

from voxray.config.search_space import Domain, choice_key
from voxray.sweep.search import Search

RANKS = Domain("lora_r", "choice", (4, 8, 16))
SHARES = Domain("task_weights", "choice", ({"asr": 1.0}, {"asr": 2.0, "tqa": 1.0}, None))
RATE = Domain("lr", "log", (1e-5, 1e-1))
STEPS = Domain("grad_accum", "range", (1, 3), whole=True)


def search(*domains: Domain, method: str = "random", known: Any = (), seed: int = 0) -> Search:
    named = {domain.name: domain for domain in domains}
    return Search(named, method, seed=seed, mode="min", known=known)


def choices(algorithm: Search, most: int = 100) -> list[dict[str, Any]]:
    return list(itertools.takewhile(lambda choice: choice is not None, (algorithm.ask() for _ in range(most))))  # type: ignore


@pytest.mark.parametrize("method", ["grid", "random", "optuna"])
def test_a_space_with_an_end_is_used_up_without_repeats(method: str) -> None:
    if method == "optuna":
        pytest.importorskip("optuna")
    algorithm = search(RANKS, SHARES, STEPS, method=method)
    proposed = choices(algorithm)
    assert len(proposed) == len(set(map(choice_key, proposed))) and len(proposed) == (
        27 if method != "optuna" else len(proposed)
    )
    assert len(proposed) > 20 and algorithm.ask() is None


@pytest.mark.parametrize("method", ["grid", "random", "optuna"])
def test_a_search_goes_on_where_it_was(method: str) -> None:
    if method == "optuna":
        pytest.importorskip("optuna")
    spaces = (RANKS, SHARES) if method == "grid" else (RANKS, RATE)
    whole = choices(search(*spaces, method=method), 8)
    before = [(choice, 0.5) for choice in whole[:4]]
    after = choices(search(*spaces, method=method, known=before), 4)
    assert not {choice_key(choice) for choice in after} & {choice_key(choice) for choice, _ in before}
    if method != "optuna":
        assert after == whole[4:], "as if it had never stopped"


def test_seeds_draw_differently() -> None:
    assert choices(search(RATE, seed=1), 5) == choices(search(RATE, seed=1), 5) != choices(search(RATE, seed=2), 5)


def test_a_range_of_few_rounded_values_comes_to_an_end() -> None:
    narrow = Domain("lr", "range", (0.12341, 0.12359))
    assert 1 <= len(choices(search(narrow))) <= 5


def test_optuna_learns_from_what_it_is_told() -> None:
    """With an optimum at lr 1e-3, later proposals are closer to it than random ones, despite failures."""
    pytest.importorskip("optuna")

    def distance(choice: dict[str, Any]) -> float:
        return abs(math.log10(choice["lr"]) + 3)

    algorithm, proposed = search(RATE, method="optuna"), []
    for number in range(40):
        choice = algorithm.ask()
        assert choice is not None
        proposed.append(distance(choice))
        algorithm.tell(choice, None if number % 9 == 5 else proposed[-1])
    assert statistics.median(proposed[-20:]) < 0.5, "at random it would be 1"
    spread = [{"lr": 10 ** (-5 + 0.2 * index)} for index in range(21)]
    resumed = search(RATE, method="optuna", known=[(choice, distance(choice)) for choice in spread])
    assert statistics.median(map(distance, choices(resumed, 9))) < 0.5, "what is known from disk leads it as well"
