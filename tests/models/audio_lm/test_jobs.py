"""Training, resuming, evaluating, answering and exporting with the tiny base of every model type."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import SPEECH, read_rows, write_rows
from helpers.audio_lm_rows import noise
from helpers.audio_lm_tiny import BASES
from helpers.running import parse_only
from safetensors.torch import load_file

from voxray.commands import infer
from voxray.commands.evaluate import run_evaluation
from voxray.commands.export import run_export
from voxray.commands.preflight import run_preflight
from voxray.commands.train import run_training
from voxray.config.evaluate import InferSettings
from voxray.core.errors import SettingsError
from voxray.models.registry import get_family
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., Path]
QUICK = ("qwen3_asr", "glmasr")  # one without windows of its processor, one with; `make slow` runs the others too


@pytest.fixture(scope="module", params=[pytest.param(t, marks=[pytest.mark.slow] * (t not in QUICK)) for t in BASES])
def base(request: Any, tiny_base: Callable[[str], str]) -> str:
    return tiny_base(request.param)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, small: dict[str, str]) -> str:
    """Speech of two languages, one row without language, a clip of three windows and a short one, questions, texts."""
    folder = tmp_path_factory.mktemp("rows")
    rows = read_rows(small["asr.train"])[:5]
    rows[0].pop("language", None)
    soundfile.write(folder / "long.wav", np.concatenate([noise(64_000), noise(90_001)]), 16_000, subtype="PCM_16")
    rows.append({"audio_path": str(folder / "long.wav"), "transcript": "a long clip", "language": "en"})
    soundfile.write(folder / "short.wav", noise(1_600), 16_000, subtype="PCM_16")
    rows.append({"audio_path": str(folder / "short.wav"), "transcript": "short"})
    rows += [*read_rows(small["sqa.train"])[:3], *read_rows(small["tqa.train"])[:3]]
    return write_rows(folder / "train.jsonl", rows)


@pytest.fixture(scope="module")
def run(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run a training job in this process; returns the run folder. Values replace the usual ones, None removes one."""
    folder = tmp_path_factory.mktemp("runs")

    def run(job: str, base: str, name: str, *flags: str, **values: str | None) -> Path:
        out = folder / f"{Path(base).name}-{name}"
        usual = {"model_id": base, "num_workers": "0", "features_dir": str(folder / "features"), "max_steps": "4"}
        usual |= {"train_jsonl": manifest, "lr": "1e-2", "lora_r": "4", "lora_alpha": "8", "output_dir": str(out)}
        usual |= {"batching": "packed", "pack_tokens": "600", "save_steps": "2", "grad_accum": "1"}
        argv = [word for key, value in (usual | values).items() if value for word in (f"--{key}", value)]
        run_training(parse_only(job, [*argv, *flags]))
        return out

    return run


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder, "train")]


def test_multitask_resumes_to_the_last_bit(base: str, run: Run) -> None:
    whole = run("train_multitask", base, "mel")
    assert len(losses(whole)) == 4 and losses(whole)[-1] < losses(whole)[0]
    again = whole.with_name(f"{whole.name}-again")
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step-000004")
    shutil.rmtree(again / "adapter")
    (again / "result.json").unlink()
    assert run("train_multitask", base, "mel-again") == again
    assert "resuming from step 2" in (again / "train.log").read_text(encoding="utf-8")
    first, second = adapter(whole), adapter(again)
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


def test_every_store_trains_the_same(base: str, run: Run) -> None:
    """Stored encoder outputs, and features that are computed while batches load."""
    direct = losses(run("train_multitask", base, "mel"))
    stored = run("train_multitask", base, "encoder", "--store", "encoder", "--cache_dtype", "float32")
    assert losses(stored) == pytest.approx(direct, abs=1e-5)
    computed = run("train_multitask", base, "pcm16", "--store", "pcm16")
    assert losses(computed) == pytest.approx(direct, abs=2e-3), "mel shards hold float16"


def test_recomputed_activations_train_the_same(base: str, run: Run) -> None:
    """Encoder included."""
    both = partial(run, "train_multitask", base, lora_dropout="0", max_steps="2")
    direct = both("whole", "--no_freeze_whisper")
    recomputed = both("recomputed", "--no_freeze_whisper", "--grad_ckpt")
    assert losses(recomputed) == pytest.approx(losses(direct), abs=1e-6)
    first, second = adapter(direct), adapter(recomputed)
    assert any("audio_tower" in name for name in first)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4)


