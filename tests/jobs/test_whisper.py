"""All jobs with Whisper: training, resuming, evaluating, exporting and sweeps."""

import json
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import SPEECH, TINY, WHISPER, manifest, read_rows, write_rows
from helpers import processes
from helpers.processes import SHARDINGS
from helpers.running import parse_only
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_stages import ledger, losses, tensors
from transformers import WhisperForConditionalGeneration

from voxray.audio.decode import decode
from voxray.commands import evaluate as evaluate_command
from voxray.commands import train as command
from voxray.commands.efficiency import run_efficiency
from voxray.commands.export import run_export
from voxray.commands.infer import run_inference
from voxray.config.demo import DemoSettings
from voxray.config.efficiency import EfficiencySettings
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.config.export import ExportSettings
from voxray.config.train import WhisperSettings
from voxray.config.tune import TuneWhisperSettings
from voxray.core.errors import RunError, SettingsError
from voxray.demo.answers import open_model
from voxray.features.extract import Extractor, FeatureSpec
from voxray.recipes.training_data import TrainingData
from voxray.sweep.results import write_best
from voxray.sweep.work import trial_settings

pytestmark = pytest.mark.usefixtures("one_thread")
CLIP = str(SPEECH / "sample.wav")


@pytest.fixture(scope="module")
def run(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run jobs/train_whisper.py in this process, two steps on a few rows; returns the run folder."""
    folder = tmp_path_factory.mktemp("whisper")

    def run(*flags: str, into: str = "", **more: str) -> Path:
        out = folder / (into or f"run{len(list(folder.iterdir()))}")
        values = {"model_id": WHISPER, "num_workers": "0", "features_dir": str(folder / "features"), "max_steps": "2"}
        values |= {"train_jsonl": small["asr.train"], "max_len": "120", "lr": "1e-2", "warmup_steps": "0"}
        values |= {"per_device_bsz": "4", "rows_per_shard": "8", "output_dir": str(out), **more}
        argv = [word for key, value in values.items() for word in (f"--{key}", value)]
        command.run_training(parse_only("train_whisper", [*argv, *flags]))
        return out

    return run


@pytest.fixture(scope="module")
def tuned(run: Callable[..., Path]) -> Path:
    return run(into="tuned", max_steps="6")


def transcribe(**flags: Any) -> str:
    values = {"audio_path": CLIP, "language": "ko", "max_new_tokens": 24, **flags}
    [answer] = run_inference(InferSettings.model_validate(values), "")
    return answer["prediction"]


def test_defaults_are_the_published_ones() -> None:
    settings = parse_only("train_whisper", ["--train_jsonl", "t.jsonl", "--output_dir", "o"])
    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lr", "epochs", "warmup_steps", "per_device_bsz")
    assert [getattr(settings, name) for name in names] == [32, 64, 0.05, ("q_proj", "v_proj"), 1e-3, 3, 50, 8]
    assert settings.model_id == "openai/whisper-small" and not settings.freeze_encoder
    assert (settings.max_len, settings.eval_max_new_tokens, settings.pack_tokens) == (448, 225, 16_384)


def test_flags_reach_the_recipe(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their effect is the same code for all recipes, which test_training_flags.py tests."""
    received: list[Any] = []

    def fake_train(run: Any, data: Any) -> dict[str, Any]:
        received.append(run.settings)
        return {"steps": 2, "finished": True}

    monkeypatch.setattr(command, "train", fake_train)
    flags = "--lora_dropout 0.3 --weight_decay 0.1 --eval_steps 7 --seed 3 --debug --grad_ckpt --store pcm16"
    run(*flags.split())
    (settings,) = received
    assert (settings.lora_dropout, settings.weight_decay, settings.eval_steps, settings.seed) == (0.3, 0.1, 7, 3)
    assert settings.debug and settings.grad_ckpt and settings.store == "pcm16"


def test_the_flags_choose_what_trains(run: Callable[..., Path], tuned: Path) -> None:
    weights = tensors(tuned)
    assert {"encoder" if ".encoder." in name else "decoder" for name in weights} == {"encoder", "decoder"}
    assert all(".q_proj." in name or ".v_proj." in name for name in weights)
    decoder = run("--freeze_encoder", "--lora_targets", "fc1,out_proj")
    assert all(".decoder." in name and (".fc1." in name or ".out_proj." in name) for name in tensors(decoder))
    counts = json.loads((decoder / "parameters.json").read_text())
    assert counts["encoder"]["trainable"] == 0 < counts["decoder"]["trainable"]


def test_a_wrong_lora_target_ends_the_job_before_features(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "training_data", lambda *args, **options: pytest.fail("computes features"))
    with pytest.raises(SettingsError, match="--lora_targets o_proj: no layer is called so; layers: fc1, "):
        run("--target_modules", "q_proj,v_proj,o_proj")


def test_training_starts_from_an_adapter_that_peft_wrote(run: Callable[..., Path], tmp_path: Path) -> None:
    base = WhisperForConditionalGeneration.from_pretrained(WHISPER)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    flags = ("--lora_r", "4", "--lora_alpha", "8", "--init_adapter", str(tmp_path / "theirs"))
    before, after = load_file(tmp_path / "theirs" / "adapter_model.safetensors"), tensors(run(*flags, lr="1e-30"))
    assert set(before) == set(after) and all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(SettingsError, match=r"has LoRA on q_proj, v_proj of .*; give --lora_targets q_proj,v_proj"):
        run(*flags, "--lora_targets", "fc1")


def test_grad_ckpt_keeps_the_losses_and_packs_count_encoder_positions(run: Callable[..., Path]) -> None:
    plain = losses(run("--lora_dropout", "0"))
    assert losses(run("--lora_dropout", "0", "--grad_ckpt")) == pytest.approx(plain, abs=1e-5)
    packed = run("--lora_dropout", "0", "--batching", "packed", "--pack_tokens", "850")
    assert np.isfinite(losses(packed)).all() and losses(packed) != plain, "packs have other rows"
    with pytest.raises(SettingsError, match=r"--pack_tokens 200: a row of 2[01][0-9] tokens does not fit"):
        run("--batching", "packed", "--pack_tokens", "200")


def test_stored_encoder_outputs_need_a_frozen_encoder(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], tuned: Path, small: dict[str, str], tmp_path: Path
) -> None:
    flags = ("--freeze_encoder", "--lora_dropout", "0")
    stored = run(*flags, "--store", "encoder", "--cache_dtype", "float32")
    assert losses(stored) == pytest.approx(losses(run(*flags)), abs=1e-6)
    with pytest.raises(SystemExit):
        run("--store", "encoder")
    assert "LoRA in the encoder changes its outputs; add --freeze_encoder" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="--quantize 8bit holds the encoder of whisper in fewer bits"):
        run("--store", "encoder", "--freeze_encoder", "--quantize", "8bit")
    values = {"val_jsonl": small["asr.val"], "output_dir": str(tmp_path), "store": "encoder", "lora_dir": str(tuned)}
    with pytest.raises(SettingsError, match=r"--store encoder: the adapter in .* changes the encoder"):
        evaluate_command.run_evaluation(EvaluateSettings.model_validate(values))


