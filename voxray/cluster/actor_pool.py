"""Ray Data actor pools: how many actors there are, and how items go through them."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from voxray.cluster.session import cpus_for_data

MIN_ACTORS = 2
MAX_GROWN_ACTORS = 64
ITEMS_WORTH_AN_ACTOR = 4
"""Chunks that take about as long as an actor takes to start."""


class PoolWorker(Protocol):
    """What ``run_workers`` runs: one item in, one small result out, both JSON values; big ones go through files."""

    def work(self, item: Any) -> dict[str, Any]: ...


class _Actor:
    """A worker as a Ray Data actor; its one column goes as JSON, so that items may be of any shape."""

    def __init__(self, make: Callable[..., PoolWorker], arguments: tuple[Any, ...]) -> None:
        self._worker = make(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"result": [json.dumps(self._worker.work(json.loads(str(batch["item"][0]))))]}


def run_workers(
    make: Callable[..., PoolWorker], arguments: tuple[Any, ...], items: Sequence[Any], *, num_actors: int, use_ray: bool
) -> Iterator[dict[str, Any]]:
    """Hand every item to a worker, on Ray Data actors or in this process; results come as they are done.

    Args:
        make, arguments: Class of the worker and what it is made with; both must pickle.
        num_actors: Ray Data actors; 0 takes one per CPU of the cluster, as far as there is work for them.
    """
    if not use_ray:
        worker = make(*arguments)
        yield from map(worker.work, items)
        return
    import ray

    rows = [{"item": json.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
    results = dataset.map_batches(
        _Actor,
        fn_constructor_args=(make, arguments),
        batch_size=1,
        compute=actor_pool(num_actors, len(rows)),
        num_cpus=1,
    )
    for row in results.iter_rows():
        yield json.loads(row["result"])


def actor_pool(num_actors: int, num_items: int) -> Any:
    """Ray Data's strategy for a pool of CPU actors: as many as asked for, else one per CPU of the cluster, and no more
    than there is work for.

    Where the autoscaler may start more nodes without GPUs the pool begins with what there is and grows with them; a
    cluster that starts from zero and does not say how far it goes shows no CPU yet.
    """
    import ray

    present = int(ray.cluster_resources().get("CPU", 0))
    useful = num_items if num_actors else math.ceil(num_items / ITEMS_WORTH_AN_ACTOR)
    least = max(1, min(num_actors or max(MIN_ACTORS, present), useful))
    most = max(least, min(num_actors or cpus_for_data() or MAX_GROWN_ACTORS, useful))
    return ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2)
