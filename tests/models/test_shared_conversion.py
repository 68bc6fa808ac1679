"""Bases in another type than the stored one, whose weights several processes share."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, WHISPER
from helpers.running import ROOT, environment

from voxray.models import shared_conversion
from voxray.models.registry import get_family
from voxray.models.shared_conversion import load_shared, shared_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of tiny models are shared here, in a folder of the test."""
    monkeypatch.setattr(shared_conversion, "MIN_BYTES", 1)
    monkeypatch.setattr(shared_conversion, "_locks_in_use", [])
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def folders(temporary: Path) -> list[Path]:
    return [path for path in temporary.glob("voxray-*/*") if path.is_dir()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("base", [TINY, WHISPER])
def test_shared_weights_are_those_of_transformers(temporary: Path, base: str, dtype: torch.dtype) -> None:
    family = get_family(base)
    expected = family.load_model(base, dtype=dtype, device=CPU).state_dict()
    shared_with = 2 if shared_bytes(base, dtype, 2) else 0
    for _ in range(2):
        model = load_shared(family, base, dtype=dtype, device=CPU, num_processes=2)
        found = model.state_dict()
        assert {name: value.dtype for name, value in found.items()} == {
            name: value.dtype for name, value in expected.items()
        }
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert model.name_or_path == base
    assert len(folders(temporary)) == min(1, shared_with)


def test_when_weights_are_shared(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_bytes(TINY, torch.float16, 2) == 0  # as it is stored
    assert shared_bytes(TINY, torch.float32, 1) == 0
    stored = (Path(TINY) / "model.safetensors").stat().st_size
    assert shared_bytes(TINY, torch.float32, 2) == 2 * stored
    no_space = shutil._ntuple_diskusage(1, 1, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda path: no_space)
    assert shared_bytes(TINY, torch.float32, 2) == 0
    model = load_shared(get_family(TINY), TINY, dtype=torch.float32, device=CPU, num_processes=2)
    assert model.dtype is torch.float32 and not folders(temporary)


@pytest.mark.parametrize("fault", ["full disk", "a file in the place of the folder", "no locks"])
def test_without_the_file_a_process_keeps_its_own_weights(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    if fault == "full disk":
        monkeypatch.setattr(shared_conversion, "write_weights", fail)
    elif fault == "no locks":
        monkeypatch.setattr(fcntl, "flock", fail)
    else:
        name = f"voxray-{shared_conversion.platform.node()}-{shared_conversion.os.getuid()}"
        (temporary / name).write_text("")
    model = load_shared(get_family(TINY), TINY, dtype=torch.float32, device=CPU, num_processes=2)
    assert model.dtype is torch.float32
    assert not folders(temporary)


SCRIPT = """
import os, sys, torch
from voxray.models import shared_conversion
from voxray.models.registry import get_family
shared_conversion.MIN_BYTES = 1
dtype = getattr(torch, sys.argv[2])
options = {"dtype": dtype, "device": torch.device("cpu"), "num_processes": 2}
shared_conversion.load_shared(get_family(sys.argv[1]), sys.argv[1], **options)
if sys.argv[3:]:
    os.kill(os.getpid(), 9)
"""


def test_the_last_process_deletes_the_file_and_a_later_job_what_a_killed_one_left(temporary: Path) -> None:
    def run(*arguments: str) -> int:
        variables = {**environment(), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", SCRIPT, TINY, *arguments], env=variables).returncode

    assert run("float32", "killed") == -9
    assert len(folders(temporary)) == 1
    assert run("bfloat16") == 0
    assert not folders(temporary)
