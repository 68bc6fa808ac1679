"""The jobs on the third model family: training in two stages, resuming, evaluating and exporting SALMONN."""

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ASSETS, SPEECH, TINY, WHISPER, manifest, read_rows, write_rows
from helpers import processes
from helpers.running import load_job, parse_only
from test_stages import losses, tensors

from voxray.audio.augment import SpecAugment
from voxray.batches.loader import Loader, Masking
from voxray.batches.rank import Worker
from voxray.commands import evaluate as job
from voxray.commands import train as launch
from voxray.commands.export import run_export
from voxray.commands.infer import run_inference
from voxray.config.demo import DemoSettings
from voxray.config.evaluate import EvaluateSettings, InferSettings
from voxray.config.export import ExportSettings
from voxray.config.salmonn import SalmonnSettings
from voxray.core.errors import RunError, SettingsError
from voxray.demo.answers import DemoRequest, open_model
from voxray.features.reader import Features
from voxray.generation.generate import SamplingParams, generate
from voxray.models.adapters.lora import load_adapter
from voxray.models.registry import get_family
from voxray.models.salmonn.audio_path import TRAINED_MODULES
from voxray.models.salmonn.compat.checkpoint import IGNORED_TENSORS, POSITION_TABLE, read_checkpoint
from voxray.recipes.choose_rows import choose_rows
from voxray.recipes.run_stage import build_plan
from voxray.recipes.salmonn import ROLES, SampledPrompts, assemble_inputs
from voxray.recipes.stages import Stage
from voxray.recipes.training_data import TrainingData
from voxray.training.engine import parameter_groups
from voxray.training.loop import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
NO_MASKS = SpecAugment()
LATER_LAYERS = re.compile(r"llama_model\..*\.layers\.(?!0\.|1\.)")
USUAL = {"max_steps": "2", "max_len": "120", "lr": "1e-3", "min_lr": "0", "warmup_steps": "0", "per_device_bsz": "4"}
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(salmonn: str, small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run jobs/train_salmonn.py in this process, two steps on a few rows; returns the run folder."""
    folder = tmp_path_factory.mktemp("salmonn-runs")

    def run(*flags: str, into: str = "", **more: str) -> Path:
        out = folder / (into or f"run{len(list(folder.iterdir()))}")
        usual = {"model_id": salmonn, "num_workers": "0", "features_dir": str(folder / "features"), **USUAL}
        usual |= {"train_jsonl": small["asr.train"], "rows_per_shard": "8", "output_dir": str(out), **more}
        argv = [word for key, value in usual.items() if value for word in (f"--{key}", value)]
        launch.run_training(assemble_inputs(parse_only("train_salmonn", [*argv, *flags])))
        return out

    return run


@pytest.fixture(scope="module")
def tuned(run: Run) -> Path:
    return run(into="tuned", max_steps="6")


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse_only("train_salmonn", ["--train_jsonl", "t", "--output_dir", "o", *flags])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_defaults_are_the_published_ones() -> None:
    settings = parse_only("train_salmonn", ["--train_jsonl", "t", "--output_dir", "o", "--model_id", "m"])
    names = ("lora_r", "lora_alpha", "lora_dropout", "per_device_bsz", "grad_accum", "weight_decay", "max_grad_norm")
    assert [getattr(settings, name) for name in names] == [8, 32, 0.1, 8, 1, 0.05, 0]
    assert (settings.max_steps, settings.eval_steps, settings.save_steps, settings.seed) == (90_000, 3000, 3000, 42)
    assert (settings.min_lr, settings.warmup_start_lr, settings.warmup_steps, settings.lr) == (1e-5, 1e-6, 3000, 3e-5)
    assert settings.stage == 1 and settings.eval_max_new_tokens == 200


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 1e-6), (1500, 1.55e-5), (2999, 2.99903e-5), (3000, 2.9945e-5), (45_000, 2e-5), (89_999, 1e-5)],
)
def test_rates_are_the_trainers(step: int, rate: float) -> None:
    settings = parse_only("train_salmonn", ["--train_jsonl", "t", "--output_dir", "o", "--model_id", "m"])
    assert learning_rate(settings, step, settings.max_steps) == pytest.approx(rate, rel=1e-5)


def test_what_trains_and_what_decays(tuned: Path, salmonn: str) -> None:
    both = tensors(tuned)
    whole = {name for name in both if "lora_" not in name}
    assert len(both) == len(whole) + 8 == 69 and all(tensor.dtype == torch.float32 for tensor in both.values())
    assert {next(word for word in name.split(".") if word in TRAINED_MODULES) for name in whole} == set(TRAINED_MODULES)
    counts = json.loads((tuned / "parameters.json").read_text())
    assert counts["encoder"]["trainable"] == 0 and counts["projector"]["trainable"] == counts["projector"]["total"]
    family = get_family(salmonn)
    model, _ = load_adapter(family.load_model(salmonn, dtype=torch.float32, device=CPU), tuned / "adapter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in whole or "lora_" in name)
    named, (decaying, others) = parameter_groups(model, family)
    assert [parameter for _, parameter in named] == [*decaying["params"], *others["params"]]
    assert others["weight_decay"] == 0 and "weight_decay" not in decaying
    assert all(parameter.ndim >= 2 for parameter in decaying["params"])
    assert all(parameter.ndim < 2 for parameter in others["params"]), "no bias, norm or such has two dimensions here"
    assert len(others["params"]) == 39 and len(decaying["params"]) == 30, "SALMONN's 34, of one layer of LoRA less"


def test_stage_2_needs_a_stage_1_and_takes_it(
    run: Run, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--stage 2: needs --ckpt" in refused(capsys, "--stage", "2", "--model_id", "m")
    assert "--stage" in refused(capsys, "--stage", "3", "--model_id", "m")
    plain = run("--stage", "2", "--lora_dropout", "0", ckpt=str(tuned))
    assert losses(plain)[0] < losses(tuned)[0]
    report = run_export(ExportSettings(lora_dir=str(tuned), output_dir=str(tmp_path / "x"), format="official"))
    assert report["tensors"] == 69 and report["difference_on_disk"] == 0
    official = tmp_path / "x" / "salmonn_v1.pth"
    wanted = json.loads((ASSETS / "salmonn-reference" / "keys_salmonn_7b.json").read_text())
    needed = {name for name in wanted if not IGNORED_TENSORS.fullmatch(name) and not POSITION_TABLE.fullmatch(name)}
    assert set(read_checkpoint(official).tensors) == {name for name in needed if not LATER_LAYERS.search(name)}
    started = run("--stage", "2", "--lora_dropout", "0", ckpt=str(official))
    assert losses(started) == losses(plain), "an official checkpoint of the same weights"
    assert json.loads((started / "provenance.json").read_text())["init_adapter"]["roles"] == ["projector", "llm"]
    with pytest.raises(SettingsError, match="rank 8 and alpha 32, this run --lora_r 4 and --lora_alpha 32"):
        run("--stage", "2", "--lora_r", "4", ckpt=str(official))
    with pytest.raises(SettingsError, match="rank 8 and alpha 32, this run --lora_r 4"):
        run("--stage", "2", "--lora_r", "4", ckpt=str(tuned))


def test_flags_reach_the_recipe(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the flags then do is one code path for all stages, which test_training_flags.py looks at."""
    given: list[Any] = []

    def recipe(run: Any, data: Any) -> dict[str, Any]:
        given.append(run.settings)
        return {"steps": 2, "finished": True}

    monkeypatch.setattr(launch, "train", recipe)
    flags = "--lora_dropout 0.3 --weight_decay 0.2 --eval_steps 7 --seed 3 --dryrun --grad_ckpt --init_lr 2e-5"
    run(*flags.split(), lr="")
    (settings,) = given
    assert (settings.lora_dropout, settings.weight_decay, settings.eval_steps, settings.seed) == (0.3, 0.2, 7, 3)
    assert settings.debug and settings.grad_ckpt and settings.lr == 2e-5


def test_settings_that_do_not_fit(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    base = ("--model_id", "m")
    assert "--model_id: give a SALMONN folder, or --beats_path, --llama_path as well" in refused(
        capsys, "--whisper_path", "w"
    )
    assert "--model_id and --beats_path: give the folder, or its parts" in refused(capsys, *base, "--beats_path", "b")
    assert "--min_lr: is for --lr_schedule cosine_from_start" in refused(
        capsys, *base, "--lr_schedule", "cosine", "--min_lr", "0"
    )
    assert "--min_lr 1e-05 is over --lr 1e-06" in refused(capsys, *base, "--lr", "1e-6")
    epochs = parse_only("train_salmonn", ["--train_jsonl", "t", "--output_dir", "o", *base, "--epochs", "2"])
    assert (epochs.epochs, epochs.max_steps) == (2, 0)
    with pytest.raises(SettingsError, match=r"a whisper model, and this job trains salmonn; jobs/train_whisper.py"):
        run(model_id=WHISPER)
    with pytest.raises(SettingsError, match=r"a voxtral model, and this job trains salmonn; jobs/train_multitask.py"):
        run(model_id=TINY)


def test_packs_stored_samples_recomputing_and_text_alone(run: Run, small: dict[str, str]) -> None:
    plain = losses(run("--lora_dropout", "0", max_steps="1", per_device_bsz="12"))
    packed = run("--lora_dropout", "0", "--batching", "packed", "--pack_tokens", "1200", max_steps="1")
    assert losses(packed) == pytest.approx(plain, abs=0.3), "dropout in the Q-Former stays"
    how = ("--lora_dropout", "0", "--store", "pcm16", "--features_dir")
    stored = run(*how, str(packed / "f"), max_steps="1", per_device_bsz="12", features_dir="")
    assert losses(stored) == pytest.approx(plain, abs=1e-3)
    recomputed = run("--lora_dropout", "0", "--grad_ckpt", max_steps="1", per_device_bsz="12")
    assert losses(recomputed) == pytest.approx(plain, abs=1e-5)
    mixed = f"{small['asr.train']},{small['sqa.train']},{small['tqa.train']}"
    assert np.isfinite(losses(run(train_jsonl=mixed, max_steps="3"))).all()


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantised_language_models_train(run: Run, kind: str) -> None:
    assert np.isfinite(losses(run("--quantize", kind))).all()


def test_prompts_are_drawn_by_seed_epoch_and_row(
    run: Run, salmonn: str, small: dict[str, str], make_features: Callable[..., Any], tmp_path: Path
) -> None:
    asked = [f"<Speech><SpeechHere></Speech> {word} this." for word in ("Write", "Transcribe", "Hear", "Note")]
    path = tmp_path / "prompts.yaml"
    path.write_text(json.dumps({"asr": asked}))
    redraw = SampledPrompts(salmonn, str(path), 42)
    features = Features(make_features(small["asr.train"], model_id=salmonn))
    rows = [features.row(number) for number in range(len(features))]
    front_end = get_family(salmonn).front_end(salmonn)
    drawn = [[front_end.show(redraw(row, epoch).prompt_ids) for row in rows] for epoch in (0, 1)]
    assert drawn[0] == [front_end.show(redraw(row, 0).prompt_ids) for row in rows] != drawn[1]
    assert len({prompt for epoch in drawn for prompt in epoch}) == 4
    again = SampledPrompts(salmonn, str(path), 7)
    assert [front_end.show(again(row, 0).prompt_ids) for row in rows] != drawn[0]
    plain, other = run("--lora_dropout", "0"), run("--lora_dropout", "0", prompts=str(path))
    assert losses(plain) != losses(other), "they reach the batches"
    noted = json.loads((other / "provenance.json").read_text())["prompts"]
    assert noted == {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    shown = front_end.show(redraw(rows[0], 0).prompt_ids).partition("\n")[0]
    assert shown.rpartition(" ")[0].split("</Speech>")[0] in (other / "train.log").read_text()


def test_packs_have_room_for_drawn_prompts(
    salmonn: str, small: dict[str, str], make_features: Callable[..., Any], tmp_path: Path
) -> None:
    """Prompts of 10 and of 90 words: packs and --max_len reckon with the longer one, whichever is drawn."""
    long = f"<Speech><SpeechHere></Speech> {'Write ' * 90}"
    (tmp_path / "p.json").write_text(json.dumps({"asr": ["<SpeechHere> Write.", long], "sqa": [f"{long} {{}}"]}))
    redraw = SampledPrompts(salmonn, str(tmp_path / "p.json"), 3)
    folders = make_features(small["asr.train"], small["sqa.train"], model_id=salmonn)
    planned, stored = Features(folders, redraw.max_extra_prompt_tokens), Features(folders)
    assert (planned.longest_tokens - stored.num_tokens)[planned.task == 0].tolist() == [
        redraw.max_extra_prompt_tokens["asr"]
    ] * 12
    assert set(redraw.max_extra_prompt_tokens) == {"asr", "sqa", "aac"} and redraw.max_extra_prompt_tokens["aac"] == 0
    flags = {"batching": "packed", "pack_tokens": int(planned.longest_tokens.max())}
    settings = SalmonnSettings.model_validate({"model_id": salmonn, "train_jsonl": "t", "output_dir": "o", **flags})
    lengths = {}
    for features in (planned, stored):
        plan = build_plan(Stage(ROLES, prompt_sampler=redraw), settings, features, np.arange(len(features)), 1)
        loader = Loader(
            *(features, get_family(salmonn).front_end(salmonn), plan, Worker(), 0, Masking(NO_MASKS, 0), redraw),
            pin_memory=False,
        )
        batches = [batch for _, packs in loader.steps(0, plan.total_steps(3)) for _, batch in packs]
        lengths[features is planned] = max(batch["input_ids"].shape[1] for batch in batches)
    assert lengths[True] <= settings.pack_tokens < lengths[False], "without spare tokens packs overflow"
    front_end = get_family(salmonn).front_end(salmonn)
    short = settings.model_copy(update={"max_len": int(planned.longest_tokens.max()) - 1})
    _, _, lost = choose_rows(Stage(ROLES), short, planned, Features(()), front_end)
    assert len(lost) == (planned.longest_tokens == planned.longest_tokens.max()).sum()
    question = replace(stored.row(12), prompt_ids=np.zeros(3, np.int32))
    assert redraw(question, 0) is question, "a prompt that is longer than was reckoned with is not taken"


def test_a_resumed_run_draws_from_the_same_prompts(data: TrainingData, salmonn: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"asr": ["<SpeechHere> Write."]}))
    how = {"max_steps": 3, "prompts": str(path)}
    losses = trained(tmp_path / "a", data, salmonn, **how)
    path.write_text("asr: <SpeechHere> Write.")
    assert trained(tmp_path / "a", data, salmonn, **how) == losses, "the same prompts, written otherwise"
    path.write_text(json.dumps({"asr": ["<SpeechHere> Say."]}))
    for changed in (how, {"max_steps": 3}):
        with pytest.raises(RunError, match="--prompts holds other prompts than when this run started; use --overwrite"):
            trained(tmp_path / "a", data, salmonn, **changed)


def test_what_is_frozen_stays_in_eval(data: TrainingData, salmonn: str, tmp_path: Path) -> None:
    """The reference's trainer puts all of it into training mode, so that layers of BEATs are dropped at random."""
    settings = SalmonnSettings.model_validate(
        {"model_id": salmonn, "train_jsonl": "t", "output_dir": str(tmp_path), **USUAL, "max_steps": 1}
    )
    seen: list[dict[str, bool]] = []

    def look(settings: Any, state: Any) -> None:
        seen.append({name.rpartition(".")[2]: module.training for name, module in state.model.named_modules()})

    processes.run(settings, data, look=look)
    [modes] = seen
    assert not modes["speech_encoder"] and not modes["beats"]
    assert modes["speech_Qformer"] and modes["llama_model"]


def test_the_trainers_own_files_run(
    salmonn_parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--cfg-path, its nested keys, annotation files with a prefix, and --dryrun."""
    rows = read_rows(manifest("asr.train"))[:4]
    entries = [{"path": Path(row["audio_path"]).name, "text": row["transcript"], "task": "asr"} for row in rows]
    entries.append({"path": "gone.wav", "text": "x", "task": "asr"})
    (tmp_path / "stage1.json").write_text(json.dumps({"annotation": entries}))
    (tmp_path / "prompt.json").write_text(json.dumps({"asr": ["<Speech><SpeechHere></Speech> Hear it."]}))
    old = {
        "model": {
            **{name: salmonn_parts[name] for name in ("llama_path", "whisper_path", "beats_path")},
            **{"freeze_whisper": True, "lora": True, "lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.0},
            **{"multi_prompt": True, "prompt_path": "prompt.json", "max_txt_len": 300, "end_sym": "</s>", "ckpt": ""},
        },
        "datasets": {"prefix": str(SPEECH / "train"), "train_ann_path": "stage1.json", "valid_ann_path": ""},
        "run": {
            **{"seed": 3, "output_dir": "out", "log_freq": 5, "epoch_based": False, "iters_per_epoch": 30},
            **{"accum_grad_iters": 1, "batch_size_train": 2, "batch_size_eval": 8, "num_workers": 8, "amp": True},
            "optims": {"max_epoch": 2, "warmup_steps": 2, "warmup_start_lr": "1e-6", "init_lr": "3e-4"},
        },
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_stage1.yaml").write_text(json.dumps(old))
    command = ["--cfg-path", "train_stage1.yaml", "--dryrun", "--num_workers", "0"]
    settings = parse_only("train_salmonn", command)
    assert (settings.lora_r, settings.lr, settings.warmup_start_lr, settings.max_steps) == (4, 3e-4, 1e-6, 60)
    assert (settings.eval_steps, settings.seed, settings.stage, settings.debug) == (30, 3, 1, True)
    said = capsys.readouterr().err
    assert "run.amp has no effect: --fp16 or --bf16 say how to compute" in said and "model.multi_prompt" in said
    load_job("train_salmonn").main(command)
    assert len(losses(tmp_path / "out")) == 4
    [left_out] = (tmp_path / "out/manifests/stage1.quarantine.jsonl").read_text().splitlines()
    assert json.loads(left_out)["reason"] == "audio_missing"
    old["model"] |= {"ckpt": "out", "num_speech_query_token": 2, "nonsense": 1}  # type: ignore[operator]
    (tmp_path / "train_stage2.yaml").write_text(json.dumps(old))
    with pytest.raises(SystemExit):
        parse_only("train_salmonn", ["--cfg-path", "train_stage2.yaml"])
    said = capsys.readouterr().err
    assert "model.num_speech_query_token: must be 1" in said and "model.nonsense: unknown key" in said
    del old["model"]["num_speech_query_token"], old["model"]["nonsense"]  # type: ignore[attr-defined]
    (tmp_path / "train_stage2.yaml").write_text(json.dumps(old))
    assert parse_only("train_salmonn", ["--cfg-path", "train_stage2.yaml"]).stage == 2


def test_the_adapter_is_used_everywhere(
    run: Run, tuned: Path, salmonn: str, small: dict[str, str], tmp_path: Path, evaluation_here: None
) -> None:
    rows = read_rows(small["asr.val"])
    names = [f"test000{number}" for number in (3, 1, 2, 0)]
    data = write_rows(tmp_path / "m.jsonl", [{**row, "id": name} for row, name in zip(rows, names, strict=True)])
    values = {"val_jsonl": data, "mode": "submission_asr", "output_dir": str(tmp_path / "e"), "lora_dir": str(tuned)}
    settings = EvaluateSettings.model_validate(values)
    assert (settings.num_beams, settings.gen_max_new_tokens) == (4, 200)
    job.run_evaluation(settings.model_copy(update={"gen_max_new_tokens": 12}))
    lines = list(csv.reader((tmp_path / "e" / "submission.csv").open(encoding="utf-8")))
    assert lines[0] == ["testset_id", "text"] and [line[0] for line in lines[1:]] == sorted(names)

    def said(**flags: str) -> list[str]:
        answers = run_inference(InferSettings.model_validate({"jsonl": data, "max_new_tokens": 12, **flags}), "")
        return [answer["prediction"] for answer in answers]

    with_adapter = said(lora_dir=str(tuned))
    assert with_adapter != said(model_id=salmonn)
    beams = {line[0]: line[1] for line in lines[1:]}
    assert [beams[name] for name in names] == [text.lower() for text in said(lora_dir=str(tuned), num_beams="4")]
    demo, _ = open_model(DemoSettings(lora_dir=str(tuned), max_new_tokens=12))
    sides = list(demo.answers(DemoRequest(rows[0]["audio_path"], compare=True)))
    assert [(side.is_base, side.text) for side in sides] == [(False, with_adapter[0])]
    assert with_adapter[0] != said(model_id=salmonn)[0]
    report = run_export(ExportSettings(lora_dir=str(tuned), output_dir=str(tmp_path / "x"), dtype="float32"))
    assert report["layers_merged"] == 4 and report["difference_on_disk"] < 1e-4
    assert said(model_id=str(tmp_path / "x")) == with_adapter
    with pytest.raises(SettingsError, match="--merge projector: what trains beside LoRA in salmonn"):
        run_export(ExportSettings(lora_dir=str(tuned), output_dir=str(tmp_path / "y"), merge="projector"))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_rows_of_a_batch_with_other_prompts_are_answered_as_alone(
    salmonn: str, small: dict[str, str], make_features: Callable[..., Any], num_beams: int
) -> None:
    """In the reference pads come in the middle of such prompts, and a batch ends with its first row."""
    features = Features(make_features(small["asr.val"], small["sqa.val"], model_id=salmonn))
    family = get_family(salmonn)
    parts = (family.load_model(salmonn, dtype=torch.float32, device=CPU), family, family.front_end(salmonn))
    rows = [features.row(number) for number in (0, 4, 1, 5)]
    assert len({len(row.prompt_ids) for row in rows}) > 2
    sampling = SamplingParams(10, num_beams=num_beams)
    together, alone = (
        {place: found.text for place, found in generate(*parts, rows, batch_size=size, sampling=sampling)}
        for size in (4, 1)
    )
    assert together == alone and len(set(alone.values())) > 1


@pytest.fixture(scope="module")
def data(salmonn: str, small: dict[str, str], make_features: Callable[..., Any]) -> TrainingData:
    names = ("asr.train", "asr.val")
    return TrainingData(*(make_features(small[name], model_id=salmonn) for name in names))


def trained(folder: Path, data: TrainingData, salmonn: str, num_workers: int = 1, **changes: Any) -> list[float]:
    values = {"model_id": salmonn, "train_jsonl": "t", "output_dir": str(folder), **USUAL, "eval_steps": 100}
    values |= {"max_steps": 6, "save_steps": 3, "eval_max_new_tokens": 4}
    settings = SalmonnSettings.model_validate({**values, **changes})
    return [record["loss"] for record in processes.run(settings, data, num_workers)]


def test_workers_divide_the_same_step(
    data: TrainingData, salmonn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Q-Former has dropout of its own, drawn for each pack; so one pack of each worker is one of a lone worker."""
    alone = trained(tmp_path / "a", data, salmonn, grad_accum=2, per_device_bsz=2, lora_dropout=0.0)
    assert trained(tmp_path / "b", data, salmonn, 2, per_device_bsz=2, lora_dropout=0.0) == pytest.approx(
        alone, abs=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_alike(
    salmonn: str, small: dict[str, str], make_features: Callable[..., Any], tmp_path: Path, stage: int
) -> None:
    """Rows of text alone among them, so that one worker may hear nothing while the other does."""
    names = [small[f"{task}.train"] for task in ("asr", "tqa")]
    data = TrainingData(make_features(*names, model_id=salmonn), ())
    how = {"per_device_bsz": 1, "lora_dropout": 0.0, "max_steps": 4}
    plain = trained(tmp_path / "a", data, salmonn, 2, **how)
    divided = {"strategy": "deepspeed", "zero_stage": stage, "save_steps": 2, **how}
    straight = trained(tmp_path / "b", data, salmonn, 2, **divided)
    assert straight == pytest.approx(plain, abs=1e-4)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "b" / "adapter")
    assert trained(tmp_path / "b", data, salmonn, 2, **divided) == straight, "moments of both groups came back"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_stages_learn(run: Run, salmonn: str) -> None:
    """Nobody hears the women of the validation rows in training; new weights write nothing right."""
    how = {"train_jsonl": manifest("asr.train"), "val_jsonl": manifest("asr.val"), "eval_max_new_tokens": "24"}
    how |= {"eval_max_rows": "40", "max_steps": "220", "eval_steps": "220", "per_device_bsz": "16", "lr": "3e-3"}
    how |= {"warmup_steps": "20", "max_grad_norm": "1", "lora_dropout": "0"}
    first = run(**how)
    second = run("--stage", "2", **{**how, "ckpt": str(first), "max_steps": "120", "eval_steps": "120"})
    found = [json.loads((folder / "result.json").read_text())["asr/cer_nospace"] for folder in (first, second)]
    assert found[1] < found[0] < 0.7
    assert np.mean(losses(first)[-10:]) < 0.5 * np.mean(losses(first)[:10])
    assert np.mean(losses(second)[-10:]) < np.mean(losses(first)[-10:])


def test_resume_is_exact(data: TrainingData, salmonn: str, tmp_path: Path) -> None:
    straight = trained(tmp_path / "a", data, salmonn)
    assert straight[-1] < straight[0]
    assert trained(tmp_path / "b", data, salmonn) == straight, "new weights come from the seed"
    for path in (tmp_path / "b" / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 3:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "b" / "adapter")
    assert trained(tmp_path / "b", data, salmonn) == straight
    assert all(tensor.equal(tensors(tmp_path / "b")[name]) for name, tensor in tensors(tmp_path / "a").items())
