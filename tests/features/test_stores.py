"""What a set can store of a clip (log-mel, samples, encoder outputs): the same training, at the promised exactness."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY, manifest, read_rows, write_rows
from helpers.training import train as train_here

from voxray.batches.collate import collate_training
from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError, SettingsError
from voxray.features import extract
from voxray.features.disk_estimate import chunk_bytes
from voxray.features.extract import Extractor, FeatureSpec
from voxray.features.featurize import featurize
from voxray.features.reader import Features
from voxray.models.registry import get_family
from voxray.recipes.training_data import TrainingData

WINDOW_SEC = 4.0  # of the tiny model


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Speech and text, and one clip that fills three windows."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [row for task in ("asr", "sqa", "tqa") for row in read_rows(manifest(f"{task}.train"))[:5]]
    samples = np.concatenate([soundfile.read(row["audio_path"], dtype="int16")[0] for row in rows[:5]] * 3)
    soundfile.write(folder / "long.wav", samples[: int(16_000 * 2.3 * WINDOW_SEC)], 16_000, subtype="PCM_16")
    rows.append({"audio_path": str(folder / "long.wav"), "transcript": "긴 녹음", "language": "ko"})
    return write_rows(folder / "m.jsonl", rows)


def make(rows: str, folder: Path, **spec: Any) -> Features:
    report = featurize([rows], Extractor(TINY, FeatureSpec(**spec)), folder, rows_per_shard=6, use_ray=False)
    assert (report.num_rows, report.num_bad) == (16, 0)
    return Features(report.folders)


def train(features: Features, run_dir: Path, **changes: Any) -> dict[str, list[float]]:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "lora_dropout": 0.0, "lr": 2e-4}
    values |= {"max_steps": 4, "per_device_bsz": 5, "output_dir": str(run_dir), "eval_max_new_tokens": 5}
    run_dir.mkdir()
    settings = MultitaskSettings.model_validate({**values, **changes})
    data = TrainingData(features.folders, features.folders)  # type: ignore[arg-type]
    result = train_here(settings, run_dir, data, Worker())
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["kind"] == "train"]
    curves = {name: [record[name] for record in records] for name in ("loss", "grad_norm")}
    return curves | {"validation": [value for name, value in sorted(result.items()) if "/" in name]}


@pytest.fixture(scope="module")
def from_mel(rows: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("mel")
    return train(make(rows, folder / "f"), folder / "run")


def test_float32_encoder_outputs_train_to_the_last_bit(rows, from_mel, tmp_path):
    features = make(rows, tmp_path / "f", store="encoder", dtype="float32")
    long = features.row(15)
    assert long.audio.shape == (3, 200, 128) and long.audio.dtype == np.float32
    assert train(features, tmp_path / "run", store="encoder") == from_mel


@pytest.mark.parametrize(
    ("dtype", "stored", "each", "on_average"), [("bfloat16", "uint16", 1e-3, 3e-4), ("float16",) * 2 + (1e-4, 4e-5)]
)
def test_smaller_encoder_outputs_train_nearly_alike(rows, from_mel, tmp_path, dtype, stored, each, on_average):
    """Steps of five rows of voices unknown to the base model; means over more rows come out closer (2e-5 to 4e-5)."""
    features = make(rows, tmp_path / "f", store="encoder", dtype=dtype)
    assert features.row(15).audio.dtype == stored
    result = train(features, tmp_path / "run", store="encoder", cache_dtype=dtype)
    difference = np.abs(np.subtract(result["loss"], from_mel["loss"]))
    assert 0 < difference.mean() < on_average and (difference < each).all(), difference


@pytest.mark.slow
def test_a_bfloat16_run_trains_the_same_from_its_own_outputs(rows, tmp_path, monkeypatch):
    """--bf16 computes the encoder in bfloat16, so bfloat16 outputs are what it would have computed, but for the size of
    its batches, which bfloat16 products show (by how much depends on the processor)."""
    mel_rows, alone = make(rows, tmp_path / "mel"), {"bf16": True, "per_device_bsz": 1}
    mel, mel_alone = train(mel_rows, tmp_path / "a", bf16=True), train(mel_rows, tmp_path / "b", **alone)
    stored = make(rows, tmp_path / "f", store="encoder", bf16=True)
    result = train(stored, tmp_path / "c", bf16=True, store="encoder")
    assert (np.abs(np.subtract(mel["loss"], result["loss"])) < 0.02).all()
    monkeypatch.setattr(extract, "ENCODER_WINDOWS", 1)
    stored = make(rows, tmp_path / "g", store="encoder", bf16=True)
    result = train(stored, tmp_path / "d", store="encoder", **alone)
    assert result["loss"] == mel_alone["loss"], "in batches of one window, to the last bit"


def test_stored_samples_are_the_clips_and_train_alike(rows, from_mel, tmp_path):
    features = make(rows, tmp_path / "f", store="pcm16")
    row = features.row(15)
    expected, _ = soundfile.read(read_rows(rows)[15]["audio_path"], dtype="int16")
    assert row.audio.dtype == np.int16 and np.array_equal(row.audio, expected)
    result = train(features, tmp_path / "run", store="pcm16")
    assert np.allclose(result["loss"], from_mel["loss"], rtol=0, atol=1e-3)


def test_stores_do_not_mix(rows, tmp_path):
    folders = [make(rows, tmp_path / store, store=store).folders[0] for store in ("mel", "pcm16")]
    with pytest.raises(RunError, match="store different things"):
        Features(folders)


def test_the_encoder_is_not_in_memory_when_its_outputs_are_stored(rows, tmp_path):
    features = make(rows, tmp_path / "f", store="encoder", dtype="float32")
    family = get_family(TINY)
    model = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    before = sum(parameter.numel() for parameter in model.parameters())
    batch = collate_training([features.row(15)], family.front_end(TINY))
    family.skip_encoder(model)
    after = sum(parameter.numel() for parameter in model.parameters())
    encoder = family.load_encoder(TINY, dtype=torch.float32, device=torch.device("cpu"))
    assert before - after == sum(parameter.numel() for parameter in encoder.parameters()) > 0
    assert batch["input_features"].shape == (3, 200, 128)


def test_caches_are_keyed_by_all_that_made_them(rows, tmp_path):
    """Contract 8: front end, store, type, precision and encoder weights, each alone, give another key."""
    keys = {
        Extractor(TINY, FeatureSpec(**values)).fingerprint  # type: ignore[arg-type]
        for values in (
            {},
            {"store": "pcm16"},
            {"store": "encoder"},
            {"store": "encoder", "dtype": "float32"},
            {"store": "encoder", "bf16": True},
        )
    }
    assert len(keys) == 5
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(TINY).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert Extractor(str(other), FeatureSpec("encoder")).fingerprint in keys, "a copy of the model has the same key"
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["language_model.model.norm.weight"] = weights["language_model.model.norm.weight"] + 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert Extractor(str(other), FeatureSpec("encoder")).fingerprint in keys, "the language model has no part in it"
    weights["audio_tower.conv1.bias"] = weights["audio_tower.conv1.bias"] + 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert Extractor(str(other), FeatureSpec("encoder")).fingerprint not in keys
    assert Extractor(str(other)).fingerprint in keys, "log-mel does not depend on the encoder"


def test_the_estimate_bounds_what_is_written(rows, tmp_path):
    estimates: list[int] = []
    extractor = Extractor(TINY, FeatureSpec("encoder"))
    options: dict[str, Any] = {"rows_per_shard": 6, "use_ray": False, "on_estimate": estimates.append}
    report = featurize([rows], extractor, tmp_path, **options)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.arrow") if path.parent.name == "shards")
    assert estimates[0] / 1.5 < written <= estimates[0]
    with pytest.raises(RunError, match=r"--cache_budget_gib .*: encoder outputs need up to .* nothing was written"):
        featurize([rows], extractor, tmp_path / "small", max_bytes=estimates[0] - 1, **options)
    assert not list((tmp_path / "small").rglob("*.arrow"))
    again = featurize([rows], extractor, tmp_path, max_bytes=estimates[0], **options)
    assert again.num_made == 0 and again.folders == report.folders


def test_the_budget_holds_although_headers_lie(rows, tmp_path, monkeypatch):
    """A clip that is longer than its header said may not take more than its share."""
    from voxray.features import disk_estimate as estimate

    monkeypatch.setattr(estimate, "header_seconds", lambda path: 0.1)
    extractor = Extractor(TINY, FeatureSpec("encoder"))
    estimates: list[int] = []
    options: dict[str, Any] = {"rows_per_shard": 6, "use_ray": False, "on_estimate": estimates.append}
    featurize([rows], extractor, tmp_path / "ample", **options)
    with pytest.raises(RunError, match="seemed to need"):
        featurize([rows], extractor, tmp_path / "tight", max_bytes=estimates[0], **options)
    written = sum(path.stat().st_size for path in (tmp_path / "tight").rglob("*.arrow"))
    assert written <= estimates[0]


def test_a_full_disk_is_seen_before_anything_is_written(rows, tmp_path, monkeypatch):
    from voxray.features import disk_estimate as estimate

    monkeypatch.setattr(estimate, "_free_bytes", lambda folder: 1000.0)
    with pytest.raises(RunError, match=r"the disk has .* GiB left; nothing was written"):
        featurize([rows], Extractor(TINY, FeatureSpec("encoder")), tmp_path, rows_per_shard=6, use_ray=False)


def test_settings_that_contradict_the_encoder_cache_are_refused():
    values = {"train_jsonl": ("t",), "output_dir": "o", "store": "encoder"}
    for name, value in (("freeze_whisper", False), ("freq_masks", 2), ("time_masks", 1)):
        with pytest.raises(ValueError, match=r"--store encoder: "):
            MultitaskSettings.model_validate({**values, name: value})


def test_an_adapter_that_changes_the_encoder_is_not_evaluated_on_its_cache(rows, tmp_path):
    from voxray.commands.evaluate import run_evaluation
    from voxray.config.evaluate import EvaluateSettings
    from voxray.models.adapters.lora import add_lora, save_adapter

    family = get_family(TINY)
    base = family.load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    save_adapter(add_lora(base, family, ("encoder",), model_id=TINY, r=2, alpha=4, dropout=0.0), tmp_path / "a")
    values = {"model_id": TINY, "val_jsonl": rows, "lora_dir": str(tmp_path / "a"), "output_dir": str(tmp_path / "e")}
    with pytest.raises(SettingsError, match=r"--store encoder: the adapter in .* changes the encoder"):
        run_evaluation(EvaluateSettings.model_validate({**values, "store": "encoder"}))


def test_a_random_row_is_read_in_well_under_a_millisecond(tmp_path):
    """The goal is 150 us (benchmarks/shards.py measures it); here only that nothing slow crept in."""
    import time

    features = make_speech(tmp_path)
    order = np.random.default_rng(0).integers(0, len(features), 300)
    began = time.perf_counter()
    for number in order:
        features.row(int(number)).audio.astype(np.float32)
    assert (time.perf_counter() - began) / len(order) < 2e-3


def make_speech(folder: Path) -> Features:
    path = write_rows(folder / "m.jsonl", read_rows(manifest("asr.train"))[:40])
    return Features(featurize([path], Extractor(TINY), folder / "f", rows_per_shard=16, use_ray=False).folders)


def test_chunk_bytes_counts_variants(rows):
    from voxray.audio.augment import WaveformAugmentation
    from voxray.core.manifest import chunks
    from voxray.features.chunk import WorkItem

    [chunk] = chunks(rows, 100)
    plain = Extractor(TINY, FeatureSpec("encoder"))
    three = Extractor(TINY, replace(plain.spec, waveform=WaveformAugmentation(num_variants=3, speeds=(0.9, 1.1))))
    one, many = (chunk_bytes(WorkItem(chunk, Path("f")), extractor) for extractor in (plain, three))
    assert 2.5 * one < many < 4 * one
    assert chunk_bytes(WorkItem(chunk, Path("f"), augmented=False), three) == one


def test_rows_that_an_earlier_version_refused_are_read_again(tmp_path: Path):
    row = {"instruction": "i", "output": "o", "language": "yue"}
    path, options = write_rows(tmp_path / "m.jsonl", [row, row]), {"rows_per_shard": 8, "use_ray": False}
    assert featurize([path], Extractor(TINY), tmp_path / "f", **options).num_rows == 2
    [report] = (tmp_path / "f").glob("*/shards/*.json")
    refused = {"manifest": path, "line": 2, "id": "", "reason": "bad_language"}
    no_task = "keys a match no task (asr: audio_path, transcript; sqa: audio_path, question, answer; tqa: instruction, "
    no_task += "output; aac: audio_path, caption"
    for message, num_made in (
        ("language 'yue' is not a two-letter code", 2),
        ("language 'xx' is not known", 0),
        (f"{no_task})", 2),
        (f"{no_task}; ast: audio_path, translation, target_language)", 0),
    ):
        stored = json.loads(report.read_text())
        report.write_text(json.dumps({**stored, "bad": [{**refused, "message": message}]}))
        assert featurize([path], Extractor(TINY), tmp_path / "f", **options).num_made == num_made
