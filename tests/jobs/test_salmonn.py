"""All jobs with SALMONN: training in two stages, resuming, evaluating and exporting."""

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
from helpers.processes import SHARDINGS
from helpers.running import load_job, parse_only
from test_stages import losses, tensors

from voxray.audio.augment import SpecAugment
from voxray.batches.loader import Loader, Masking
from voxray.batches.rank import Worker
from voxray.commands import evaluate as evaluate_command
from voxray.commands import train as command
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
DEFAULTS = {"max_steps": "2", "max_len": "120", "lr": "1e-3", "min_lr": "0", "warmup_steps": "0", "per_device_bsz": "4"}
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(salmonn: str, small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run jobs/train_salmonn.py in this process, two steps on a few rows; returns the run folder."""
    folder = tmp_path_factory.mktemp("salmonn-runs")

    def run(*flags: str, into: str = "", **more: str) -> Path:
        out = folder / (into or f"run{len(list(folder.iterdir()))}")
        values = {"model_id": salmonn, "num_workers": "0", "features_dir": str(folder / "features"), **DEFAULTS}
        values |= {"train_jsonl": small["asr.train"], "rows_per_shard": "8", "output_dir": str(out), **more}
        argv = [word for key, value in values.items() if value for word in (f"--{key}", value)]
        command.run_training(assemble_inputs(parse_only("train_salmonn", [*argv, *flags])))
        return out

    return run


@pytest.fixture(scope="module")
def tuned(run: Run) -> Path:
    return run(into="tuned", max_steps="6")


def parse_error(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
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
def test_learning_rates_equal_salmonns_trainer(step: int, rate: float) -> None:
    settings = parse_only("train_salmonn", ["--train_jsonl", "t", "--output_dir", "o", "--model_id", "m"])
    assert learning_rate(settings, step, settings.max_steps) == pytest.approx(rate, rel=1e-5)


def test_trained_weights_and_weight_decay(tuned: Path, salmonn: str) -> None:
    weights = tensors(tuned)
    full = {name for name in weights if "lora_" not in name}
    assert len(weights) == len(full) + 8 == 69 and all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert {next(word for word in name.split(".") if word in TRAINED_MODULES) for name in full} == set(TRAINED_MODULES)
    counts = json.loads((tuned / "parameters.json").read_text())
    assert counts["encoder"]["trainable"] == 0 and counts["projector"]["trainable"] == counts["projector"]["total"]
    family = get_family(salmonn)
    model, _ = load_adapter(family.load_model(salmonn, dtype=torch.float32, device=CPU), tuned / "adapter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in full or "lora_" in name)
    named, (decaying, excluded) = parameter_groups(model, family)
    assert [parameter for _, parameter in named] == [*decaying["params"], *excluded["params"]]
    assert excluded["weight_decay"] == 0 and "weight_decay" not in decaying
    assert all(parameter.ndim >= 2 for parameter in decaying["params"])
    assert all(parameter.ndim < 2 for parameter in excluded["params"]), "biases and norms"
    assert len(excluded["params"]) == 39
    assert len(decaying["params"]) == 30, "SALMONN's trainer has 34, with one more layer of LoRA"


def test_stage_2_starts_from_stage_1(run: Run, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--stage 2: needs --ckpt" in parse_error(capsys, "--stage", "2", "--model_id", "m")
    assert "--stage" in parse_error(capsys, "--stage", "3", "--model_id", "m")
    plain = run("--stage", "2", "--lora_dropout", "0", ckpt=str(tuned))
    assert losses(plain)[0] < losses(tuned)[0]
    report = run_export(ExportSettings(lora_dir=str(tuned), output_dir=str(tmp_path / "x"), format="official"))
    assert report["tensors"] == 69 and report["difference_on_disk"] == 0
    assert "SALMONN's own code reads the checkpoint" in (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    official = tmp_path / "x" / "salmonn_v1.pth"
    official_names = json.loads((ASSETS / "salmonn-reference" / "keys_salmonn_7b.json").read_text())
    needed = {
        name for name in official_names if not IGNORED_TENSORS.fullmatch(name) and not POSITION_TABLE.fullmatch(name)
    }
    assert set(read_checkpoint(official).tensors) == {name for name in needed if not LATER_LAYERS.search(name)}
    from_official = run("--stage", "2", "--lora_dropout", "0", ckpt=str(official))
    assert losses(from_official) == losses(plain), "an official checkpoint with the same weights"
    assert json.loads((from_official / "provenance.json").read_text())["init_adapter"]["roles"] == ["projector", "llm"]
    with pytest.raises(SettingsError, match="rank 8 and alpha 32, this run --lora_r 4 and --lora_alpha 32"):
        run("--stage", "2", "--lora_r", "4", ckpt=str(official))
    with pytest.raises(SettingsError, match="rank 8 and alpha 32, this run --lora_r 4"):
        run("--stage", "2", "--lora_r", "4", ckpt=str(tuned))


def test_flags_reach_the_recipe(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their effect is the same code for all recipes, which test_training_flags.py tests."""
    received: list[Any] = []

    def fake_train(run: Any, data: Any) -> dict[str, Any]:
        received.append(run.settings)
        return {"steps": 2, "finished": True}

    monkeypatch.setattr(command, "train", fake_train)
    flags = "--lora_dropout 0.3 --weight_decay 0.2 --eval_steps 7 --seed 3 --dryrun --grad_ckpt --init_lr 2e-5"
    run(*flags.split(), lr="")
    (settings,) = received
    assert (settings.lora_dropout, settings.weight_decay, settings.eval_steps, settings.seed) == (0.3, 0.2, 7, 3)
    assert settings.debug and settings.grad_ckpt and settings.lr == 2e-5


def test_invalid_settings_are_parse_error(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    base = ("--model_id", "m")
    assert "--model_id: give a SALMONN folder, or --beats_path, --llama_path as well" in parse_error(
        capsys, "--whisper_path", "w"
    )
    assert "--model_id and --beats_path: give the folder, or its parts" in parse_error(
        capsys, *base, "--beats_path", "b"
    )
    assert "--min_lr: is for --lr_schedule cosine_from_start" in parse_error(
        capsys, *base, "--lr_schedule", "cosine", "--min_lr", "0"
    )
    assert "--min_lr 1e-05 is over --lr 1e-06" in parse_error(capsys, *base, "--lr", "1e-6")
    epochs = parse_only("train_salmonn", ["--train_jsonl", "t", "--output_dir", "o", *base, "--epochs", "2"])
    assert (epochs.epochs, epochs.max_steps) == (2, 0)
    with pytest.raises(SettingsError, match=r"a whisper model, and this job trains salmonn; train_whisper trains it"):
        run(model_id=WHISPER)
    with pytest.raises(SettingsError, match=r"a voxtral model, and this job trains salmonn; train_multitask trains it"):
        run(model_id=TINY)


def test_packs_stored_samples_recomputation_and_text_only(run: Run, small: dict[str, str]) -> None:
    plain = losses(run("--lora_dropout", "0", max_steps="1", per_device_bsz="12"))
    packed = run("--lora_dropout", "0", "--batching", "packed", "--pack_tokens", "1200", max_steps="1")
    assert losses(packed) == pytest.approx(plain, abs=0.3), "the Q-Former still has dropout"
    flags = ("--lora_dropout", "0", "--store", "pcm16", "--features_dir")
    stored = run(*flags, str(packed / "f"), max_steps="1", per_device_bsz="12", features_dir="")
    assert losses(stored) == pytest.approx(plain, abs=1e-3)
    recomputed = run("--lora_dropout", "0", "--grad_ckpt", max_steps="1", per_device_bsz="12")
    assert losses(recomputed) == pytest.approx(plain, abs=1e-5)
    mixed = f"{small['asr.train']},{small['sqa.train']},{small['tqa.train']}"
    assert np.isfinite(losses(run(train_jsonl=mixed, max_steps="3"))).all()


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantised_language_models_train(run: Run, kind: str) -> None:
    assert np.isfinite(losses(run("--quantize", kind))).all()


def test_prompts_are_sampled_by_seed_epoch_and_row(
    run: Run, salmonn: str, small: dict[str, str], make_features: Callable[..., Any], tmp_path: Path
) -> None:
    prompts = [f"<Speech><SpeechHere></Speech> {word} this." for word in ("Write", "Transcribe", "Hear", "Note")]
    path = tmp_path / "prompts.yaml"
    path.write_text(json.dumps({"asr": prompts}))
    sampler = SampledPrompts(salmonn, str(path), 42)
    features = Features(make_features(small["asr.train"], model_id=salmonn))
    rows = [features.row(number) for number in range(len(features))]
    front_end = get_family(salmonn).front_end(salmonn)
    sampled = [[front_end.show(sampler(row, epoch).prompt_ids) for row in rows] for epoch in (0, 1)]
    assert sampled[0] == [front_end.show(sampler(row, 0).prompt_ids) for row in rows] != sampled[1]
    assert len({prompt for epoch in sampled for prompt in epoch}) == 4
    other_seed = SampledPrompts(salmonn, str(path), 7)
    assert [front_end.show(other_seed(row, 0).prompt_ids) for row in rows] != sampled[0]
    plain, with_prompts = run("--lora_dropout", "0"), run("--lora_dropout", "0", prompts=str(path))
    assert losses(plain) != losses(with_prompts), "the prompts reach the batches"
    recorded = json.loads((with_prompts / "provenance.json").read_text())["prompts"]
    assert recorded == {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    example = front_end.show(sampler(rows[0], 0).prompt_ids).partition("\n")[0]
    assert example.rpartition(" ")[0].split("</Speech>")[0] in (with_prompts / "train.log").read_text()


def test_packs_reserve_tokens_for_sampled_prompts(
    salmonn: str, small: dict[str, str], make_features: Callable[..., Any], tmp_path: Path
) -> None:
    """With prompts of 1 and of 90 words, packs and --max_len count the longer one, whichever is sampled."""
    long = f"<Speech><SpeechHere></Speech> {'Write ' * 90}"
    (tmp_path / "p.json").write_text(json.dumps({"asr": ["<SpeechHere> Write.", long], "sqa": [f"{long} {{}}"]}))
    sampler = SampledPrompts(salmonn, str(tmp_path / "p.json"), 3)
    folders = make_features(small["asr.train"], small["sqa.train"], model_id=salmonn)
    planned, stored = Features(folders, sampler.max_extra_prompt_tokens), Features(folders)
    assert (planned.longest_tokens - stored.num_tokens)[planned.task == 0].tolist() == [
        sampler.max_extra_prompt_tokens["asr"]
    ] * 12
    assert set(sampler.max_extra_prompt_tokens) == {"asr", "sqa", "aac", "ast"}
    assert sampler.max_extra_prompt_tokens["aac"] == 0 == sampler.max_extra_prompt_tokens["ast"]
    flags = {"batching": "packed", "pack_tokens": int(planned.longest_tokens.max())}
    settings = SalmonnSettings.model_validate({"model_id": salmonn, "train_jsonl": "t", "output_dir": "o", **flags})
    lengths = {}
    for features in (planned, stored):
        plan = build_plan(Stage(ROLES, prompt_sampler=sampler), settings, features, np.arange(len(features)), 1)
        loader = Loader(
            *(features, get_family(salmonn).front_end(salmonn), plan, Worker(), 0, Masking(NO_MASKS, 0), sampler),
            pin_memory=False,
        )
        batches = [batch for _, packs in loader.steps(0, plan.total_steps(3)) for _, batch in packs]
        lengths[features is planned] = max(batch["input_ids"].shape[1] for batch in batches)
    assert lengths[True] <= settings.pack_tokens < lengths[False], "packs overflow without the extra tokens"
    front_end = get_family(salmonn).front_end(salmonn)
    short = settings.model_copy(update={"max_len": int(planned.longest_tokens.max()) - 1})
    _, _, lost = choose_rows(Stage(ROLES), short, planned, Features(()), front_end)
    assert len(lost) == (planned.longest_tokens == planned.longest_tokens.max()).sum()
    question = replace(stored.row(12), prompt_ids=np.zeros(3, np.int32))
    assert sampler(question, 0) is question, "a prompt over the planned length is not used"


def test_a_resumed_run_needs_the_same_prompts(data: TrainingData, salmonn: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"asr": ["<SpeechHere> Write."]}))
    flags = {"max_steps": 3, "prompts": str(path)}
    losses = train_losses(tmp_path / "a", data, salmonn, **flags)
    path.write_text("asr: <SpeechHere> Write.")
    assert train_losses(tmp_path / "a", data, salmonn, **flags) == losses, "the same prompts in YAML"
    path.write_text(json.dumps({"asr": ["<SpeechHere> Say."]}))
    for changed in (flags, {"max_steps": 3}):
        with pytest.raises(RunError, match="--prompts holds other prompts than when this run started; give another"):
            train_losses(tmp_path / "a", data, salmonn, **changed)


def test_frozen_encoders_stay_in_eval_mode(data: TrainingData, salmonn: str, tmp_path: Path) -> None:
    """SALMONN's own trainer sets everything to training mode, so BEATs drops random layers."""
    settings = SalmonnSettings.model_validate(
        {"model_id": salmonn, "train_jsonl": "t", "output_dir": str(tmp_path), **DEFAULTS, "max_steps": 1}
    )
    recorded: list[dict[str, bool]] = []

    def record_modes(settings: Any, state: Any) -> None:
        recorded.append({name.rpartition(".")[2]: module.training for name, module in state.model.named_modules()})

    processes.run(settings, data, inspect=record_modes)
    [modes] = recorded
    assert not modes["speech_encoder"] and not modes["beats"]
    assert modes["speech_Qformer"] and modes["llama_model"]


def test_files_of_salmonns_trainer_run(
    salmonn_parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--cfg-path, its nested keys, annotation files with a prefix, and --dryrun."""
    rows = read_rows(manifest("asr.train"))[:4]
    entries = [{"path": Path(row["audio_path"]).name, "text": row["transcript"], "task": "asr"} for row in rows]
    entries.append({"path": "gone.wav", "text": "x", "task": "asr"})
    (tmp_path / "stage1.json").write_text(json.dumps({"annotation": entries}))
    (tmp_path / "prompt.json").write_text(json.dumps({"asr": ["<Speech><SpeechHere></Speech> Hear it."]}))
    config = {
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
    (tmp_path / "train_stage1.yaml").write_text(json.dumps(config))
    argv = ["--cfg-path", "train_stage1.yaml", "--dryrun", "--num_workers", "0"]
    settings = parse_only("train_salmonn", argv)
    assert (settings.lora_r, settings.lr, settings.warmup_start_lr, settings.max_steps) == (4, 3e-4, 1e-6, 60)
    assert (settings.eval_steps, settings.seed, settings.stage, settings.debug) == (30, 3, 1, True)
    output = capsys.readouterr().err
    assert "run.amp has no effect: --fp16 or --bf16 say how to compute" in output and "model.multi_prompt" in output
    load_job("train_salmonn").main(argv)
    assert len(losses(tmp_path / "out")) == 4
    [left_out] = (tmp_path / "out/manifests/stage1.quarantine.jsonl").read_text().splitlines()
    assert json.loads(left_out)["reason"] == "audio_missing"
    config["model"] |= {"ckpt": "out", "num_speech_query_token": 2, "nonsense": 1}  # type: ignore[operator]
    (tmp_path / "train_stage2.yaml").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        parse_only("train_salmonn", ["--cfg-path", "train_stage2.yaml"])
    output = capsys.readouterr().err
    assert "model.num_speech_query_token: must be 1" in output and "model.nonsense: unknown key" in output
    del config["model"]["num_speech_query_token"], config["model"]["nonsense"]  # type: ignore[attr-defined]
    (tmp_path / "train_stage2.yaml").write_text(json.dumps(config))
    assert parse_only("train_salmonn", ["--cfg-path", "train_stage2.yaml"]).stage == 2


@pytest.mark.slow
def test_all_jobs_use_the_adapter(
    run: Run, tuned: Path, salmonn: str, small: dict[str, str], tmp_path: Path, evaluation_here: None
) -> None:
    rows = read_rows(small["asr.val"])
    names = [f"test000{number}" for number in (3, 1, 2, 0)]
    data = write_rows(tmp_path / "m.jsonl", [{**row, "id": name} for row, name in zip(rows, names, strict=True)])
    values = {"val_jsonl": data, "mode": "submission_asr", "output_dir": str(tmp_path / "e"), "lora_dir": str(tuned)}
    settings = EvaluateSettings.model_validate(values)
    assert (settings.num_beams, settings.gen_max_new_tokens) == (4, 200)
    evaluate_command.run_evaluation(settings.model_copy(update={"gen_max_new_tokens": 12}))
    lines = list(csv.reader((tmp_path / "e" / "submission.csv").open(encoding="utf-8")))
    assert lines[0] == ["testset_id", "text"] and [line[0] for line in lines[1:]] == sorted(names)

    def answer(**flags: str) -> list[str]:
        rows = run_inference(InferSettings.model_validate({"jsonl": data, "max_new_tokens": 12, **flags}), "")
        return [row["prediction"] for row in rows]

    with_adapter = answer(lora_dir=str(tuned))
    assert with_adapter != answer(model_id=salmonn)
    beams = {line[0]: line[1] for line in lines[1:]}
    assert [beams[name] for name in names] == [text.lower() for text in answer(lora_dir=str(tuned), num_beams="4")]
    demo, _ = open_model(DemoSettings(lora_dir=str(tuned), max_new_tokens=12))
    sides = list(demo.answers(DemoRequest(rows[0]["audio_path"], compare=True)))
    assert [(side.is_base, side.text) for side in sides] == [(False, with_adapter[0])]
    assert with_adapter[0] != answer(model_id=salmonn)[0]
    report = run_export(ExportSettings(lora_dir=str(tuned), output_dir=str(tmp_path / "x"), dtype="float32"))
    assert report["layers_merged"] == 4 and report["difference_on_disk"] < 1e-4
    assert answer(model_id=str(tmp_path / "x")) == with_adapter
    with pytest.raises(SettingsError, match="--merge projector: what trains beside LoRA in salmonn"):
        run_export(ExportSettings(lora_dir=str(tuned), output_dir=str(tmp_path / "y"), merge="projector"))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_answers_do_not_depend_on_the_batch(
    salmonn: str, small: dict[str, str], make_features: Callable[..., Any], num_beams: int
) -> None:
    """Prompts differ in length. In the reference, padding is in their middle, and a batch ends with its first row."""
    features = Features(make_features(small["asr.val"], small["sqa.val"], model_id=salmonn))
    family = get_family(salmonn)
    parts = (family.load_model(salmonn, dtype=torch.float32, device=CPU), family, family.front_end(salmonn))
    rows = [features.row(number) for number in (0, 4, 1, 5)]
    assert len({len(row.prompt_ids) for row in rows}) > 2
    sampling = SamplingParams(10, num_beams=num_beams)
    together, alone = (
        {index: completion.text for index, completion in generate(*parts, rows, batch_size=size, sampling=sampling)}
        for size in (4, 1)
    )
    assert together == alone and len(set(alone.values())) > 1


@pytest.fixture(scope="module")
def data(salmonn: str, small: dict[str, str], make_features: Callable[..., Any]) -> TrainingData:
    names = ("asr.train", "asr.val")
    return TrainingData(*(make_features(small[name], model_id=salmonn) for name in names))


def train_losses(folder: Path, data: TrainingData, salmonn: str, num_workers: int = 1, **changes: Any) -> list[float]:
    values = {"model_id": salmonn, "train_jsonl": "t", "output_dir": str(folder), **DEFAULTS, "eval_steps": 100}
    values |= {"max_steps": 6, "save_steps": 3, "eval_max_new_tokens": 4}
    settings = SalmonnSettings.model_validate({**values, **changes})
    return [record["loss"] for record in processes.run(settings, data, num_workers)]


@pytest.mark.slow
def test_two_workers_equal_one(
    data: TrainingData, salmonn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Q-Former has dropout, seeded per microbatch. So both runs have the same microbatches."""
    alone = train_losses(tmp_path / "a", data, salmonn, grad_accum=2, per_device_bsz=2, lora_dropout=0.0)
    assert train_losses(tmp_path / "b", data, salmonn, 2, per_device_bsz=2, lora_dropout=0.0) == pytest.approx(
        alone, abs=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS, ids=str)
def test_sharding_gives_the_same_losses(
    salmonn: str, small: dict[str, str], make_features: Callable[..., Any], tmp_path: Path, sharding: dict[str, Any]
) -> None:
    """Some rows are text only, so one worker may have audio while the other has none."""
    names = [small[f"{task}.train"] for task in ("asr", "tqa")]
    data = TrainingData(make_features(*names, model_id=salmonn), ())
    flags = {"per_device_bsz": 1, "lora_dropout": 0.0, "max_steps": 4}
    plain = train_losses(tmp_path / "a", data, salmonn, 2, **flags)
    sharded = {**sharding, "save_steps": 2, **flags}
    straight = train_losses(tmp_path / "b", data, salmonn, 2, **sharded)
    assert straight == pytest.approx(plain, abs=1e-4)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / "b" / "adapter")
    assert train_losses(tmp_path / "b", data, salmonn, 2, **sharded) == straight, "both parameter groups are restored"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_stages_learn(run: Run, salmonn: str) -> None:
    """The women of the validation rows are not in the training rows. Untrained weights give no correct answer."""
    flags = {"train_jsonl": manifest("asr.train"), "val_jsonl": manifest("asr.val"), "eval_max_new_tokens": "24"}
    flags |= {"eval_max_rows": "40", "max_steps": "220", "eval_steps": "220", "per_device_bsz": "16", "lr": "3e-3"}
    flags |= {"warmup_steps": "20", "max_grad_norm": "1", "lora_dropout": "0"}
    first = run(**flags)
    second = run("--stage", "2", **{**flags, "ckpt": str(first), "max_steps": "120", "eval_steps": "120"})
    rates = [json.loads((folder / "result.json").read_text())["asr/cer_nospace"] for folder in (first, second)]
    assert rates[1] < rates[0] < 0.7
    assert np.mean(losses(first)[-10:]) < 0.5 * np.mean(losses(first)[:10])
    assert np.mean(losses(second)[-10:]) < np.mean(losses(first)[-10:])


def test_resume_is_exact(data: TrainingData, salmonn: str, tmp_path: Path) -> None:
    straight = train_losses(tmp_path / "a", data, salmonn)
    assert straight[-1] < straight[0]
    assert train_losses(tmp_path / "b", data, salmonn) == straight, "untrained weights follow from the seed"
    for path in (tmp_path / "b" / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 3:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "b" / "adapter")
    assert train_losses(tmp_path / "b", data, salmonn) == straight
    assert all(tensor.equal(tensors(tmp_path / "b")[name]) for name, tensor in tensors(tmp_path / "a").items())
