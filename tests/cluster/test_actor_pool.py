"""run_workers and run_stages: results and errors of workers, on Ray and in one process."""

from typing import Any

import pytest

from voxray.cluster import actor_pool
from voxray.cluster.actor_pool import (
    MODEL_PROCESS_BYTES,
    ActorPool,
    PoolWorker,
    _Item,
    fit_memory,
    plan_pool,
    run_stages,
    run_workers,
)
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
    [item] = Divider(6)({"item": [_Item({"divisor": 0})]})["item"]
    assert item.error == "no zero"
    assert Divider(6)({"item": [item]}) == {"item": [item]}, "a later stage leaves it as it is"


@pytest.mark.ray
def test_results_and_errors_on_ray(local_ray, by_value):
    pool = ActorPool(1, 2)
    quotients = [result["quotient"] for result in run_workers(Divider, (6,), ITEMS, pool)]
    assert sorted(quotients) == [2, 3, 6]
    with pytest.raises(RunError, match=r"^no zero$"):
        list(run_workers(Divider, (6,), [{"divisor": 0}], pool))


class Namer(PoolWorker):
    """Names what a Divider returns."""

    def work(self, item: Any) -> dict[str, Any]:
        if item["quotient"] == 1:
            raise RunError("one is too small")
        return {"name": f"the {item['quotient']}"}


@pytest.mark.ray
def test_items_pass_through_stages_on_ray(local_ray, by_value):
    pool = ActorPool(1, 1)
    stages = [(Divider, (6,), pool), (Namer, (), pool)]
    assert sorted(result["name"] for result in run_stages(stages, ITEMS)) == ["the 2", "the 3", "the 6"]
    for divisor, message in ((0, r"^no zero$"), (6, r"^one is too small$")):
        with pytest.raises(RunError, match=message):
            list(run_stages(stages, [{"divisor": divisor}]))
    assert list(run_stages(stages, [])) == []


@pytest.mark.parametrize(
    ("present", "maximum", "kuberay", "flags", "expected"),
    [
        ({"CPU": 4}, {}, False, {}, (4, 4, None)),
        ({"CPU": 4}, {"CPU": 128}, False, {}, (4, 128, None)),
        ({"CPU": 0}, {"CPU": 0}, False, {}, (2, 64, None)),
        ({"CPU": 24}, {}, True, {}, (24, 64, None)),
        ({"CPU": 24}, {}, True, {"num_actors": 100}, (100, 100, None)),
        ({"CPU": 4, "GPU": 2}, {}, False, {"use_gpus": True}, (2, 2, 1)),
        ({"CPU": 4, "GPU": 0}, {"GPU": 8}, False, {"use_gpus": True}, (1, 8, 1)),
        ({"CPU": 4, "GPU": 2}, {"GPU": 8}, False, {"use_gpus": True, "num_actors": 4}, (2, 4, 1)),
        ({"CPU": 4, "GPU": 2}, {}, False, {"use_gpus": True, "num_actors": 9}, (2, 2, 1)),
        ({"CPU": 4, "GPU": 0}, {}, False, {"use_gpus": True}, (4, 4, None)),
        ({"CPU": 16}, {"CPU": 128}, False, {"num_taken_cpus": 4}, (12, 124, None)),
        ({"CPU": 4}, {}, False, {"num_taken_cpus": 4}, (1, 1, None)),
        ({"CPU": 16}, {}, False, {"num_taken_cpus": 4, "num_actors": 6}, (6, 6, None)),
    ],
)
def test_size_of_a_pool(
    monkeypatch: pytest.MonkeyPatch,
    present: dict[str, int],
    maximum: dict[str, int],
    kuberay: bool,
    flags: dict[str, Any],
    expected: tuple[int, int, int | None],
) -> None:
    """A pool begins with what is there and grows to what the cluster can start."""
    largest = {resource: max(present.get(resource, 0), maximum.get(resource, 0)) for resource in ("CPU", "GPU")}
    monkeypatch.setattr(actor_pool, "present_resource", lambda resource: present.get(resource, 0))
    monkeypatch.setattr(actor_pool, "cpus_for_data", lambda: largest["CPU"])
    monkeypatch.setattr(actor_pool, "max_gpus", lambda: largest["GPU"])
    monkeypatch.setattr(actor_pool, "maximum_hint", lambda: "set a variable" if kuberay else "")
    pool = plan_pool(num_items=1000, **{"num_actors": 0, **flags})
    assert (pool.min_size, pool.max_size, pool.num_gpus) == expected
    assert plan_pool(0, 3).max_size == 1, "no more actors than there is work for"


@pytest.mark.parametrize(
    ("memory_gib", "maximum", "expected"),
    [
        ([16, 16], {}, (4, 4)),  # two models of 7 GiB and their processes on each node
        ([16, 6], {}, (2, 2)),
        ([6], {}, (1, 1)),  # one is tried in any case
        ([16], {"CPU": 64}, (4, 4)),  # more nodes may come, and Ray places what fits
    ],
)
def test_models_at_a_time_by_memory(monkeypatch, capsys, memory_gib, maximum, expected):
    import ray

    nodes = [{"Alive": True, "Resources": {"CPU": 4, "memory": each * 2**30}} for each in memory_gib]
    nodes.append({"Alive": True, "Resources": {"memory": 2**40}})  # a head on which nothing is placed
    nodes.append({"Alive": False, "Resources": {"CPU": 4, "memory": 2**50}})
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8})
    monkeypatch.setattr(actor_pool, "max_resource", lambda name: maximum.get(name, 8))
    needed = 7 * 2**30
    pool = fit_memory(ActorPool(4, 4), needed)
    assert (pool.min_size, pool.max_size) == expected
    assert pool.memory_bytes == min(needed + MODEL_PROCESS_BYTES, max(memory_gib) * 2**30)
    is_reduced = expected[0] < 4
    assert ("warning: " in capsys.readouterr().out) is is_reduced


@pytest.mark.ray
def test_ray_places_actors_by_memory(local_ray, by_value):
    """Each actor asks for more than half of the memory, so one works through all items."""
    import ray

    pool = fit_memory(ActorPool(1, 2), int(0.6 * ray.cluster_resources()["memory"]))
    assert len(list(run_workers(Divider, (6,), ITEMS, pool))) == 3
    assert pool.max_size == 1 and pool.memory_bytes > 0.6 * ray.cluster_resources()["memory"]
