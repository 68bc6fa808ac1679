"""A model family and a recipe from somebody's own package, which voxray finds by entry points.

``assets/toy-family`` is such a package. It trains packed, is killed, resumes, is evaluated, preflighted and exported.
No file of voxray knows it.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ASSETS
from helpers.running import ROOT, environment, parse_only
from safetensors.torch import load_file

from voxray.commands.evaluate import run_evaluation
from voxray.commands.export import run_export
from voxray.commands.preflight import run_preflight
from voxray.commands.train import run_training
from voxray.config.recipes import recipes
from voxray.core.errors import SettingsError
from voxray.models.registry import families, get_family

PACKAGE = ASSETS / "toy-family"
TRAIN = """
import sys
from voxray.commands.train import run_training
from toy_asr import ToySettings

run_training(ToySettings.model_validate_json(sys.argv[1]))
"""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module ``toy_asr``, installed; tests after this one do not see it."""

    def forget() -> None:
        recipes.cache_clear()
        families.cache_clear()

    monkeypatch.syspath_prepend(str(PACKAGE))
    forget()
    import toy_asr  # type: ignore[import-not-found]

    yield toy_asr
    monkeypatch.undo()
    forget()
    sys.modules.pop("toy_asr")


@pytest.fixture
def base(installed: Any, tmp_path: Path) -> str:
    return installed.write_base(tmp_path / "base")


def settings(installed: Any, base: str, small: dict[str, str], run_dir: Path) -> Any:
    values = {"model_id": base, "output_dir": str(run_dir), "num_workers": 0, "lora_r": 2, "lora_alpha": 4}
    values |= {"train_jsonl": [small[f"{task}.train"] for task in ("asr", "sqa", "tqa")]}
    values |= {"val_jsonl": [small["asr.val"]], "eval_max_new_tokens": 4, "preview_rows": 0}
    steps = {"max_steps": 30, "save_steps": 2, "eval_steps": 15}
    return installed.ToySettings(**values, **steps, batching="packed", pack_tokens=400)


def test_it_trains_resumes_after_a_kill_and_is_evaluated_and_exported(
    installed: Any,
    base: str,
    small: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluation_here: None,
) -> None:
    whole = run_training(settings(installed, base, small, tmp_path / "whole"))
    assert whole["steps"] == 30 and "asr/cer" in whole

    values = settings(installed, base, small, tmp_path / "run")
    env = {**environment(), "PYTHONPATH": f"{PACKAGE}:{ROOT}"}
    killed = subprocess.Popen([sys.executable, "-c", TRAIN, values.model_dump_json(exclude_unset=True)], env=env)
    while not list((tmp_path / "run" / "checkpoints").glob("step-00000[4-9]/progress.json")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert run_training(values)["steps"] == 30
    assert "resuming from step" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "run")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(adapters[0][name].equal(adapters[1][name]) for name in adapters[0]), "equal to the last bit"

    monkeypatch.chdir(tmp_path)
    run_export(parse_only("export", f"--model_id {base} --lora_dir run/adapter --output_dir merged".split()))
    usual = f"--val_jsonl {small['asr.val']} --gen_max_new_tokens 4"
    with_adapter = run_evaluation(
        parse_only("evaluate", f"--model_id {base} --lora_dir run/adapter --output_dir a {usual}".split())
    )
    merged = run_evaluation(parse_only("evaluate", f"--model_id merged --output_dir b {usual}".split()))
    assert with_adapter.metrics == merged.metrics, "the merged model answers as base and adapter do"


def test_it_has_a_preflight(installed: Any, base: str, small: dict[str, str], tmp_path: Path) -> None:
    line = f"--recipe toy --model_id {base} --train_jsonl {small['asr.train']} --output_dir {tmp_path / 'run'}"
    run_preflight(parse_only("preflight", f"{line} --num_workers 0 --lora_r 2 --lora_alpha 4 --no_tune".split()))
    report = json.loads((tmp_path / "run" / "preflight" / "preflight.json").read_text(encoding="utf-8"))
    assert report["ready"] and report["job"] == "train_toy"
    assert report["parameters"]["ears"]["trainable"] == 0 < report["parameters"]["writer"]["trainable"]
    assert report["memory"]["predicted_bytes"] == pytest.approx(report["memory"]["measured_bytes"], rel=0.2)


@pytest.mark.slow
def test_its_workers_find_it_too(installed: Any, base: str) -> None:
    """Ray's processes look the settings class up by its name, and the family by the entry points of their machine."""
    code = f"from voxray.models.registry import get_family; print(get_family({base!r}).name)"
    env = {**environment(), "PYTHONPATH": f"{PACKAGE}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "toy_asr"


def test_without_the_package_its_models_are_unknown(installed: Any, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    families.cache_clear()
    with pytest.raises(SettingsError, match="model type 'toy_asr' is not supported: supported are voxtral"):
        get_family(base)
