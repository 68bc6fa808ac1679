"""Bases in another type than the stored one, which several processes convert once."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from voxray.models import shared_conversion
from voxray.models.registry import get_family
from voxray.models.shared_conversion import load_on_cpu, shares_weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Conversions of tiny models are shared here, in a folder of the test."""
    monkeypatch.setattr(shared_conversion, "MIN_BYTES", 1)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_converted_weights_are_those_of_transformers(folder_for_files: Path, dtype: torch.dtype) -> None:
    family = get_family(TINY)
    plain = family.load_model(TINY, dtype=dtype, device=CPU)
    with_files: list[str] = []
    load = family.load_model

    def load_and_look(model_id: str, **options: object) -> object:
        with_files.extend(path.name for path in Path(model_id).iterdir())
        return load(model_id, **options)  # type: ignore[arg-type]

    wrapped = SimpleNamespace(load_model=load_and_look, build_on_meta=family.build_on_meta)
    shared = load_on_cpu(wrapped, TINY, dtype=dtype, num_processes=2)  # type: ignore[arg-type]
    expected = plain.state_dict()
    assert {name: value.dtype for name, value in shared.state_dict().items()} == {
        name: value.dtype for name, value in expected.items()
    }
    assert all(torch.equal(value, expected[name]) for name, value in shared.state_dict().items())
    assert (shared.name_or_path, shared.config.name_or_path) == (TINY, TINY)
    assert "model.safetensors" in with_files
    left = [path.suffix for path in folder_for_files.rglob("*") if path.is_file()]
    assert sorted(left) == [".users", ".writer"]  # empty files


def test_who_shares(folder_for_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = get_family(TINY)
    assert shares_weights(family, TINY, dtype=torch.float16, num_processes=1)  # as it is stored
    assert not shares_weights(family, TINY, dtype=torch.bfloat16, num_processes=1)
    assert shares_weights(family, TINY, dtype=torch.bfloat16, num_processes=2)
    load_on_cpu(family, TINY, dtype=torch.float16, num_processes=2)
    assert not any(folder_for_files.iterdir())
    no_space = shutil._ntuple_diskusage(1, 1, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda path: no_space)
    model = load_on_cpu(family, TINY, dtype=torch.bfloat16, num_processes=2)
    assert model.dtype is torch.bfloat16
    monkeypatch.setattr(shared_conversion, "MIN_BYTES", 1 << 40)
    assert not shares_weights(family, TINY, dtype=torch.bfloat16, num_processes=2)


def test_files_of_a_killed_process_are_replaced(folder_for_files: Path) -> None:
    family = get_family(TINY)
    load_on_cpu(family, TINY, dtype=torch.bfloat16, num_processes=2)
    [users] = folder_for_files.rglob("*.users")
    unfinished = users.with_suffix(".unfinished")
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes(b"half")
    model = load_on_cpu(family, TINY, dtype=torch.bfloat16, num_processes=2)
    assert model.dtype is torch.bfloat16
    assert not unfinished.exists()
