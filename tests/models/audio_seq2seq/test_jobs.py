"""Training, resuming, evaluating, answering and exporting with the tiny base of every model type."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from conftest import SPEECH, read_rows, write_rows
from helpers.audio_lm_rows import noise
from helpers.audio_seq2seq_tiny import BASES
from helpers.running import parse_only
from safetensors.torch import load_file

from voxray.commands import infer
from voxray.commands.evaluate import run_evaluation
from voxray.commands.export import run_export
from voxray.commands.preflight import run_preflight
from voxray.commands.train import run_training
from voxray.config.evaluate import InferSettings
from voxray.core.errors import RunError, SettingsError
from voxray.models.registry import get_family
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., Path]
QUICK = "cohere_asr"  # `make slow` runs the others too


@pytest.fixture(scope="module", params=[pytest.param(t, marks=[pytest.mark.slow] * (t != QUICK)) for t in BASES])
def base(request: Any, written: dict[str, str]) -> str:
    return written[request.param]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Speech-like clips in two languages that all bases have, and one of 39 s, which only Canary takes."""
    folder = tmp_path_factory.mktemp("rows")
    rows = []
    for number, length in enumerate((9_000, 24_321, 16_000, 70_001, 48_000, 620_000)):
        soundfile.write(folder / f"{number}.wav", noise(length), 16_000, subtype="PCM_16")
        language = ("de", "en")[number % 2]
        rows.append({"audio_path": str(folder / f"{number}.wav"), "transcript": f"eins {number}", "language": language})
    return write_rows(folder / "train.jsonl", rows)


