"""The jobs on what SALMONN's two encoders hear: their outputs stored, and compiled."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import read_rows, write_rows
from running import parse_only
from safetensors.torch import load_file, save_file
from test_stages import losses

from voxray import launch
from voxray.config.evaluate import EvaluateSettings
from voxray.data.collate import collate_training
from voxray.data.extract import Extractor, Storing
from voxray.data.features import Features
from voxray.errors import SettingsError
from voxray.evaluation import job
from voxray.evaluation.predictions import read_predictions
from voxray.models.family import family_of
from voxray.models.salmonn.folder import load_towers, write_folder
from voxray.recipes.salmonn import made_ready

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
FRAMES, WHISPERS, BEATS = 200, 128, 48  # of the tiny model's window of 4 s; widths of its encoders


@pytest.fixture(scope="module")
def rows(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Speech, a recording of three windows, one of 0.2 s, and text."""
    folder = tmp_path_factory.mktemp("rows")
    found = read_rows(small["asr.train"])[:3]
    speech = np.concatenate([soundfile.read(row["audio_path"], dtype="int16")[0] for row in found] * 3)
    for name, num_samples in (("long", 150_000), ("short", 3_200)):
        soundfile.write(folder / f"{name}.wav", speech[:num_samples], 16_000, subtype="PCM_16")
        found.append({"audio_path": str(folder / f"{name}.wav"), "transcript": name, "language": "en"})
    return write_rows(folder / "m.jsonl", found + read_rows(small["tqa.train"])[:1])


@pytest.fixture(scope="module")
def run(salmonn: str, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train on all rows together, three steps; returns the run folder."""
    folder = tmp_path_factory.mktemp("runs")

    def run(into: str, *flags: str) -> Path:
        usual = f"--model_id {salmonn} --train_jsonl {rows} --output_dir {folder / into} --features_dir {folder / 'f'} "
        usual += "--num_workers 0 --max_steps 3 --per_device_bsz 6 --lr 1e-3 --min_lr 0 --warmup_steps 0"
        launch.run_training(made_ready(parse_only("train_salmonn", [*usual.split(), *flags])))
        return folder / into

    return run


def stored(rows: str, model_id: str, folder: Path, make_features: Callable[..., Any], **storing: Any) -> Features:
    return Features(make_features(rows, folder=folder, model_id=model_id, store="encoder", **storing))


def test_stored_outputs_train_and_answer_alike(
    run: Callable[..., Path], rows: str, tmp_path: Path, evaluation_here: None
) -> None:
    """Float16 outputs as Voxtral's: within 1e-4 of the losses of log-mel, and the same answers."""
    plain = run("mel")
    assert losses(run("float32", "--store", "encoder", "--cache_dtype", "float32")) == pytest.approx(
        losses(plain), abs=1e-5
    )
    half = losses(run("float16", "--store", "encoder", "--cache_dtype", "float16"))
    assert half != losses(plain) and half == pytest.approx(losses(plain), abs=1e-3)
    found = {}
    for store in ("mel", "encoder"):
        flags = f"--lora_dir {plain} --val_jsonl {rows} --output_dir {tmp_path / store} --store {store}"
        flags += " --cache_dtype float32 --gen_max_new_tokens 8 --perplexity all"
        job.run_evaluation(parse_only("evaluate", flags.split()))
        found[store] = {row["id"]: (row["prediction"], row["nll"]) for row in read_predictions(tmp_path / store)}
    assert len(found["mel"]) == 6
    for name, (text, nll) in found["mel"].items():
        assert found["encoder"][name] == (text, pytest.approx(nll, abs=1e-3))
