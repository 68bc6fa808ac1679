"""What the driver does when a worker dies, or may be more of them, without Ray: one attempt of Ray Train is a stand-in.

That Ray's own workers are killed and started again is in tests/jobs/test_kill.py, nodes are in test_nodes.py there.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import WorkerGroupError

from voxray.config.train import TextSettings
from voxray.core.errors import RunError, SettingsError
from voxray.launch import elastic as launch
from voxray.recipes.run_stage import TrainingData

DIED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR and so on"


def died() -> WorkerGroupError:
    return WorkerGroupError(f"[Rank 1]\n{DIED}", {1: RuntimeError(DIED)})


DONE = {"steps": 9, "finished": True}


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that has room for whatever is asked."""
    monkeypatch.setattr(launch, "wait_for_workers", lambda fewest, most, is_stopped: most)


def save(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "progress.json").touch()


@pytest.fixture
def attempts(roomy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Run attempts that end with these errors, after which there are checkpoints of those steps; the last succeeds."""

    def run(*ends: tuple[Exception, int]) -> Any:
        left = iter(ends)

        def once(settings: Any, run_dir: Path, data: Any, number: int, callbacks: Any, outcome: dict) -> None:
            error, step = next(left, (None, 0))
            if error is None:
                outcome["result"] = DONE
                return
            outcome["error"] = error
            if step:
                save(run_dir, step)

        monkeypatch.setattr(launch, "_fit_once", once)
        settings = TextSettings.model_validate({"train_jsonl": "x", "output_dir": str(tmp_path)})
        return launch.train_on_workers(settings, tmp_path, TrainingData((), ()), (2, 2))

    yield run


def test_a_dead_worker_is_said_in_one_line_and_started_again(
    attempts: Callable[..., Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert attempts((died(), 4)) == DONE
    said = " ".join(capsys.readouterr().out.split())
    reason = "The actor is dead because its worker process has died."
    assert said == f"a worker failed ({reason}); starting again from step 4"
    assert DIED in (tmp_path / "ray.log").read_text()


def test_restarts_are_bounded_unless_the_run_gets_on(attempts: Callable[..., Any]) -> None:
    with pytest.raises(
        RunError, match=r"^training failed 4 times at step 0, last with: .*died.; Ray's log: .*ray.log$"
    ):
        attempts(*[(died(), 0)] * 9)
    steady = [(died(), step) for step in range(1, 20)]
    assert attempts(*steady) == DONE, "a step further each time"
    with pytest.raises(RunError, match=r"^training failed 4 times at step 25"):
        attempts((died(), 25), *[(died(), 0)] * 9)


def test_a_refusal_is_not_tried_again_even_on_a_full_disk(attempts: Callable[..., Any]) -> None:
    """The disk that is full takes no note of the error either; then the exception itself says it."""
    for refusal in (RunError("checkpoints/step-000002: cannot write"), SettingsError("--max_len: too short")):
        with pytest.raises(type(refusal), match=str(refusal)):
            attempts((WorkerGroupError("[Rank 0]", {0: refusal}), 0))


def test_a_worker_that_ray_kills_for_memory_is_told_what_to_lower(
    attempts: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray ends the largest process of a node before the kernel does."""
    killed = OutOfMemoryError("Task was killed due to the node running low on memory.")
    with pytest.raises(RunError, match=r"out of memory: lower --per_device_bsz \(now 2\) and raise --grad_accum"):
        attempts(*[(WorkerGroupError(str(killed), {0: killed}), 0)] * 9)


def test_a_dead_controller_is_started_again(attempts: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Ray Train itself does not: its ``fit`` just raises."""
    assert attempts((ActorDiedError(), 4)) == DONE
    assert "starting again from step 4" in capsys.readouterr().out


def test_a_run_grows_when_there_is_room_and_stops_when_it_is_told_to(
    roomy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Attempts end unfinished because of GROW, then because of GROW and STOP: only the first is no end."""
    sizes, room = [], iter([1, 2, 3])

    def once(settings: Any, run_dir: Path, data: Any, number: int, callbacks: Any, outcome: dict) -> None:
        assert not (run_dir / "GROW").exists()
        sizes.append(number)
        save(run_dir, number)
        (run_dir / "GROW").touch()
        if number == 2:
            (run_dir / "STOP").touch()
        outcome["result"] = {"steps": number, "finished": False}

    monkeypatch.setattr(launch, "_fit_once", once)
    monkeypatch.setattr(launch, "wait_for_workers", lambda fewest, most, is_stopped: next(room))
    settings = TextSettings.model_validate({"train_jsonl": "x", "output_dir": str(tmp_path)})
    assert launch.train_on_workers(settings, tmp_path, TrainingData((), ()), (1, 3)) == {"steps": 2, "finished": False}
    assert sizes == [1, 2]
    assert "room for more than 1 worker(s): starting again with them from step 1" in capsys.readouterr().out
