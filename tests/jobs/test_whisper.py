"""The jobs on the second model family: training, resuming, evaluating, exporting and sweeping Whisper."""

import json
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import SPEECH, TINY, WHISPER, manifest, read_rows, write_rows
from helpers import processes
from helpers.running import parse_only
from test_stages import ledger, losses, tensors

from voxray.audio.decode import decode
from voxray.commands import evaluate as job
from voxray.commands import train as launch
from voxray.commands.export import run_export
from voxray.commands.infer import run_inference
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.config.export import ExportSettings
from voxray.config.train import WhisperSettings
from voxray.config.tune import TuneWhisperSettings
from voxray.core.errors import RunError, SettingsError
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
        usual = {"model_id": WHISPER, "num_workers": "0", "features_dir": str(folder / "features"), "max_steps": "2"}
        usual |= {"train_jsonl": small["asr.train"], "max_len": "120", "lr": "1e-2", "warmup_steps": "0"}
        usual |= {"per_device_bsz": "4", "rows_per_shard": "8", "output_dir": str(out), **more}
        argv = [word for key, value in usual.items() for word in (f"--{key}", value)]
        launch.run_training(parse_only("train_whisper", [*argv, *flags]))
        return out

    return run


@pytest.fixture(scope="module")
def tuned(run: Callable[..., Path]) -> Path:
    return run(into="tuned", max_steps="6")


def said(**flags: Any) -> str:
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
    """What the flags then do is one code path for all stages, which test_training_flags.py looks at."""
    given: list[Any] = []

    def recipe(run: Any, data: Any) -> dict[str, Any]:
        given.append(run.settings)
        return {"steps": 2, "finished": True}

    monkeypatch.setattr(launch, "train", recipe)
    flags = "--lora_dropout 0.3 --weight_decay 0.1 --eval_steps 7 --seed 3 --debug --grad_ckpt --store pcm16"
    run(*flags.split())
    (settings,) = given
    assert (settings.lora_dropout, settings.weight_decay, settings.eval_steps, settings.seed) == (0.3, 0.1, 7, 3)
    assert settings.debug and settings.grad_ckpt and settings.store == "pcm16"


def test_what_trains(run: Callable[..., Path], tuned: Path) -> None:
    both = tensors(tuned)
    assert {"encoder" if ".encoder." in name else "decoder" for name in both} == {"encoder", "decoder"}
    assert all(".q_proj." in name or ".v_proj." in name for name in both)
    decoder = run("--freeze_encoder", "--lora_targets", "fc1,out_proj")
    assert all(".decoder." in name and (".fc1." in name or ".out_proj." in name) for name in tensors(decoder))
    counts = json.loads((decoder / "parameters.json").read_text())
    assert counts["encoder"]["trainable"] == 0 < counts["decoder"]["trainable"]


def test_grad_ckpt_gives_the_same_losses_and_packs_count_what_the_encoder_holds(run: Callable[..., Path]) -> None:
    plain = losses(run("--lora_dropout", "0"))
    assert losses(run("--lora_dropout", "0", "--grad_ckpt")) == pytest.approx(plain, abs=1e-5)
    packed = run("--lora_dropout", "0", "--batching", "packed", "--pack_tokens", "850")
    assert np.isfinite(losses(packed)).all() and losses(packed) != plain, "packs of other rows"
    with pytest.raises(SettingsError, match=r"--pack_tokens 200: a row of 2[01][0-9] tokens does not fit"):
        run("--batching", "packed", "--pack_tokens", "200")


