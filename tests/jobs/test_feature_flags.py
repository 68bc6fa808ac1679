"""Effects of the feature flags: stored form, location, variants and masks."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from conftest import TINY, read_rows, write_rows
from helpers.training import train as train_here

from voxray.batches import loader
from voxray.batches.rank import Worker
from voxray.commands import evaluate as job
from voxray.commands import featurize
from voxray.config.evaluate import EvaluateSettings
from voxray.config.featurize import FeaturizeSettings
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError
from voxray.core.storage import CacheLimits, RemotePath
from voxray.features import from_settings as feature_sets
from voxray.features.reader import Features
from voxray.recipes.run_context import RunContext
from voxray.recipes.training_data import training_data
from voxray.training.records import read_metrics


@pytest.fixture
def speech(small: dict[str, str], tmp_path: Path) -> str:
    return write_rows(tmp_path / "asr.jsonl", read_rows(small["asr.train"])[:4])


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, speech: str, tmp_path: Path) -> Any:
    """Run the featurize job in this process; returns its features and the schema of a shard."""
    monkeypatch.setattr(featurize, "ray_session", lambda *args: nullcontext())
    monkeypatch.setattr(featurize, "make_features", partial(feature_sets.make_features, use_ray=False))

    def run(**flags: Any) -> tuple[Features, dict[str, Any]]:
        usual = {"model_id": TINY, "manifest": speech, "output_dir": str(tmp_path / "f")}
        folders = featurize.run_featurize_job(FeaturizeSettings.model_validate({**usual, **flags})).folders
        assert isinstance(folders[0], Path)
        schema = pa.ipc.open_file(str(next(folders[0].glob("shards/*.arrow")))).schema
        return Features(folders), {**(schema.metadata or {}), "type": schema.field("audio").type.value_type}

    return run


def test_store(make: Any) -> None:
    kinds = {}
    for flags in ({}, {"store": "pcm16"}, {"cache": "encoder"}, {"store": "encoder", "cache_dtype": "float32"}):
        names = {("store" if name == "cache" else name): value for name, value in flags.items()}
        features, schema = make(**names)
        kinds[tuple(flags.values())] = (features.store, str(schema["type"]))
    assert list(kinds.values()) == [
        ("mel", "halffloat"),
        ("pcm16", "int16"),
        ("encoder", "uint16"),
        ("encoder", "float"),
    ]


def test_cache_budget_and_bf16(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match=r"--cache_budget_gib 1e-05: encoder outputs need up to"):
        make(store="encoder", cache_budget_gib=1e-5)
    full, _ = make(store="encoder", cache_budget_gib=1)
    assert "encoder outputs will take" in capsys.readouterr().out
    half, _ = make(store="encoder", bf16=True)
    assert full.folders != half.folders
    one, other = (features.row(0).audio.view(np.uint16) for features in (full, half))
    assert one.shape == other.shape and 0 < np.mean(one != other) < 1


def test_verify(make: Any) -> None:
    features, _ = make()
    shard = features.folders[0] / "shards" / "00000.arrow"
    right = shard.read_bytes()
    middle = len(right) // 2
    shard.write_bytes(right[:middle] + bytes([right[middle] ^ 1]) + right[middle + 1 :])
    make()
    assert shard.read_bytes() != right
    make(verify=True)
    assert shard.read_bytes() == right


def test_variants(make: Any, tmp_path: Path) -> None:
    for name, value in (("noise", 1.0), ("rooms", 0.5)):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", np.random.default_rng(0).normal(0, value / 9, 8000), 16_000)
    noise = {"variants": 2, "speeds": "1.0", "noise_snr": "0,1", "noise_share": 1}
    seen = {}
    for name, flags in {
        "usual": {"variants": 3},
        "speeds": {"variants": 3, "speeds": "0.8,1.2"},
        "noise": noise,
        "louder": {**noise, "noise_snr": "-9,-8"},
        "from files": {**noise, "noise_dir": str(tmp_path / "noise")},
        "seldom": {**noise, "noise_share": 0.0, "variants": 2, "speeds": "0.9"},
        "seed": {**noise, "variant_seed": 1},
        "rooms": {"variants": 2, "speeds": "1.0", "room_dir": str(tmp_path / "rooms"), "room_share": 1},
        "no rooms": {"variants": 2, "speeds": "0.9", "room_dir": str(tmp_path / "rooms"), "room_share": 0},
    }.items():
        features, _ = make(**flags)
        assert len(features) == 4 * flags["variants"], name
        seen[name] = (features.num_samples[1], features.row(1).audio.tobytes())
    assert seen["usual"][0] * 0.9 == pytest.approx(seen["speeds"][0] * 0.8, abs=2)
    assert len({audio for _, audio in seen.values()}) == len(seen) - 2, "0.9 without anything is one and the same"
    assert seen["usual"] == seen["seldom"] == seen["no rooms"]


def test_language(speech: str, tmp_path: Path, make: Any) -> None:
    """Applies to rows that name no language; the others keep their own."""
    rows = read_rows(speech)
    rows[0]["language"], rows[1]["language"] = "", "en"
    features, _ = make(manifest=write_rows(tmp_path / "l.jsonl", rows))
    assert features.has_language.tolist() == [False, True, True, True]
    plain = [features.row(number).prompt_ids.tolist() for number in range(3)]
    features, _ = make(manifest=str(tmp_path / "l.jsonl"), language="Korean")
    assert features.has_language.all() and features.row(0).language == "ko"
    prompts = [features.row(number).prompt_ids.tolist() for number in range(3)]
    assert prompts[1:] == plain[1:] and len(prompts[0]) > len(plain[0]), "lang:ko is in the prompt"


def test_feature_flags_reach_training(small: dict[str, str], speech: str, tmp_path: Path) -> None:
    """Training manifests get the variants, the held-out ones do not; both use the requested stored form."""
    flags = {"model_id": TINY, "train_jsonl": speech, "val_jsonl": small["asr.val"], "num_workers": 0, "variants": 3}
    settings = MultitaskSettings.model_validate({**flags, "output_dir": str(tmp_path), "cache_dtype": "float32"})
    stored = RunContext.create(settings.model_copy(update={"store": "encoder"}), run_dir=tmp_path)
    data = training_data(stored, use_ray=False)
    train, held_out = Features(data.train), Features(data.validation)
    assert (train.store, len(train), len(held_out)) == ("encoder", 12, 4)
    assert train.row(0).audio.dtype == np.float32
    tight = settings.model_copy(update={"store": "encoder", "cache_budget_gib": 1e-6})
    with pytest.raises(RunError, match="--cache_budget_gib"):
        training_data(RunContext.create(tight, run_dir=tmp_path), use_ray=False)
    (tmp_path / "run").mkdir()
    run = settings.model_copy(update={"store": "encoder", "max_steps": 2, "eval_max_new_tokens": 2})
    assert train_here(run, tmp_path / "run", data, Worker())["steps"] == 2


def test_masks(speech: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masks, spec_augment = [], loader.spec_augment
    monkeypatch.setattr(
        loader, "spec_augment", lambda mel, options, rng: masks.append(options) or spec_augment(mel, options, rng)
    )
    losses = []
    for number, flags in enumerate(
        (
            {},
            {"freq_masks": 2, "freq_mask_bins": 99},
            {"time_masks": 3, "time_mask_frames": 50, "time_mask_share": 0.9},
        )
    ):
        values = {"model_id": TINY, "train_jsonl": speech, "num_workers": 0, "max_steps": 1, "lora_dropout": 0.0}
        settings = MultitaskSettings.model_validate({**values, "output_dir": str(tmp_path), **flags})
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        data = training_data(RunContext.create(settings, run_dir=tmp_path), use_ray=False)
        train_here(settings, run_dir, data, Worker())
        [record] = read_metrics(run_dir, "train")
        losses.append(record["loss"])
    assert len(set(losses)) == 3
    assert [(options.freq_masks, options.freq_mask_bins) for options in masks[:2]] == [(2, 99)] * 2
    expected = [(3, 50, 0.9)] * 2
    assert [
        (options.time_masks, options.time_mask_frames, options.time_mask_share) for options in masks[-2:]
    ] == expected


def test_feature_flags_reach_evaluation(small: dict[str, str], tmp_path: Path, evaluation_here: None) -> None:
    """Answers from stored encoder outputs are those from log-mel."""
    answers = []
    for number, flags in enumerate(({}, {"store": "encoder", "cache_dtype": "float32"}, {"store": "pcm16"})):
        values = {"model_id": TINY, "val_jsonl": small["asr.val"], "output_dir": str(tmp_path / str(number))}
        job.run_evaluation(EvaluateSettings.model_validate({**values, "gen_max_new_tokens": 12, **flags}))
        answers.append([row["prediction"] for row in job.read_predictions(tmp_path / str(number))])
        [folder] = (tmp_path / str(number) / "features").iterdir()
        assert Features([folder]).store == flags.get("store", "mel")
    assert answers[0] == answers[1] == answers[2] and any(answers[0])
    values |= {"store": "encoder", "cache_budget_gib": 1e-6, "output_dir": str(tmp_path / "tight")}
    with pytest.raises(RunError, match="--cache_budget_gib"):
        job.run_evaluation(EvaluateSettings.model_validate(values))


def test_features_cache(tmp_path: Path) -> None:
    """Where copies of remote shards go, and how many (tests/features/test_remote_shards.py has the rest)."""
    flags = {"features_cache_dir": str(tmp_path / "c"), "features_cache_gib": 3}
    for settings in (
        FeaturizeSettings.model_validate({"manifest": "m", **flags}),
        MultitaskSettings.model_validate({"train_jsonl": "t", "output_dir": "o", **flags}),
        EvaluateSettings.model_validate({"val_jsonl": "v", **flags}),
    ):
        remote_dir = feature_sets.open_features_dir(settings, "memory://voxray-flag", "", flag="--features_dir")
        assert isinstance(remote_dir, RemotePath) and remote_dir.cache == CacheLimits(str(tmp_path / "c"), 3 * 2**30)
