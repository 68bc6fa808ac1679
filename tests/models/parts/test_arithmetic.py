"""The type that jobs compute in, if no flag chooses one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, WHISPER
from helpers.bfloat16 import stored_in_bfloat16
from helpers.running import load_job, parse_only

from voxray.config.evaluate import InferSettings
from voxray.config.train import MultitaskSettings
from voxray.core.errors import SettingsError
from voxray.generation.model import inference_config, resolve_settings
from voxray.models.parts import arithmetic
from voxray.models.parts.arithmetic import gpus_have_bfloat16, with_default_dtype
from voxray.sweep.folder import open_sweep
from voxray.sweep.work import trial_settings


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


def test_full_tuning_stays_in_float32(base: str, gpus: None, tmp_path: Path) -> None:
    """Its weights answer in float32 as well, as in the validations of the run. LoRA's do not."""
    settings = MultitaskSettings(model_id=base, train_jsonl=("t",), output_dir="o", tuning="full")
    assert not with_default_dtype(settings, base).bf16
    for tuning, expected in (("full", False), ("", True)):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"tuning": tuning, "tensors": []}))
        assert resolve_settings(InferSettings(model_id=base, question="q"), base, tmp_path).bf16 is expected


@pytest.mark.parametrize("model_id", [TINY, WHISPER])
def test_float32_bases_stay_so(model_id: str, gpus: None) -> None:
    assert not with_default_dtype(InferSettings(model_id=model_id, question="q"), model_id).bf16


def test_without_such_gpus_it_is_float32(base: str) -> None:
    settings = InferSettings(model_id=base, question="q")
    assert not with_default_dtype(settings, base).bf16 or torch.cuda.is_available()
    assert [with_default_dtype(settings, base, has_bfloat16=has).bf16 for has in (True, False)] == [True, False]


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
        *(({"GPU": 1, f"accelerator_type:{name}": 1}, True) for name in ("A100-80G", "L40S", "GB200", "RTX-A6000")),
        *(({"GPU": 1, f"accelerator_type:{name}": 1}, True) for name in ("RTX-3090", "RTX-4090", "H200", "A10G")),
        *(({"GPU": 1, f"accelerator_type:{name}": 1}, False) for name in ("V100", "P40", "RTX-8000", "RTX-2080")),
        *(({"GPU": 1, f"accelerator_type:{name}": 1}, False) for name in ("RTX-4000", "GTX-1080", "M60", "TITAN-RTX")),
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


def test_runs_record_the_type(
    base: str, gpus: None, small: dict[str, str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(arithmetic, "gpus_have_bfloat16", lambda *, on_ray: False)  # they are not there at the moment
    train([*common[:-4], "--max_steps", "2", "--num_workers", "0", *default])
    assert json.loads((tmp_path / "default" / "settings.json").read_text())["bf16"] is True
    assert "trained: 2 steps" in capsys.readouterr().out


def test_trials_of_a_sweep_have_the_type_of_their_settings(base: str, small: dict[str, str], tmp_path: Path) -> None:
    flags = ["--model_id", base, "--train_jsonl", small["tqa.train"], "--val_jsonl", small["tqa.val"]]
    flags += ["--output_dir", str(tmp_path)]
    for order in ("[lora, full]", "[full, lora]"):
        space = tmp_path / "space.yaml"
        space.write_text(f"space:\n  tuning: {order}\n")
        settings = parse_only("tune", [*flags, "--recipe", "text", "--config", str(space)])
        types = [
            trial_settings(settings, {"tuning": tuning}, tmp_path / "t", has_bfloat16=True).bf16
            for tuning in ("lora", "full")
        ]
        assert types == [True, False]


def test_a_sweep_keeps_its_type(tmp_path: Path) -> None:
    settings = parse_only("tune", ["--train_jsonl", "t", "--val_jsonl", "v", "--output_dir", str(tmp_path)])
    assert open_sweep(tmp_path, settings, {}, True)
    (tmp_path / "trials" / "0001").mkdir(parents=True)
    resumed = settings.model_copy(update={"resume": True})
    assert open_sweep(tmp_path, resumed, {}, False), "the GPUs of the first start count"
    with pytest.raises(SettingsError, match=r"holds a sweep with other settings: --fp32 \(was False, now True\)"):
        open_sweep(tmp_path, resumed.model_copy(update={"fp32": True}), {}, True)
