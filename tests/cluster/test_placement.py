"""Room for workers, without Ray: a cluster of a few places gives them in the order in which they are asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from voxray.cluster import placement as room
from voxray.cluster import session as cluster
from voxray.cluster.placement import ScaleUpWatcher, require_capacity, wait_for_workers, warn_about_idle_gpus
from voxray.core.errors import RunError, SettingsError


class Places:
    """So many places; a group is given when all it asks for is free, and the clock moves only when somebody waits."""

    def __init__(self, free: int) -> None:
        self.free, self.now, self.held = free, 0.0, dict[int, int]()
        self.on_sleep: Callable[[], None] = lambda: None

    def ask(self, number: int, unit: str) -> list[int]:
        return [number]

    def is_given(self, group: list[int]) -> bool:
        if id(group) not in self.held and group[0] <= self.free - sum(self.held.values()):
            self.held[id(group)] = group[0]
        return id(group) in self.held

    def give_back(self, groups: list[list[int]]) -> None:
        for group in groups:
            self.held.pop(id(group), None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    made = Places(0)
    for name in ("ask", "is_given", "give_back"):
        monkeypatch.setattr(room, f"_{name}", getattr(made, name))
    monkeypatch.setattr(room, "time", made)
    monkeypatch.setattr(room, "max_resource", lambda resource: {"CPU": 8, "GPU": 0}[resource])
    return made


def test_it_takes_what_there_is_between_the_fewest_and_the_most(places: Places) -> None:
    for free, wanted in ((1, 1), (2, 2), (3, 3), (9, 3)):
        places.free = free
        assert wait_for_workers(1, 3) == wanted and not places.held, "and keeps nothing back from the workers"
    assert places.now < 3 * room.SETTLE_SEC


def test_it_waits_for_the_fewest_and_says_so(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    def a_node_comes() -> None:
        places.free = 2 if places.now > 130 else 1

    places.on_sleep = a_node_comes
    assert wait_for_workers(2, 2) == 2 and 130 < places.now < 131
    assert capsys.readouterr().out.splitlines() == ["waiting for room for 2 worker(s) of one CPU each"] * 3


def test_it_does_not_wait_for_ever_nor_when_told_to_stop(places: Places) -> None:
    with pytest.raises(RunError, match="no room for 2 worker\\(s\\) of one CPU each in 30 minutes"):
        wait_for_workers(2, 2)
    assert wait_for_workers(2, 2, lambda: places.now > room.WAIT_SEC + 60) == 0
    assert places.now < room.WAIT_SEC + 100 and not places.held


def test_growth_takes_nodes_that_come_one_by_one_together(places: Places) -> None:
    growth = ScaleUpWatcher(3, "CPU")
    assert not growth.is_there()
    places.free, places.now = 1, 100
    assert not growth.is_there()
    places.free, places.now = 3, 110
    assert growth.is_there(), "all that could come"
    growth.close()
    assert not places.held
    growth, places.free = ScaleUpWatcher(3, "CPU"), 2
    assert not growth.is_there()
    places.now += room.GATHER_SEC + 1
    assert growth.is_there(), "no more for a while"


def reach(monkeypatch: pytest.MonkeyPatch, **resources: int) -> None:
    monkeypatch.setattr(room, "max_resource", lambda resource: resources.get(resource, 0))


def test_what_the_cluster_can_never_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reach(monkeypatch, CPU=4)
    require_capacity(4)
    with pytest.raises(SettingsError, match=r"^--num_workers 5: the cluster has 4 CPU"):
        require_capacity(5)
    reach(monkeypatch, CPU=8, GPU=2)
    assert (room.worker_resource(2), room.worker_resource(3)) == ("GPU", "CPU")
    for fewest in (2, 3):
        require_capacity(fewest)
    warn_about_idle_gpus(2)
    assert not capsys.readouterr().out
    warn_about_idle_gpus(3)
    assert "--num_workers 3: trains on CPUs, because the cluster has 2 GPU(s) only" in capsys.readouterr().out
    reach(monkeypatch, GPU=2)
    with pytest.raises(SettingsError, match="no CPU to make features with"):
        require_capacity(2)


def test_nodes_that_the_autoscaler_may_start_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From what ``ray up`` leaves on the head, here of this repository's own cluster.yaml."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster._autoscaled("GPU") == 0
    text = (Path(__file__).parents[2] / "cluster.yaml").read_text(encoding="utf-8")
    (tmp_path / cluster.CLUSTER_FILE).write_text(text, encoding="utf-8")
    assert cluster._autoscaled("GPU") == 2 * 4, "two nodes of four GPUs"
    assert cluster._autoscaled("CPU") == 2 * 48 + 8 * 16, "ten nodes, the largest first"
    assert cluster._autoscaled("CPU", gpu_nodes=False) == 8 * 16, "features start no GPU node"
    (tmp_path / cluster.CLUSTER_FILE).write_text(text.replace("max_workers: 10", "max_workers: 1"), encoding="utf-8")
    assert (cluster._autoscaled("GPU"), cluster._autoscaled("CPU")) == (4, 48)
    monkeypatch.delenv("RAY_ADDRESS")
    assert cluster._autoscaled("GPU") == 0, "a Ray that was started here has no autoscaler"
