"""--lora_scale of evaluate and infer, and --scale of export: a share of what an adapter adds."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from helpers.adapters import random_adapter
from helpers.running import parse_only

from voxray.commands import evaluate as job
from voxray.commands import infer
from voxray.commands.export import run_export
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.config.export import ExportSettings
from voxray.core.errors import SettingsError
from voxray.evaluation.predictions import read_predictions

pytestmark = pytest.mark.usefixtures("one_thread", "evaluation_here")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return random_adapter(tmp_path / "adapter", std=0.1)


def texts(folder: Path) -> list[str]:
    return [row["prediction"] for row in read_predictions(folder)]


def test_scales_of_an_adapter(
    small: dict[str, str], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 is the base, 1 the adapter, and 0.5 a model that is exported with half of it."""
    manifests = (small["asr.val"], small["tqa.val"])
    values = {"model_id": TINY, "val_jsonl": manifests, "features_dir": "f", "gen_max_new_tokens": 8}
    values["storage_path"] = str(tmp_path)

    def evaluate(**flags: Any) -> Path:
        return job.run_evaluation(EvaluateSettings.model_validate({**values, **flags})).output_dir

    folder = evaluate(lora_dir=str(adapter), lora_scale="0,0.5,1", output_dir="scales")
    shown = capsys.readouterr().out
    at = {scale: texts(folder / f"scale-{scale}") for scale in ("0", "0.5", "1")}
    report = run_export(ExportSettings(lora_dir=str(adapter), output_dir=str(tmp_path / "half"), scale=0.5))
    assert report["scale"] == 0.5
    assert at["0"] == texts(evaluate(output_dir="base"))
    assert at["1"] == texts(evaluate(lora_dir=str(adapter), output_dir="whole"))
    assert at["0.5"] == texts(evaluate(model_id=str(tmp_path / "half"), output_dir="exported"))
    assert len({tuple(answers) for answers in at.values()}) == 3
    merged = evaluate(lora_dir=str(adapter), lora_scale="0.5", merge_adapter=True, output_dir="merged")
    assert texts(merged) == at["0.5"] and not (merged / "frontier.json").exists()

    points = json.loads((folder / "frontier.json").read_text())
    assert [(point["scale"], point["manifest"], point["task"]) for point in points] == [
        (scale, f"{task}.val.jsonl", task) for scale in (0, 0.5, 1) for task in ("asr", "tqa")
    ]
    for point in points:
        metrics = json.loads((folder / f"scale-{point['scale']:g}" / "metrics.json").read_text())
        expected = metrics[point["task"]][point["metric"]]
        assert {name: point[name] for name in ("value", "low", "high", "n")} == expected
    assert "asr cer_nospace" in shown and "tqa rouge_l" in shown and "0.5" in shown

    settings = {"model_id": TINY, "lora_dir": str(adapter), "lora_scale": 0.5, "max_new_tokens": 8}
    rows = infer.run_inference(InferSettings.model_validate({**settings, "jsonl": small["tqa.val"]}), "")
    half = [row["prediction"] for row in read_predictions(folder / "scale-0.5") if row["task"] == "tqa"]
    assert sorted(row["prediction"] for row in rows) == sorted(half)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_scale", "0.5"], "--lora_scale: needs --lora_dir and --val_jsonl"),
        (["--lora_dir", "a", "--lora_scale", "3"], "--lora_scale 3: must be between 0 and 2"),
        (["--lora_dir", "a", "--lora_scale", "1,1"], "--lora_scale: takes each value once"),
    ],
)
def test_scales_that_make_no_sense(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_only("evaluate", ["--val_jsonl", "v.jsonl", "--model_id", TINY, *flags])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("tuning", ["dora", "full"])
def test_what_cannot_be_scaled(tuning: str, tmp_path: Path, small: dict[str, str]) -> None:
    folder = random_adapter(tmp_path / "adapter", std=0.1, tuning=tuning)
    with pytest.raises(SettingsError, match=r"--scale 0\.5: (DoRA|.* as a whole)"):
        run_export(ExportSettings(lora_dir=str(folder), output_dir=str(tmp_path / "e"), scale=0.5))
    settings = InferSettings(model_id=TINY, lora_dir=str(folder), lora_scale=0.5, jsonl=small["tqa.val"])
    with pytest.raises(SettingsError, match=r"--lora_scale 0\.5: "):
        infer.run_inference(settings, "")
