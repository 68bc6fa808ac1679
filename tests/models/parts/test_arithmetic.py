"""The type that jobs compute in, if no flag chooses one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, WHISPER
from helpers.running import load_job
from safetensors.torch import load_file, save_file

from voxray.config.evaluate import InferSettings
from voxray.config.train import MultitaskSettings
from voxray.generation.model import inference_config, resolve_settings
from voxray.models.parts import arithmetic
from voxray.models.parts.arithmetic import gpus_have_bfloat16, with_default_dtype


def stored_in_bfloat16(folder: Path) -> str:
    """A copy of the tiny base whose weights are in bfloat16, as config.json says."""
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight.bfloat16() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = (folder / "config.json").read_text().replace('"float32"', '"bfloat16"')
    (folder / "config.json").write_text(config)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return stored_in_bfloat16(tmp_path_factory.mktemp("bases") / "bfloat16")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs that compute in bfloat16, as far as the choice of the type asks."""
    monkeypatch.setattr(arithmetic, "gpus_have_bfloat16", lambda *, on_ray: True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"fp32": True}, False),
        ({"bf16": False}, False),  # as a YAML file may say
        ({"fp16": True}, False),
        ({"bf16": True}, True),
    ],
)
def test_flags_go_before_the_base(base: str, gpus: None, values: dict[str, Any], expected: bool) -> None:
    settings = InferSettings(model_id=base, question="q", **values)
    assert with_default_dtype(settings, base).bf16 is expected
    settings = resolve_settings(settings, base, None)
    assert inference_config(settings, base, None, 8, 1).bf16 is expected


def test_full_tuning_stays_in_float32(base: str, gpus: None) -> None:
    settings = MultitaskSettings(model_id=base, train_jsonl=("t",), output_dir="o", tuning="full")
    assert not with_default_dtype(settings, base).bf16


@pytest.mark.parametrize("model_id", [TINY, WHISPER])
def test_float32_bases_stay_so(model_id: str, gpus: None) -> None:
    assert not with_default_dtype(InferSettings(model_id=model_id, question="q"), model_id).bf16


def test_without_such_gpus_it_is_float32(base: str) -> None:
    settings = InferSettings(model_id=base, question="q")
    assert not with_default_dtype(settings, base).bf16 or torch.cuda.is_available()
    assert with_default_dtype(settings, base, gpu="l4").bf16 and not with_default_dtype(settings, base, gpu="t4").bf16


@pytest.mark.parametrize(("capabilities", "expected"), [([], False), ([9, 8], True), ([9, 7], False)])
def test_all_gpus_of_this_machine_count(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (capabilities[number], 0))
    assert gpus_have_bfloat16(on_ray=False) is expected


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"CPU": 8}, False),
        ({"CPU": 8, "GPU": 2, "accelerator_type:H100": 2}, True),
        ({"CPU": 8, "GPU": 2, "accelerator_type:H100": 1, "accelerator_type:T4": 1}, False),
    ],
)
def test_all_gpus_of_the_cluster_count(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], expected: bool
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    assert gpus_have_bfloat16(on_ray=True) is expected


def test_runs_record_the_type(base: str, gpus: None, small: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    """A run is resumed with the type that it has, whether it was chosen or the default."""
    common = ["--model_id", base, "--train_jsonl", small["tqa.train"], "--max_steps", "1", "--num_workers", "0"]
    default, chosen = (["--output_dir", str(tmp_path / name)] for name in ("default", "chosen"))
    train = load_job("train_text").main
    train([*common, *default])
    train([*common, *chosen, "--fp32"])
    types = [json.loads((tmp_path / name / "settings.json").read_text())["bf16"] for name in ("default", "chosen")]
    assert types == [True, False]
    with pytest.raises(SystemExit) as ended:
        train([*common, *default, "--fp32"])
    assert ended.value.code == 2
    assert "holds a run with other settings: --bf16 (was True, now False)" in capsys.readouterr().err