def test_settings_of_older_scripts_train(
    small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A YAML file with the names and values of the older scripts."""
    rows = [{**row, "language": None} for row in read_rows(small["asr.train"])]
    data = write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "old.yaml").write_text(
        f"model_name_or_path: {WHISPER}\nlanguage: Korean\nlanguage_abbr: ko\ntask: transcribe\nlora_r: 32\n"
        "lora_alpha: 64\nlora_dropout: 0.05\ntarget_modules: [q_proj, v_proj]\nper_device_train_batch_size: 4\n"
        "learning_rate: 1e-3\nnum_train_epochs: 1\nwarmup_steps: 50\ngradient_accumulation_steps: 1\n"
        f"train_jsonl: {data}\noutput_dir: {tmp_path / 'run'}\nnum_workers: 0\nmax_len: 120\n"
    )
    settings = parse_only("train_whisper", ["--config", str(tmp_path / "old.yaml")])
    assert (settings.language, settings.lr, settings.per_device_bsz, settings.epochs) == ("ko", 1e-3, 4, 1)
    assert "--task has no effect" in capsys.readouterr().err
    command.run_training(settings)
    assert len(losses(tmp_path / "run")) == 3 and not ledger(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["language"] == "ko"
    with pytest.raises(SystemExit):
        parse_only("train_whisper", ["--config", str(tmp_path / "old.yaml"), "--language_abbr", "xxx"])
    (tmp_path / "two.yaml").write_text("language: Korean\nlanguage_abbr: en\ntrain_jsonl: a\noutput_dir: o\n")
    with pytest.raises(SystemExit):
        parse_only("train_whisper", ["--config", str(tmp_path / "two.yaml")])
    assert "language_abbr: given twice, as 'Korean' and 'en'" in capsys.readouterr().err


def test_a_base_of_another_family_is_refused(run: Callable[..., Path], small: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"a voxtral model, and this job trains whisper, .*; train_multitask trains it"
    ):
        run(model_id=TINY)
    flags = ["--model_id", WHISPER, "--train_jsonl", small["asr.train"], "--output_dir", str(tmp_path / "r")]
    with pytest.raises(
        SettingsError, match=r"a whisper model, and this job trains voxtral, .*; train_whisper trains it"
    ):
        command.run_training(parse_only("train_multitask", flags))


def test_why_no_row_is_left_and_what_validation_shares(
    run: Callable[..., Path], small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "language": ""} for row in read_rows(small["asr.train"])]
    path = write_rows(tmp_path / "m.jsonl", rows)
    with pytest.raises(RunError, match=rf"no row is left \(no_language {len(rows)}\): the row names no language"):
        run(train_jsonl=path, val_jsonl=path)
    assert f"warning: --val_jsonl {path}: also in --train_jsonl" in capsys.readouterr().out


def test_rows_of_other_tasks_are_refused(run: Callable[..., Path], small: dict[str, str]) -> None:
    with pytest.raises(RunError, match="no usable row in this manifest; the first fault: Whisper only transcribes"):
        run(train_jsonl=small["tqa.train"])


@pytest.fixture(scope="module")
def data(small: dict[str, str], make_features: Callable[..., Any]) -> TrainingData:
    return TrainingData(
        make_features(small["asr.train"], model_id=WHISPER), make_features(small["asr.val"], model_id=WHISPER)
    )


def trained(folder: Path, data: TrainingData, num_workers: int = 1, **changes: Any) -> list[float]:
    values = {"model_id": WHISPER, "train_jsonl": "t", "output_dir": str(folder), "max_len": 120, "eval_steps": 100}
    values |= {"per_device_bsz": 4, "max_steps": 6, "save_steps": 3, "lora_dropout": 0.1, "eval_max_new_tokens": 4}
    settings = WhisperSettings.model_validate({**values, **changes})
    return [record["loss"] for record in processes.run(settings, data, num_workers)]


def test_resume_is_exact_and_workers_divide_the_same_step(data: TrainingData, tmp_path: Path) -> None:
    straight = trained(tmp_path / "a", data)
    assert trained(tmp_path / "b", data) == straight
    for path in (tmp_path / "b" / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 3:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "b" / "adapter")
    assert trained(tmp_path / "b", data) == straight
    assert all(tensor.equal(tensors(tmp_path / "b")[name]) for name, tensor in tensors(tmp_path / "a").items())
    plain = trained(tmp_path / "c", data, lora_dropout=0.0)
    assert trained(tmp_path / "d", data, 2, lora_dropout=0.0, per_device_bsz=2) == pytest.approx(plain, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS, ids=str)
def test_sharding_gives_the_same_losses(data: TrainingData, tmp_path: Path, sharding: dict[str, Any]) -> None:
    plain = trained(tmp_path / "a", data, 2, lora_dropout=0.0, per_device_bsz=2)
    sharded = {**sharding, "lora_dropout": 0.0, "per_device_bsz": 2}
    assert trained(tmp_path / "b", data, 2, **sharded) == pytest.approx(plain, abs=1e-4)


def test_an_exported_model_transcribes_alike_in_the_transformers_pipeline(tuned: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    report = run_export(ExportSettings(lora_dir=str(tuned), output_dir=str(tmp_path / "e"), dtype="float32"))
    assert report["layers_merged"] == 12 and report["difference_on_disk"] < 1e-4
    reference = pipeline("automatic-speech-recognition", str(tmp_path / "e"))
    options = {"language": "ko", "task": "transcribe", "max_new_tokens": 24}
    rows = read_rows(manifest("asr.val"))[:4]
    for row in rows:
        samples = decode(row["audio_path"], 16_000)
        text = reference({"raw": samples, "sampling_rate": 16_000}, generate_kwargs=options)["text"].strip()
        flags = {"audio_path": row["audio_path"]}
        assert text == transcribe(lora_dir=str(tuned), **flags) == transcribe(model_id=str(tmp_path / "e"), **flags)
    assert transcribe(lora_dir=str(tuned)) != transcribe(model_id=WHISPER), "the adapter has an effect"
    with pytest.raises(SettingsError, match="--merge projector: a whisper model has no projector"):
        run_export(ExportSettings(lora_dir=str(tuned), output_dir=str(tmp_path / "f"), merge="projector"))


def test_evaluation_of_whisper(tuned: Path, small: dict[str, str], tmp_path: Path, evaluation_here: None) -> None:
    """Short rows, a recording of several windows, and a row of a task that Whisper does not support."""
    clips = [decode(row["audio_path"], 16_000) for row in read_rows(manifest("base.val"))[:5]]
    soundfile.write(tmp_path / "long.wav", np.concatenate(clips), 16_000)
    rows = read_rows(small["asr.val"])
    rows.append({"audio_path": str(tmp_path / "long.wav"), "transcript": "a b c", "language": "en"})
    rows.append(read_rows(small["sqa.val"])[0])
    values = {"val_jsonl": write_rows(tmp_path / "m.jsonl", rows), "lora_dir": str(tuned)}
    values |= {"gen_max_new_tokens": 24, "perplexity": "all"}
    settings = EvaluateSettings.model_validate({**values, "output_dir": str(tmp_path / "e")})
    metrics = evaluate_command.run_evaluation(settings).metrics["asr"]
    assert metrics["cer_nospace"]["n"] == 5 and metrics["perplexity"]["value"] > 1
    [long] = [row for row in evaluate_command.read_predictions(tmp_path / "e") if row["reference"] == "a b c"]
    assert long["prediction"] and long["num_samples"] == sum(map(len, clips)) and not long["chunk_of"]
    assert [line["reason"] for line in ledger(tmp_path / "e")] == ["unsupported_task"]
    alone = transcribe(lora_dir=str(tuned), audio_path=str(tmp_path / "long.wav"), language="en")
    assert long["prediction"] == alone


def test_a_detected_language_chooses_the_normaliser(
    small: dict[str, str], tmp_path: Path, evaluation_here: None
) -> None:
    rows = [{**row, "language": ""} for row in read_rows(manifest("base.val")) if row["language"] == "en"][:2]
    values = {"val_jsonl": write_rows(tmp_path / "m.jsonl", rows), "model_id": WHISPER, "gen_max_new_tokens": 24}
    settings = EvaluateSettings.model_validate({**values, "output_dir": str(tmp_path / "e")})
    evaluate_command.run_evaluation(settings)
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    stored = evaluate_command.read_predictions(tmp_path / "e")
    assert [row["language"] for row in stored] == ["en", "en"] and next(iter(metrics["asr"])) == "cer_nospace"
    assert {row["normalizer"] for row in stored} == set(metrics["normalizer"]) == {"whisper-en-v1-nospelling"}
    [answer] = run_inference(
        InferSettings.model_validate({"model_id": WHISPER, "jsonl": values["val_jsonl"], "preview_rows": 1}), ""
    )
    assert answer["language"] == "en"


@pytest.fixture
def english_only(tmp_path: Path) -> str:
    folder = Path(shutil.copytree(WHISPER, tmp_path / "tiny.en"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "is_multilingual": False}))
    return str(folder)


def test_an_english_only_base_refuses_other_languages_in_every_job(
    english_only: str, small: dict[str, str], tmp_path: Path, evaluation_here: None
) -> None:
    """--language is an error of the settings, and a row of another language is left out."""
    shared = {"model_id": english_only, "language": "fr", "output_dir": str(tmp_path / "o")}
    data = {"storage_path": str(tmp_path), "features_dir": "f", "output_dir": "o"}
    train = {**shared, "train_jsonl": small["asr.train"], "num_workers": 0}
    clip = {"model_id": english_only, "language": "fr", "audio_path": CLIP}
    jobs: list[Callable[[], object]] = [
        lambda: Extractor(english_only, FeatureSpec(language="fr")),  # featurize and preflight
        lambda: command.run_training(WhisperSettings.model_validate(train)),
        lambda: evaluate_command.run_evaluation(
            EvaluateSettings.model_validate({**shared, **data, "val_jsonl": small["asr.val"]})
        ),
        lambda: run_inference(InferSettings.model_validate(clip), ""),
        lambda: open_model(DemoSettings.model_validate({"model_id": english_only, "language": "fr"})),
        lambda: run_efficiency(EfficiencySettings.model_validate({**shared, "audio_path": CLIP})),
    ]
    for job in jobs:
        with pytest.raises(SettingsError, match=r"--language: language 'fr' is none of the 1 that .*tiny\.en has: en"):
            job()
    settings = EvaluateSettings.model_validate({"model_id": english_only, **data, "val_jsonl": small["asr.val"]})
    with pytest.raises(RunError, match=r"language 'ko' is none of the 1 that .*tiny\.en has: en"):
        evaluate_command.run_evaluation(settings)


def test_a_sweep_over_ranks(tmp_path: Path, small: dict[str, str]) -> None:
    flags = ["--recipe", "whisper", "--train_jsonl", small["asr.train"], "--val_jsonl", small["asr.val"]]
    settings = parse_only("tune", [*flags, "--output_dir", str(tmp_path), "--lora_r", "4,8", "--freeze_encoder"])
    assert type(settings) is TuneWhisperSettings and list(settings.domains) == ["lora_r"]
    trial = trial_settings(settings, {"lora_r": 4}, tmp_path / "t")
    assert type(trial) is WhisperSettings and (trial.lora_r, trial.freeze_encoder) == (4, True)
    (tmp_path / "s.yaml").write_text("recipe: whisper\nlora_r: [4, 8]\ntrain_jsonl: t\noutput_dir: o\n")
    assert type(parse_only("tune", ["--config", str(tmp_path / "s.yaml")])) is TuneWhisperSettings
    write_best(tmp_path / "best.yaml", settings, {"lora_r": 4}, "asr/cer_nospace (0.5)")
    best = parse_only("train_whisper", ["--config", str(tmp_path / "best.yaml")])
    assert best.lora_r == 4 and best.freeze_encoder and "train_whisper --config" in (tmp_path / "best.yaml").read_text()
    with pytest.raises(SystemExit):
        parse_only("tune", [*flags, "--output_dir", "o", "--task_weights", "1,1,1"])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach another machine fails the test."""

    def connect(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: connect(None, args))  # type: ignore[arg-type]


def test_jobs_work_without_a_network(
    run: Callable[..., Path], no_network: None, small: dict[str, str], tmp_path: Path
) -> None:
    out = run(val_jsonl=small["asr.val"], eval_max_new_tokens="4")
    assert transcribe(lora_dir=str(out)) is not None
    run_export(ExportSettings(lora_dir=str(out), output_dir=str(tmp_path / "e")))


def errors_before_and_after(argv: Sequence[str]) -> tuple[float, float]:
    """CER without spaces on held-out clips, before and after training."""
    settings = parse_only("train_whisper", argv)
    command.run_training(settings)
    values = {"val_jsonl": manifest("asr.val"), "gen_max_new_tokens": 60, "perplexity": "none"}
    run_dir, rates = Path(settings.output_dir), []
    for adapter in ("", str(run_dir)):
        flags = {**values, "model_id": WHISPER, "lora_dir": adapter, "output_dir": str(run_dir / f"e{bool(adapter)}")}
        metrics = evaluate_command.run_evaluation(EvaluateSettings.model_validate(flags)).metrics["asr"]
        rates.append(metrics["cer_nospace"]["value"])
    return rates[0], rates[1]


@pytest.mark.slow
def test_the_demo_recipe_halves_the_errors(tmp_path: Path, evaluation_here: None) -> None:
    config = Path(__file__).parents[2] / "jobs" / "configs" / "demo_train_whisper.yaml"
    before, after = errors_before_and_after(
        ["--config", str(config), "--output_dir", str(tmp_path / "run"), "--num_workers", "0"]
    )
    assert after < before / 2