@pytest.fixture(scope="module")
def run(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run train_whisper in this process; returns the run folder. Values replace the usual ones, None removes one."""
    folder = tmp_path_factory.mktemp("runs")

    def run(base: str, name: str, *flags: str, **values: str | None) -> Path:
        out = folder / f"{Path(base).name}-{name}"
        usual = {"model_id": base, "num_workers": "0", "features_dir": str(folder / "features"), "max_steps": "4"}
        usual |= {"train_jsonl": manifest, "lr": "1e-2", "lora_r": "4", "lora_alpha": "8", "output_dir": str(out)}
        usual |= {"save_steps": "2", "grad_accum": "1"}
        argv = [word for key, value in (usual | values).items() if value for word in (f"--{key}", value)]
        run_training(parse_only("train_whisper", [*argv, *flags]))
        return out

    return run


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder, "train")]


def test_resumes_to_the_last_bit(base: str, run: Run) -> None:
    whole = run(base, "mel")
    assert len(losses(whole)) == 4 and losses(whole)[-1] < losses(whole)[0]
    again = whole.with_name(f"{whole.name}-again")
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-000004")
    shutil.rmtree(again / "adapter")
    (again / "result.json").unlink()
    assert run(base, "mel-again") == again
    assert "resuming from step 2" in (again / "train.log").read_text(encoding="utf-8")
    first, second = adapter(whole), adapter(again)
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
    assert any(".encoder." in key for key in first) and any(".decoder." in key for key in first)


def test_packs_and_every_store_train_the_same(base: str, run: Run) -> None:
    both = partial(run, base, lora_dropout="0")
    direct = losses(both("decoder", "--freeze_encoder"))
    stored = both("encoder-store", "--freeze_encoder", "--store", "encoder", "--cache_dtype", "float32")
    assert losses(stored) == pytest.approx(direct, abs=1e-5)
    computed = both("pcm16", "--freeze_encoder", "--store", "pcm16")
    assert losses(computed) == pytest.approx(direct, abs=5e-3), "mel shards hold float16"


def test_recomputed_activations_train_the_same(base: str, run: Run) -> None:
    both = partial(run, base, lora_dropout="0", max_steps="2")
    assert losses(both("recomputed", "--grad_ckpt")) == pytest.approx(losses(both("whole")), abs=1e-6)


def test_full_tuning_is_exported(base: str, run: Run, tmp_path: Path) -> None:
    trained = run(base, "full", tuning="full", lr="1e-3", max_steps="2", lora_r=None, lora_alpha=None)
    flags = f"--model_id {base} --lora_dir {trained / 'adapter'} --output_dir {tmp_path / 'merged'}"
    report = run_export(parse_only("export", flags.split()))
    assert report["difference_merged"] < 1e-4 and report["difference_on_disk"] < 1e-4


def test_too_long_clips_are_listed(base: str, run: Run) -> None:
    ledger = run(base, "mel") / "quarantine.jsonl"
    reasons = [json.loads(line)["reason"] for line in ledger.read_text().splitlines()] if ledger.exists() else []
    assert reasons == ["audio_too_long"] * (Path(base).name != "canary")


def test_other_jobs_refuse_it(base: str, manifest: str, tmp_path: Path) -> None:
    flags = f"--model_id {base} --train_jsonl {manifest} --output_dir {tmp_path}/run --num_workers 0".split()
    with pytest.raises(SettingsError, match=f"a {Path(base).name} model, and .*; train_whisper trains it"):
        run_training(parse_only("train_multitask", flags))


def test_export_answers_as_base_and_adapter(
    base: str, run: Run, manifest: str, tmp_path: Path, monkeypatch: Any, evaluation_here: None
) -> None:
    trained = run(base, "mel")
    monkeypatch.chdir(tmp_path)
    val = write_rows(tmp_path / "val.jsonl", read_rows(manifest)[:4])
    lora = f"--lora_dir {trained / 'adapter'}"
    report = run_export(parse_only("export", f"--model_id {base} {lora} --output_dir merged".split()))
    assert report["difference_merged"] < 1e-4 and report["difference_on_disk"] < 1e-4
    usual = f"--val_jsonl {val} --gen_max_new_tokens 6"
    with_adapter = run_evaluation(parse_only("evaluate", f"--model_id {base} {lora} --output_dir a {usual}".split()))
    merged = run_evaluation(parse_only("evaluate", f"--model_id merged --output_dir b {usual}".split()))
    assert with_adapter.metrics == merged.metrics
    assert with_adapter.metrics["asr"]["exact_match"]["n"] == 4


def test_preflight_predicts_the_memory(base: str, tmp_path: Path) -> None:
    """Of the longest clips; it counts shorter ones as whole windows."""
    family = get_family(base)
    samples = family.front_end(base).window_samples  # type: ignore[attr-defined]
    soundfile.write(tmp_path / "long.wav", noise(samples), 16_000, subtype="PCM_16")
    row = {"audio_path": str(tmp_path / "long.wav"), "language": "de"}
    rows = [{**row, "transcript": f"eins {number}"} for number in range(4)]
    manifest = write_rows(tmp_path / "long.jsonl", rows)
    line = f"--recipe whisper --model_id {base} --train_jsonl {manifest} --output_dir {tmp_path / 'run'}"
    run_preflight(parse_only("preflight", f"{line} --num_workers 0 --no_tune --per_device_bsz 2".split()))
    report = json.loads((tmp_path / "run" / "preflight" / "preflight.json").read_text(encoding="utf-8"))
    assert report["ready"] and all(report["parameters"][role]["trainable"] for role in family.roles)
    assert report["memory"]["predicted_bytes"] == pytest.approx(report["memory"]["measured_bytes"], rel=0.25)


def test_infer_answers_a_clip_and_a_long_recording(base: str, run: Run, tmp_path: Path) -> None:
    """The long one in chunks."""
    soundfile.write(tmp_path / "long.wav", noise(700_000), 16_000, subtype="PCM_16")
    trained, language = run(base, "mel"), "de" if get_family(base).front_end(base).needs_language else ""
    for clip in (SPEECH / "sample.wav", tmp_path / "long.wav"):
        values = {"model_id": base, "lora_dir": str(trained), "audio_path": str(clip), "language": language}
        [entry] = infer.run_inference(InferSettings(**values, max_new_tokens=5), "")
        assert isinstance(entry["prediction"], str)


def test_infer_gives_rows_without_a_language_that_of_the_flag(base: str, manifest: str, tmp_path: Path) -> None:
    """Also a recording that only Canary takes in one piece."""
    chosen = [read_rows(manifest)[number] for number in (0, 5)]
    rows = [{key: value for key, value in row.items() if key != "language"} for row in chosen]
    settings = InferSettings(
        model_id=base, jsonl=write_rows(tmp_path / "r.jsonl", rows), language="de", max_new_tokens=4
    )
    assert [entry["language"] for entry in infer.run_inference(settings, "")] == ["de", "de"]


def test_infer_without_a_language(base: str) -> None:
    """One line where the model needs one."""
    settings = InferSettings(model_id=base, audio_path=str(SPEECH / "sample.wav"), max_new_tokens=5)
    if get_family(base).front_end(base).needs_language:
        with pytest.raises(RunError, match="names no language, which this model needs"):
            infer.run_inference(settings, "")
    else:
        assert infer.run_inference(settings, "")


def test_frequency_masks_need_frequencies(base: str, run: Run) -> None:
    if not get_family(base).reads_samples:
        assert losses(run(base, "masked", "--freq_masks", "1", max_steps="1"))
        return
    with pytest.raises(SettingsError, match="--freq_masks: a moonshine model reads samples, which have no frequencies"):
        run(base, "masked", "--freq_masks", "1")
