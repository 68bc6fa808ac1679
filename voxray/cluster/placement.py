"""Resources for training workers on a cluster whose nodes come and go.

The free resources that Ray reports are seconds old and still count a node that died. So this module does not compute
from them but requests placement groups. Ray reserves resources for them on nodes that answer, lets its autoscaler start
nodes for the rest, and releases all of it when this process dies.
"""

import time
from collections.abc import Callable
from typing import Any

from voxray.cluster.session import max_resource, maximum_hint
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError

SETTLE_SEC = 5.0
"""Time to wait for workers beyond the minimum. Ray grants free resources within tenths of a second."""
SAY_SEC = 60.0
WAIT_SEC = 1800.0
"""Time to wait for the minimum. A cloud needs minutes to start a node and longer to set it up."""
GATHER_SEC = 20.0
"""Time to wait for further nodes before a run grows, because nodes arrive one by one and a restart costs seconds."""


def worker_resource() -> str:
    """The resource that each worker gets one of: GPU if the cluster has any or can start any, else CPU."""
    return "GPU" if max_resource("GPU") else "CPU"


def require_capacity(fewest: int) -> None:
    """Refuse a number of workers that the cluster can never hold, before features are computed.

    Raises:
        SettingsError: There are too few GPUs or, in a cluster without any, CPUs, or no CPU for Ray Data, even when all
            nodes have started.
    """
    resource = worker_resource()
    if fewest > (available := max_resource(resource)):
        number = f"{available} {resource}(s), including those it can still start"
        raise SettingsError(f"--num_workers {fewest}: the cluster has {number}{maximum_hint()}")
    if not max_resource("CPU"):
        message = "the cluster has no CPU to compute features with, and cannot start any: give a node one"
        raise SettingsError(message + maximum_hint())


def warn_about_cpus() -> None:
    """Warn if training uses CPUs on a cluster that may have GPUs which it does not tell of."""
    if worker_resource() == "CPU" and (hint := maximum_hint()):
        console.print(f"warning: training uses CPUs, because the cluster has no GPU now{hint}")


def wait_for_workers(fewest: int, most: int, resource: str, is_stopped: Callable[[], bool] = lambda: False) -> int:
    """Wait until the minimum number of workers fits into the cluster.

    Args:
        resource: CPU or GPU, one for each worker.
        is_stopped: Whether the run was asked to stop while it waits.
    Returns:
        Number of workers that fit now, at most ``most``; 0 if the run was asked to stop.
    Raises:
        RunError: The minimum did not fit within half an hour.
    """
    began, last_message = time.monotonic(), 0.0
    groups = [_request(fewest, resource)]
    try:
        while not _is_granted(groups[0]):
            waited = time.monotonic() - began
            if is_stopped():
                return 0
            if waited > WAIT_SEC:
                minutes = f"{waited / 60:.0f} minutes"
                raise RunError(f"{fewest} worker(s) with one {resource} each did not fit into the cluster in {minutes}")
            if waited - last_message > (SAY_SEC if last_message else SETTLE_SEC):
                console.print(f"waiting until {fewest} worker(s) with one {resource} each fit into the cluster")
                last_message = waited
            time.sleep(0.2)
        groups += [_request(1, resource) for _ in range(most - fewest)]
        deadline = time.monotonic() + SETTLE_SEC
        while not all(map(_is_granted, groups)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return fewest + sum(map(_is_granted, groups[1:]))
    finally:
        _remove(groups)


def is_evicted() -> bool:
    """Whether Ray has removed the placement group of this process, as it does when Ray Tune stops a trial.

    Ray ends the processes of the group soon after, in no fixed order. A placement group that one of them requests in
    that time would never be removed.
    """
    import ray

    own = ray.util.get_current_placement_group()
    return own is not None and _state(own) == "REMOVED"


class ScaleUpWatcher:
    """Notices when more workers fit into the cluster than a run has.

    Args:
        number: Number of workers that the run could use in addition.
        resource: CPU or GPU, one for each.
    """

    def __init__(self, number: int, resource: str) -> None:
        self._groups = [_request(1, resource) for _ in range(number)]
        self._first_granted_at = 0.0

    def is_ready(self) -> bool:
        """Whether the run should restart: all additional workers fit, or some do and no others came for a while."""
        granted = sum(map(_is_granted, self._groups))
        if not granted:
            self._first_granted_at = 0.0
            return False
        self._first_granted_at = self._first_granted_at or time.monotonic()
        return granted == len(self._groups) or time.monotonic() - self._first_granted_at > GATHER_SEC

    def close(self) -> None:
        _remove(self._groups)


def record_placement_group(run: str) -> None:
    """In a training worker: store the id of its placement group under the run's name in Ray's key-value store."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_put

    if group := ray.util.get_current_placement_group():
        _internal_kv_put(f"voxray/{run}", group.id.binary())


def release_placement_group(run: str) -> None:
    """Remove the placement group of a run that has ended, if Ray Train left it.

    Ray Train leaves it when the process group could not be created. When its controller is killed, a helper process
    removes it, which may have died before because of one slow answer. The next start would then wait for resources that
    the last one still holds.
    """
    import ray
    from ray.experimental.internal_kv import _internal_kv_get
    from ray.util.placement_group import PlacementGroup

    if group_id := _internal_kv_get(f"voxray/{run}"):
        ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(group_id)))


def _request(number: int, resource: str) -> Any:
    """A placement group for this many workers, all of them or none."""
    import ray

    return ray.util.placement_group([{resource: 1}] * number)


def _is_granted(group: Any) -> bool:
    return _state(group) == "CREATED"


def _state(group: Any) -> str:
    """Ray's state of a placement group. Ray no longer knows a group that was removed."""
    import ray

    return ray.util.placement_group_table(group).get("state", "REMOVED")


def _remove(groups: list[Any]) -> None:
    import ray

    for group in groups:
        ray.util.remove_placement_group(group)