def test_stored_encoder_outputs_are_for_a_frozen_encoder(
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
        job.run_evaluation(EvaluateSettings.model_validate(values))


def test_old_settings_train(small: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings of the old scripts, by their names, in a YAML file."""
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
    launch.run_training(settings)
    assert len(losses(tmp_path / "run")) == 3 and not ledger(tmp_path / "run")
    log = (tmp_path / "run" / "settings.json").read_text()
    assert '"language": "ko"' in log
    with pytest.raises(SystemExit):
        parse_only("train_whisper", ["--config", str(tmp_path / "old.yaml"), "--language_abbr", "xxx"])
    (tmp_path / "two.yaml").write_text("language: Korean\nlanguage_abbr: en\ntrain_jsonl: a\noutput_dir: o\n")
    with pytest.raises(SystemExit):
        parse_only("train_whisper", ["--config", str(tmp_path / "two.yaml")])
    assert "language_abbr: given twice, as 'Korean' and 'en'" in capsys.readouterr().err


def test_a_base_of_another_family_is_refused(run: Callable[..., Path], small: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"a voxtral model, and this job trains whisper; jobs/train_multitask.py"):
        run(model_id=TINY)
    flags = ["--model_id", WHISPER, "--train_jsonl", small["asr.train"], "--output_dir", str(tmp_path / "r")]
    with pytest.raises(SettingsError, match=r"a whisper model, and this job trains voxtral; jobs/train_whisper.py"):
        launch.run_training(parse_only("train_multitask", flags))


def test_rows_of_other_tasks_are_refused(run: Callable[..., Path], small: dict[str, str]) -> None:
    with pytest.raises(RunError, match="no usable row in this manifest; the first fault: Whisper transcribes"):
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
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_alike(data: TrainingData, tmp_path: Path, stage: int) -> None:
    plain = trained(tmp_path / "a", data, 2, lora_dropout=0.0, per_device_bsz=2)
    divided = {"strategy": "deepspeed", "zero_stage": stage, "lora_dropout": 0.0, "per_device_bsz": 2}
    assert trained(tmp_path / "b", data, 2, **divided) == pytest.approx(plain, abs=1e-4)


def test_an_exported_model_says_the_same_in_transformers_pipeline(tuned: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    report = run_export(ExportSettings(lora_dir=str(tuned), output_dir=str(tmp_path / "e"), dtype="float32"))
    assert report["layers_merged"] == 12 and report["difference_on_disk"] < 1e-4
    theirs = pipeline("automatic-speech-recognition", str(tmp_path / "e"))
    how = {"language": "ko", "task": "transcribe", "max_new_tokens": 24}
    rows = read_rows(manifest("asr.val"))[:4]
    for row in rows:
        samples = decode(row["audio_path"], 16_000)
        found = theirs({"raw": samples, "sampling_rate": 16_000}, generate_kwargs=how)["text"].strip()
        flags = {"audio_path": row["audio_path"]}
        assert found == said(lora_dir=str(tuned), **flags) == said(model_id=str(tmp_path / "e"), **flags)
    assert said(lora_dir=str(tuned)) != said(model_id=WHISPER), "the adapter says something else than the base"
    with pytest.raises(SettingsError, match="--merge projector: a whisper model has no projector"):
        run_export(ExportSettings(lora_dir=str(tuned), output_dir=str(tmp_path / "f"), merge="projector"))


def test_evaluation_takes_it_unchanged(
    tuned: Path, small: dict[str, str], tmp_path: Path, evaluation_here: None
) -> None:
    """Short rows, a recording of several windows, and rows of tasks that Whisper does not answer."""
    clips = [decode(row["audio_path"], 16_000) for row in read_rows(manifest("base.val"))[:5]]
    soundfile.write(tmp_path / "long.wav", np.concatenate(clips), 16_000)
    rows = read_rows(small["asr.val"])
    rows.append({"audio_path": str(tmp_path / "long.wav"), "transcript": "a b c", "language": "en"})
    rows.append(read_rows(small["sqa.val"])[0])
    values = {"val_jsonl": write_rows(tmp_path / "m.jsonl", rows), "lora_dir": str(tuned)}
    values |= {"gen_max_new_tokens": 24, "perplexity": "all"}
    found = job.run_evaluation(EvaluateSettings.model_validate({**values, "output_dir": str(tmp_path / "e")}))
    assert found.metrics["asr"]["cer_nospace"]["n"] == 5 and found.metrics["asr"]["perplexity"]["value"] > 1
    [long] = [row for row in job.read_predictions(tmp_path / "e") if row["reference"] == "a b c"]
    assert long["prediction"] and long["num_samples"] == sum(map(len, clips)) and not long["chunk_of"]
    assert [line["reason"] for line in ledger(tmp_path / "e")] == ["unsupported_task"]
    alone = said(lora_dir=str(tuned), audio_path=str(tmp_path / "long.wav"), language="en")
    assert long["prediction"] == alone


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
        raise AssertionError(f"reached out to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: connect(None, args))  # type: ignore[arg-type]


def test_nothing_reaches_out(run: Callable[..., Path], no_network: None, small: dict[str, str], tmp_path: Path) -> None:
    out = run(val_jsonl=small["asr.val"], eval_max_new_tokens="4")
    assert said(lora_dir=str(out)) is not None
    run_export(ExportSettings(lora_dir=str(out), output_dir=str(tmp_path / "e")))


def gain(argv: Sequence[str]) -> tuple[float, float]:
    """CER without spaces on held-out clips, before and after the demo recipe."""
    settings = parse_only("train_whisper", argv)
    launch.run_training(settings)
    values = {"val_jsonl": manifest("asr.val"), "gen_max_new_tokens": 60, "perplexity": "none"}
    run_dir, found = Path(settings.output_dir), []
    for adapter in ("", str(run_dir)):
        flags = {**values, "model_id": WHISPER, "lora_dir": adapter, "output_dir": str(run_dir / f"e{bool(adapter)}")}
        scored = job.run_evaluation(EvaluateSettings.model_validate(flags)).metrics["asr"]
        found.append(scored["cer_nospace"]["value"])
    return found[0], found[1]


@pytest.mark.slow
def test_the_demo_recipe_halves_the_errors(tmp_path: Path, evaluation_here: None) -> None:
    config = Path(__file__).parents[2] / "jobs" / "configs" / "demo_train_whisper.yaml"
    before, after = gain(["--config", str(config), "--output_dir", str(tmp_path / "run"), "--num_workers", "0"])
    assert after < before / 2
