"""Ray Data actor pools: how many actors there are, and how items are processed by them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from voxray.cluster.session import cpus_for_data, max_gpus, max_resource, maximum_hint
from voxray.core.console import console
from voxray.core.errors import RunError, one_line
from voxray.core.units import GIB, format_bytes

MIN_ACTORS = 2
MAX_AUTOSCALED_ACTORS = 64
MODEL_PROCESS_BYTES = GIB
"""Memory of a process with a model beside the weights: Python, the libraries, Ray, keys and values of answers."""
ITEMS_PER_ACTOR = 4
"""Items (chunks of rows) that take about as long as an actor takes to start."""


@dataclass(frozen=True)
class ActorPool:
    """Size of a Ray Data actor pool and the resources of each actor.

    Attributes:
        min_size, max_size: Number of actors. The pool grows from one to the other while items are waiting.
        num_gpus, num_cpus: Resources of each actor; None uses Ray's default.
        memory_bytes: Memory of each actor, by which Ray chooses its node; None if it needs little.
    """

    min_size: int
    max_size: int
    num_gpus: float | None = None
    num_cpus: float | None = 1
    memory_bytes: int | None = None


@dataclass(frozen=True)
class _Item:
    """Wraps an item or a result so that Ray Data pickles it as it is; a bare dict would become Arrow columns.

    Attributes:
        error: Message of the error that ended the work on it; None if there was none.
    """

    value: Any
    error: str | None = None


class PoolWorker:
    """Base class of the workers of ``run_workers`` and ``run_stages``. Large results go to files, not through Ray."""

    def work(self, item: Any) -> Any:
        """Process one item.

        Returns:
            A small result that pickles; in ``run_stages``, the item of the next stage.
        Raises:
            RunError, OSError: The job ends with this message.
        """
        raise NotImplementedError

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run ``work`` on a Ray Data batch of one item, unless an earlier stage failed on it.

        An error is returned as a value, because Ray would retry an actor that raises and print its traceback.
        """
        [item] = batch["item"]
        if item.error is None:
            try:
                item = _Item(self.work(item.value))
            except (RunError, OSError) as error:
                item = _Item(None, one_line(error))
        return {"item": [item]}


def run_workers(
    worker_class: Callable[..., PoolWorker], arguments: Sequence[Any], items: Sequence[Any], pool: ActorPool | None
) -> Iterator[dict[str, Any]]:
    """Process every item with a worker and yield the results in the order in which they finish.

    Args:
        worker_class, arguments: Class of the workers and its constructor's arguments; both are pickled for Ray.
        items: Values that pickle.
        pool: Actors on Ray Data; None processes the items in this process, in order.
    Raises:
        RunError: A worker raised a RunError or an OSError.
    """
    if not items:
        return
    if pool is None:
        worker = worker_class(*arguments)
        for item in items:
            try:
                result = worker.work(item)
            except OSError as error:
                raise RunError(one_line(error)) from error
            yield result
        return
    yield from run_stages([(worker_class, arguments, pool)], items)


def run_stages(
    stages: Sequence[tuple[Callable[..., PoolWorker], Sequence[Any], ActorPool]], items: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """Process every item on Ray Data with a worker of each stage in turn.

    The stages run at the same time. Ray Data starts no more work of a stage while its results fill their share of the
    object store.

    Args:
        stages: Class of the workers, its constructor's arguments, and the actors; see ``run_workers``.
        items: Values that pickle.
    Yields:
        The results of the last stage, in the order in which they finish.
    Raises:
        RunError: A worker raised a RunError or an OSError.
    """
    if not items:
        return
    import ray

    # Ray repeats a block as a whole when an actor dies. With several stages, some of its items would have moved on.
    num_blocks = len(items) if len(stages) > 1 else min(len(items), 1000)
    data = ray.data.from_items([{"item": _Item(item)} for item in items], override_num_blocks=num_blocks)
    for worker_class, arguments, pool in stages:
        data = data.map_batches(
            worker_class,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.min_size, max_size=pool.max_size, max_tasks_in_flight_per_actor=2
            ),
            num_gpus=pool.num_gpus,
            num_cpus=pool.num_cpus,
            memory=pool.memory_bytes,
        )
    for row in data.iter_rows():
        if row["item"].error is not None:
            raise RunError(row["item"].error)
        yield row["item"].value


def plan_pool(num_actors: int, num_items: int, *, use_gpus: bool = False, num_taken_cpus: int = 0) -> ActorPool:
    """Size of a pool of single-CPU actors, never more actors than there is work for.

    Where the autoscaler may start more nodes, the pool begins with the CPUs or GPUs that are there and grows with the
    cluster. A cluster that starts from zero nodes and does not report its limit shows no CPU yet.

    Args:
        num_actors: Requested actors; 0 means one per CPU of the cluster.
        use_gpus: Give each actor a GPU if the cluster has or can start any; then there are no more actors than GPUs.
        num_taken_cpus: CPUs to leave for another pool. One actor starts in any case.
    """
    num_gpus = max_gpus() if use_gpus else 0
    useful = max(1, num_items if num_actors else math.ceil(num_items / ITEMS_PER_ACTOR))
    if num_gpus:
        low, high = max(1, present_resource("GPU")), num_actors or num_gpus
        high = min(high, num_gpus)
    elif num_actors:
        low = high = num_actors
    else:
        low, high = max(MIN_ACTORS, present_cpus()), cpus_for_data() or MAX_AUTOSCALED_ACTORS
        high = max(low, high, MAX_AUTOSCALED_ACTORS if maximum_hint() else 0)
        low, high = max(1, low - num_taken_cpus), max(1, high - num_taken_cpus)
    high = min(high, useful)
    return ActorPool(min(low, high), high, num_gpus=1 if num_gpus else None)


def fit_memory(pool: ActorPool, memory_bytes: int, shared_bytes: int = 0) -> ActorPool:
    """Limit a pool to as many actors as the memory of the nodes suffices for. One always starts.

    Ray takes as a node's memory what was free when it started, less its object store. Nodes that the autoscaler may
    still start are not counted, so a pool on a cluster that may grow keeps its limit, and Ray places what fits.

    Args:
        memory_bytes: Memory of the weights of each actor, beside those that the actors of a node share.
        shared_bytes: Memory that the actors of a node share.
    """
    import ray

    memory_bytes += MODEL_PROCESS_BYTES
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # a head often has no CPUs for actors
    nodes = [max(0, int(each.get("memory", 0)) - shared_bytes) for each in resources if each.get("CPU")]
    fitting = max(1, sum(num_bytes // memory_bytes for num_bytes in nodes))
    if max_resource("CPU") > present_resource("CPU"):
        fitting = max(fitting, pool.max_size)
    if fitting < pool.min_size:
        reason = f"each takes {format_bytes(memory_bytes)}, and the nodes have {format_bytes(sum(nodes))}"
        console.print(f"warning: {fitting} instead of {pool.min_size} model(s) at a time: {reason}")
    low, high = min(pool.min_size, fitting), min(pool.max_size, fitting)
    return replace(pool, min_size=low, max_size=high, memory_bytes=min(memory_bytes, max(nodes, default=0)) or None)


def present_cpus() -> int:
    """CPUs that the cluster has now, at least 1."""
    return max(1, present_resource("CPU"))


def present_resource(resource: str) -> int:
    """CPUs or GPUs that the cluster has now."""
    import ray

    return int(ray.cluster_resources().get(resource, 0))
