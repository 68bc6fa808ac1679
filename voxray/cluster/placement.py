"""Room for training workers on a cluster whose nodes come and go.

What Ray reports as free is seconds old, and still counts a node that died. So room is not computed but asked for, with
placement groups: Ray sets it aside on nodes that answer, has its autoscaler start nodes for what is missing, and takes
it all back if this process dies.
"""

import time
from collections.abc import Callable
from typing import Any

from voxray.cluster.session import max_resource
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError

SETTLE_SEC = 5.0
"""How long the places beyond the fewest may take; those that are free are given within tenths of a second."""
SAY_SEC = 60.0
WAIT_SEC = 1800.0
"""How long to wait for the fewest: a cloud takes minutes to start a node, and longer to set it up."""
GATHER_SEC = 20.0
"""How long a run that could grow waits for more room, because nodes come one by one and each restart costs seconds."""


def worker_resource(fewest: int) -> str:
    """What a worker takes one of: a GPU if the cluster has, or can get, any; else a CPU."""
    return "GPU" if 0 < fewest <= max_resource("GPU") else "CPU"


def require_capacity(fewest: int) -> None:
    """Refuse what the cluster can never hold, before hours go into features.

    Raises:
        SettingsError: There are not so many CPUs, or none to make features with, even when all nodes have started.
    """
    cpus = max_resource("CPU")
    if worker_resource(fewest) == "CPU" and fewest > cpus:
        raise SettingsError(f"--num_workers {fewest}: the cluster has {cpus} CPU(s), those it may still start counted")
    if not cpus:
        raise SettingsError("the cluster has no CPU to make features with, and may start none: give a node some")


def warn_about_idle_gpus(fewest: int) -> None:
    """Warn if training takes CPUs because there are GPUs, but too few of them."""
    if (gpus := max_resource("GPU")) and worker_resource(fewest) == "CPU":
        console.print(f"warning: --num_workers {fewest}: trains on CPUs, because the cluster has {gpus} GPU(s) only")


def wait_for_workers(fewest: int, most: int, is_stopped: Callable[[], bool] = lambda: False) -> int:
    """Wait until there is room for the fewest workers.

    Args:
        is_stopped: Whether the run was asked to stop meanwhile.
    Returns:
        For how many there is room now, ``most`` at most; 0 if asked to stop.
    Raises:
        RunError: There was none for half an hour.
    """
    unit, began, said = worker_resource(fewest), time.monotonic(), 0.0
    asked = [_ask(fewest, unit)]
    try:
        while not _is_given(asked[0]):
            waited = time.monotonic() - began
            if is_stopped():
                return 0
            if waited > WAIT_SEC:
                raise RunError(f"no room for {fewest} worker(s) of one {unit} each in {waited / 60:.0f} minutes")
            if waited - said > (SAY_SEC if said else SETTLE_SEC):
                console.print(f"waiting for room for {fewest} worker(s) of one {unit} each")
                said = waited
            time.sleep(0.2)
        asked += [_ask(1, unit) for _ in range(most - fewest)]
        settled = time.monotonic() + SETTLE_SEC
        while not all(map(_is_given, asked)) and time.monotonic() < settled:
            time.sleep(0.2)
        return fewest + sum(map(_is_given, asked[1:]))
    finally:
        _give_back(asked)


def is_evicted() -> bool:
    """Whether Ray has taken back the places that this process itself runs in, as when Ray Tune stops a trial.

    Its processes end then, but not at once and in no order. What one of them asked for in that moment nobody would give
    back.
    """
    import ray

    own = ray.util.get_current_placement_group()
    return own is not None and _state(own) == "REMOVED"


class ScaleUpWatcher:
    """Notices when there is room for more workers than a run has; until then Ray keeps looking for it.

    Args:
        number: How many more it could use.
        unit: What each takes one of.
    """

    def __init__(self, number: int, unit: str) -> None:
        self._asked = [_ask(1, unit) for _ in range(number)]
        self._first_seen = 0.0

    def is_there(self) -> bool:
        """Whether the run should start again with more: all the room there can be, or no more of it for a while."""
        given = sum(map(_is_given, self._asked))
        if not given:
            self._first_seen = 0.0
            return False
        self._first_seen = self._first_seen or time.monotonic()
        return given == len(self._asked) or time.monotonic() - self._first_seen > GATHER_SEC

    def close(self) -> None:
        _give_back(self._asked)


def record_placement_group(run: str) -> None:
    """In a training worker: note which places its run holds, under the run's name in Ray."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_put

    if group := ray.util.get_current_placement_group():
        _internal_kv_put(f"voxray/{run}", group.id.binary())


def release_placement_group(run: str) -> None:
    """Give back what a run that has ended still holds.

    That is Ray Train's to do. But it does not if the process group could not be made; and if its controller was killed,
    a helper does it, which may have died of a slow answer before. Then the next start would wait for its own room.
    """
    import ray
    from ray.experimental.internal_kv import _internal_kv_get
    from ray.util.placement_group import PlacementGroup

    if noted := _internal_kv_get(f"voxray/{run}"):
        ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(noted)))


def _ask(number: int, unit: str) -> Any:
    """Places for so many workers, all of them or none."""
    import ray

    return ray.util.placement_group([{unit: 1}] * number)


def _is_given(group: Any) -> bool:
    return _state(group) == "CREATED"


def _state(group: Any) -> str:
    """Ray's word for where a placement group stands; one that it no longer knows has been removed."""
    import ray

    return ray.util.placement_group_table(group).get("state", "REMOVED")


def _give_back(groups: list[Any]) -> None:
    import ray

    for group in groups:
        ray.util.remove_placement_group(group)
