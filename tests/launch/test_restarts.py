"""How the driver restarts a run after a worker died, or to use more workers, with a fake attempt instead of Ray Train.

tests/jobs/test_kill.py kills real Ray workers, and tests/jobs/test_nodes.py real nodes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import WorkerGroupError

from voxray.config.train import TextSettings
from voxray.core.errors import RunError, SettingsError
from voxray.launch import elastic
from voxray.recipes.run_context import RunContext
from voxray.recipes.training_data import TrainingData

DIED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR and so on"


def worker_died() -> WorkerGroupError:
    return WorkerGroupError(f"[Rank 1]\n{DIED}", {1: RuntimeError(DIED)})


DONE = {"steps": 9, "finished": True}


@pytest.fixture
def large_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster on which the maximum number of workers fits."""
    monkeypatch.setattr(elastic, "wait_for_workers", lambda fewest, most, resource, is_stopped: most)
    monkeypatch.setattr(elastic, "worker_resource", lambda: "CPU")


def text_run(run_dir: Path) -> RunContext:
    settings = TextSettings.model_validate({"model_id": TINY, "train_jsonl": "x", "output_dir": str(run_dir)})
    return RunContext.create(settings, run_dir=run_dir)


def save(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "progress.json").touch()


@pytest.fixture
def attempts(large_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Run attempts that end with these errors, each after saving a checkpoint of this step; a further one succeeds."""

    def run_attempts(*ends: tuple[Exception, int]) -> Any:
        remaining = iter(ends)

        def fit_once(
            run: RunContext, data: Any, number: int, resource: str, callbacks: Any, outcome: dict[str, Any]
        ) -> None:
            error, step = next(remaining, (None, 0))
            if error is None:
                outcome["result"] = DONE
                return
            outcome["error"] = error
            if step:
                save(run.run_dir, step)

        monkeypatch.setattr(elastic, "_fit_once", fit_once)
        return elastic.train_on_workers(text_run(tmp_path), TrainingData((), ()), (2, 2))

    yield run_attempts


def test_a_dead_worker_is_one_line_and_the_run_restarts(
    attempts: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert attempts((worker_died(), 4)) == DONE
    output = " ".join(capsys.readouterr().out.split())
    reason = "The actor is dead because its worker process has died."
    assert output == f"a worker failed ({reason}); starting again from step 4"
    assert DIED in (tmp_path / "ray.log").read_text()


def test_restarts_are_limited_unless_the_run_progresses(attempts: Callable[..., Any]) -> None:
    with pytest.raises(
        RunError, match=r"^training failed 4 times at step 0, last with: .*died.; Ray's log: .*ray.log$"
    ):
        attempts(*[(worker_died(), 0)] * 9)
    steady = [(worker_died(), step) for step in range(1, 20)]
    assert attempts(*steady) == DONE, "one more step each time"
    with pytest.raises(RunError, match=r"^training failed 4 times at step 25"):
        attempts((worker_died(), 25), *[(worker_died(), 0)] * 9)


def test_errors_of_users_are_not_retried_even_on_a_full_disk(attempts: Callable[..., Any]) -> None:
    """A full disk cannot store the error either, so it is taken from the exception."""
    for error in (RunError("checkpoints/step-000002: cannot write"), SettingsError("--max_len: too short")):
        with pytest.raises(type(error), match=str(error)):
            attempts((WorkerGroupError("[Rank 0]", {0: error}), 0))


def test_advice_when_ray_kills_a_worker_for_its_memory(
    attempts: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray kills the largest process of a node before the kernel does."""
    killed = OutOfMemoryError("Task was killed due to the node running low on memory.")
    with pytest.raises(RunError, match=r"out of memory: lower --per_device_bsz \(now 2\) and raise --grad_accum"):
        attempts(*[(WorkerGroupError(str(killed), {0: killed}), 0)] * 9)


def test_a_run_restarts_after_its_controller_died(
    attempts: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray Train itself does not restart it: ``fit`` raises."""
    assert attempts((ActorDiedError(), 4)) == DONE
    assert "starting again from step 4" in capsys.readouterr().out


def test_a_run_grows_on_a_larger_cluster_and_stops_on_request(
    large_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first attempt ends because of GROW, the second because of GROW and STOP, which ends the run."""
    sizes, num_workers = [], iter([1, 2, 3])

    def fit_once(
        run: RunContext, data: Any, number: int, resource: str, callbacks: Any, outcome: dict[str, Any]
    ) -> None:
        assert not (run.run_dir / "GROW").exists()
        sizes.append(number)
        save(run.run_dir, number)
        (run.run_dir / "GROW").touch()
        if number == 2:
            (run.run_dir / "STOP").touch()
        outcome["result"] = {"steps": number, "finished": False}

    monkeypatch.setattr(elastic, "_fit_once", fit_once)
    monkeypatch.setattr(elastic, "wait_for_workers", lambda fewest, most, resource, is_stopped: next(num_workers))
    assert elastic.train_on_workers(text_run(tmp_path), TrainingData((), ()), (1, 3)) == {"steps": 2, "finished": False}
    assert sizes == [1, 2]
    assert "more than 1 worker(s) fit into the cluster: starting again from step 1" in capsys.readouterr().out