def test_full_tuning_unties_and_is_exported(base: str, run: Run, tmp_path: Path) -> None:
    """Qwen3-ASR and GLM-ASR share the weights of token embeddings and output layer."""
    values = {"tuning": "full", "lr": "1e-3", "max_steps": "2", "lora_r": None, "lora_alpha": None}
    trained = run("train_multitask", base, "full", **values)
    flags = f"--model_id {base} --lora_dir {trained / 'adapter'} --output_dir {tmp_path / 'merged'}"
    report = run_export(parse_only("export", flags.split()))
    assert report["difference_merged"] < 1e-4 and report["difference_on_disk"] < 1e-4


def test_rows_of_other_tasks_are_listed(base: str, run: Run) -> None:
    """A base that only transcribes leaves the questions out, one ledger line each."""
    folder = run("train_multitask", base, "mel")
    ledger = folder / "quarantine.jsonl"
    reasons = [json.loads(line)["reason"] for line in ledger.read_text().splitlines()] if ledger.exists() else []
    too_long = get_family(base).front_end(base).max_audio_sec < 5
    transcribes = get_family(base).tasks == ("asr",)
    assert reasons.count("unsupported_task") == 6 * transcribes
    assert reasons.count("audio_too_long") >= too_long


def test_text_and_asr_adapter_jobs_take_it(base: str, run: Run) -> None:
    projector = adapter(run("train_asr_adapter", base, "projector"))
    assert projector and all("multi_modal_projector" in name for name in projector)
    if "tqa" in get_family(base).tasks:
        text = adapter(run("train_text", base, "text"))
        assert text and all("language_model" in name for name in text)


def test_the_whisper_job_refuses_it(base: str, run: Run) -> None:
    message = f"a {Path(base).name} model, and this job trains whisper, .*; train_multitask trains it"
    with pytest.raises(SettingsError, match=message):
        run("train_whisper", base, "refused", "--language", "ko")


def test_export_answers_as_base_and_adapter(
    base: str, run: Run, small: dict[str, str], tmp_path: Path, monkeypatch: Any, evaluation_here: None
) -> None:
    trained = run("train_multitask", base, "mel")
    monkeypatch.chdir(tmp_path)
    lora = f"--lora_dir {trained / 'adapter'}"
    report = run_export(parse_only("export", f"--model_id {base} {lora} --output_dir merged".split()))
    assert report["difference_merged"] < 1e-4 and report["difference_on_disk"] < 1e-4
    usual = f"--val_jsonl {small['asr.val']} --gen_max_new_tokens 6"
    with_adapter = run_evaluation(parse_only("evaluate", f"--model_id {base} {lora} --output_dir a {usual}".split()))
    merged = run_evaluation(parse_only("evaluate", f"--model_id merged --output_dir b {usual}".split()))
    assert with_adapter.metrics == merged.metrics
    assert with_adapter.metrics["asr"]["exact_match"]["n"] == 4


def test_preflight_predicts_the_memory(base: str, manifest: str, tmp_path: Path) -> None:
    """Also of a run that trains the encoder, whose layers may work on more positions than it puts out."""
    line = f"--recipe multitask --model_id {base} --train_jsonl {manifest} --output_dir {tmp_path / 'run'}"
    line += " --num_workers 0 --no_freeze_whisper --no_tune"
    run_preflight(parse_only("preflight", line.split()))
    report = json.loads((tmp_path / "run" / "preflight" / "preflight.json").read_text(encoding="utf-8"))
    assert report["ready"] and all(report["parameters"][role]["trainable"] for role in get_family(base).roles)
    assert report["memory"]["predicted_bytes"] == pytest.approx(report["memory"]["measured_bytes"], rel=0.25)


def test_infer_answers_a_clip_and_a_question(base: str, run: Run) -> None:
    trained = run("train_multitask", base, "mel")
    for question in ("", "How many?") if "sqa" in get_family(base).tasks else ("",):
        values = {"model_id": base, "lora_dir": str(trained), "audio_path": str(SPEECH / "sample.wav")}
        settings = InferSettings(**values, question=question, max_new_tokens=5)
        [entry] = infer.run_inference(settings, "")
        assert isinstance(entry["prediction"], str)


def test_infer_answers_a_long_recording(base: str, tmp_path: Path) -> None:
    """In windows, or in chunks if the model takes one window."""
    soundfile.write(tmp_path / "long.wav", noise(200_000), 16_000, subtype="PCM_16")
    settings = InferSettings(model_id=base, audio_path=str(tmp_path / "long.wav"), max_new_tokens=5)
    [entry] = infer.run_inference(settings, "")
    assert isinstance(entry["prediction"], str)
