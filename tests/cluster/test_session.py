"""Starting and reaching Ray: a busy machine, a dead address, a path too long for sockets, and the token's mode."""

import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from voxray.cluster import session
from voxray.cluster.session import ray_session
from voxray.core.errors import RunError, SettingsError

TIMEOUT = "The current node timed out during startup. This could happen because the raylet failed to start."


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Outcomes of the next calls of ``ray.init``, errors or None; without any left it succeeds."""
    outcomes: list[Any] = []

    def init(**options: Any) -> None:
        if outcomes and (error := outcomes.pop(0)):
            raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session, "RETRY_AFTER_SEC", (0.01, 0.01))
    return outcomes


def test_a_start_on_a_busy_machine_is_tried_again(
    starts: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starts += [RuntimeError(TIMEOUT), RuntimeError(TIMEOUT)]
    with ray_session(tmp_path / "ray.log"):
        pass
    assert capsys.readouterr().out.count("this machine is busy") == 2


def test_the_last_start_reports_its_error(starts: list[Any], tmp_path: Path) -> None:
    starts += [RuntimeError(TIMEOUT)] * 3
    with pytest.raises(RunError, match="Ray could not be started: The current node timed out"), ray_session(tmp_path):
        pass
    assert not starts


def test_other_errors_are_not_tried_again(starts: list[Any], tmp_path: Path) -> None:
    starts += [RuntimeError("no memory"), None]
    with pytest.raises(RunError, match="Ray could not be started: no memory"), ray_session(tmp_path):
        pass
    assert starts == [None]


def test_the_token_is_readable_by_its_owner_only(starts: list[Any], tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    with ray_session(tmp_path / "ray.log"):
        assert token.stat().st_mode & 0o777 == 0o600


def test_a_dead_address_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    start = time.monotonic()
    message = f"RAY_ADDRESS 127.0.0.1:{port}: no cluster answers there"
    with pytest.raises(RunError, match=message), ray_session(tmp_path / "ray.log"):
        pass
    assert time.monotonic() - start < 30


@pytest.mark.ray
def test_a_folder_too_long_for_sockets_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    message = r"^RAY_TMPDIR .*: too long for Ray's sockets"
    with pytest.raises(RunError, match=message), ray_session(tmp_path / "ray.log"):
        pass
    assert os.environ["RAY_TMPDIR"] == str(long)


def test_the_dashboard_is_named_with_its_login(monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.dashboard_line() == "", "no Ray runs"
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for url, mode, line in (
        (
            "127.0.0.1:8265",
            "token",
            "Ray's dashboard: http://127.0.0.1:8265; it asks for the token in ~/.ray/auth_token",
        ),
        ("127.0.0.1:8265", "disabled", "Ray's dashboard: http://127.0.0.1:8265"),
        ("", "token", ""),
    ):
        monkeypatch.setattr("ray._private.worker.get_dashboard_url", lambda url=url: url)
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        assert session.dashboard_line() == line


def test_ray_prints_nothing_about_dead_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ray's driver prints such lines itself; they belong to the log."""
    from ray._private import worker

    session._quiet_loggers(tmp_path / "ray.log")
    line = {"lines": ["A worker died or was killed"], "pid": "raylet", "is_err": False}
    worker.print_to_stdstream(line, ignore_prefix=False)  # type: ignore[no-untyped-call]
    assert capsys.readouterr() == ("", "") and "A worker died" in (tmp_path / "ray.log").read_text()


def test_a_cluster_may_state_its_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 24.0, "GPU": 2.0})
    monkeypatch.setattr("ray._private.state.state.get_max_resources_from_cluster_config", lambda: None)
    assert (session.max_gpus(), session.max_resource("CPU"), session.cpus_for_data()) == (2, 24, 24)
    monkeypatch.setenv("VOXRAY_MAX_GPUS", "4")
    monkeypatch.setenv("VOXRAY_MAX_CPUS", "128")
    assert (session.max_gpus(), session.max_resource("CPU"), session.cpus_for_data()) == (4, 128, 128)
    monkeypatch.setenv("VOXRAY_MAX_GPUS", "four")
    with pytest.raises(SettingsError, match="VOXRAY_MAX_GPUS four: must be a whole number"):
        session.max_gpus()
