"""run_workers: results and errors of workers, on Ray and in one process."""

import json
from typing import Any

import pytest

from voxray.cluster.actor_pool import ActorPool, PoolWorker, _Item, run_workers
from voxray.core.errors import RunError


class Divider(PoolWorker):
    """Divides by the item. Items of any type and nested values pass through Ray."""

    def __init__(self, dividend: int) -> None:
        self.dividend = dividend

    def work(self, item: Any) -> dict[str, Any]:
        if item == {"divisor": 0}:
            raise OSError("no\nzero")
        return {"quotient": self.dividend // item["divisor"]}


ITEMS = [{"divisor": 1}, {"divisor": 2, "unused": [None]}, {"divisor": 3}]


def test_results_and_errors_in_this_process():
    assert list(run_workers(Divider, (6,), ITEMS, None)) == [{"quotient": 6}, {"quotient": 3}, {"quotient": 2}]
    with pytest.raises(RunError, match=r"^no zero$"):
        list(run_workers(Divider, (6,), [{"divisor": 0}], None))
    assert list(run_workers(lambda: pytest.fail("no worker is needed"), (), [], None)) == []


def test_an_actor_returns_errors_as_values():
    [outcome] = Divider(6)({"item": [_Item({"divisor": 0})]})["outcome"]
    assert json.loads(outcome) == {"error": "no zero"}


@pytest.mark.ray
def test_results_and_errors_on_ray(local_ray, by_value):
    pool = ActorPool(1, 2)
    quotients = [result["quotient"] for result in run_workers(Divider, (6,), ITEMS, pool)]
    assert sorted(quotients) == [2, 3, 6]
    with pytest.raises(RunError, match=r"^no zero$"):
        list(run_workers(Divider, (6,), [{"divisor": 0}], pool))
