"""Resources for workers, without Ray: a fake cluster grants placement groups in the order of the requests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from voxray.cluster import placement, session
from voxray.cluster.placement import ScaleUpWatcher, require_capacity, wait_for_workers, warn_about_cpus
from voxray.core.errors import RunError, SettingsError


class FakeCluster:
    """Grants a group when everything it requests is free. Its clock moves only when somebody sleeps."""

    def __init__(self, free: int) -> None:
        self.free, self.now, self.held = free, 0.0, dict[int, int]()
        self.on_sleep: Callable[[], None] = lambda: None

    def request(self, number: int, resource: str) -> list[int]:
        return [number]

    def is_granted(self, group: list[int]) -> bool:
        if id(group) not in self.held and group[0] <= self.free - sum(self.held.values()):
            self.held[id(group)] = group[0]
        return id(group) in self.held

    def remove(self, groups: list[list[int]]) -> None:
        for group in groups:
            self.held.pop(id(group), None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    fake = FakeCluster(0)
    for name in ("request", "is_granted", "remove"):
        monkeypatch.setattr(placement, f"_{name}", getattr(fake, name))
    monkeypatch.setattr(placement, "time", fake)
    return fake


def test_as_many_workers_as_fit_between_minimum_and_maximum(cluster: FakeCluster) -> None:
    for free, expected in ((1, 1), (2, 2), (3, 3), (9, 3)):
        cluster.free = free
        assert wait_for_workers(1, 3, "CPU") == expected and not cluster.held, "the workers get all resources back"
    assert cluster.now < 3 * placement.SETTLE_SEC


def test_waiting_for_the_minimum_is_reported(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    def add_node_after_130_sec() -> None:
        cluster.free = 2 if cluster.now > 130 else 1

    cluster.on_sleep = add_node_after_130_sec
    assert wait_for_workers(2, 2, "CPU") == 2 and 130 < cluster.now < 131
    message = "waiting until 2 worker(s) with one CPU each fit into the cluster"
    assert capsys.readouterr().out.splitlines() == [message] * 3


def test_waiting_ends_after_half_an_hour_or_when_stopped(cluster: FakeCluster) -> None:
    with pytest.raises(RunError, match="2 worker\\(s\\) with one CPU each did not fit into the cluster in 30 minutes"):
        wait_for_workers(2, 2, "CPU")
    assert wait_for_workers(2, 2, "CPU", lambda: cluster.now > placement.WAIT_SEC + 60) == 0
    assert cluster.now < placement.WAIT_SEC + 100 and not cluster.held


def test_a_run_grows_once_for_nodes_that_arrive_one_by_one(cluster: FakeCluster) -> None:
    watcher = ScaleUpWatcher(3, "CPU")
    assert not watcher.is_ready()
    cluster.free, cluster.now = 1, 100
    assert not watcher.is_ready()
    cluster.free, cluster.now = 3, 110
    assert watcher.is_ready(), "all that could come"
    watcher.close()
    assert not cluster.held
    watcher, cluster.free = ScaleUpWatcher(3, "CPU"), 2
    assert not watcher.is_ready()
    cluster.now += placement.GATHER_SEC + 1
    assert watcher.is_ready(), "no more for a while"


def set_resources(monkeypatch: pytest.MonkeyPatch, **resources: int) -> None:
    monkeypatch.setattr(placement, "max_resource", lambda resource: resources.get(resource, 0))


def test_what_the_cluster_can_never_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_resources(monkeypatch, CPU=4)
    require_capacity(4)
    with pytest.raises(SettingsError, match=r"^--num_workers 5: the cluster has 4 CPU"):
        require_capacity(5)
    set_resources(monkeypatch, CPU=8, GPU=2)
    require_capacity(2)
    with pytest.raises(SettingsError, match=r"^--num_workers 3: the cluster has 2 GPU\(s\), including those it can"):
        require_capacity(3)  # rather than training on CPUs beside idle GPUs
    set_resources(monkeypatch, GPU=2)
    with pytest.raises(SettingsError, match="no CPU to compute features with"):
        require_capacity(2)


def test_nodes_that_the_autoscaler_may_start_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From what ``ray up`` leaves on the head, here of this repository's own cluster.yaml."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert session._autoscaled("GPU") == 0
    text = (Path(__file__).parents[2] / "cluster.yaml").read_text(encoding="utf-8")
    (tmp_path / session.CLUSTER_FILE).write_text(text, encoding="utf-8")
    assert session._autoscaled("GPU") == 2 * 4, "two nodes of four GPUs"
    assert session._autoscaled("CPU") == 2 * 48 + 8 * 16, "ten nodes, the largest first"
    assert session._autoscaled("CPU", gpu_nodes=False) == 8 * 16, "features start no GPU node"
    (tmp_path / session.CLUSTER_FILE).write_text(text.replace("max_workers: 10", "max_workers: 1"), encoding="utf-8")
    assert (session._autoscaled("GPU"), session._autoscaled("CPU")) == (4, 48)
    monkeypatch.delenv("RAY_ADDRESS")
    assert session._autoscaled("GPU") == 0, "a Ray that was started here has no autoscaler"


def test_kuberay_does_not_tell_its_maximum(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    set_resources(monkeypatch, CPU=4)
    warn_about_cpus()
    assert not capsys.readouterr().out
    monkeypatch.setenv("RAY_USAGE_STATS_KUBERAY_IN_USE", "1")
    hint = "; set VOXRAY_MAX_CPUS and VOXRAY_MAX_GPUS to what all groups have at maxReplicas"
    warn_about_cpus()
    assert hint in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SettingsError, match=f"5: the cluster has 4 CPU.*{hint}"):
        require_capacity(5)
    for name in ("VOXRAY_MAX_CPUS", "VOXRAY_MAX_GPUS"):
        monkeypatch.setenv(name, "8")
    warn_about_cpus()
    assert not capsys.readouterr().out
