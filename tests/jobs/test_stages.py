"""The first two stages of Voxtral as jobs, and adapters that pass from stage to stage."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, write_rows
from helpers.running import load_job, parse_only
from safetensors.torch import load_file, save_file

from voxray.commands import train as command
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings
from voxray.core.errors import RunError, SettingsError
from voxray.recipes import run_stage
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

ROLE = {"train_text": "llm", "train_asr_adapter": "projector"}
"""The role with LoRA."""
SETTINGS = {"train_text": TextSettings, "train_asr_adapter": AsrAdapterSettings}
TASK = {"train_text": "tqa", "train_asr_adapter": "asr"}
SAME_LORA = ("--lora_r", "4", "--lora_alpha", "8")


@pytest.fixture(scope="module")
def run(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run a training job in this process, two steps on a few rows of every task; returns the run folder."""
    folder = tmp_path_factory.mktemp("stages")

    def run(name: str, *flags: str, into: str = "", **more: str) -> Path:
        out = folder / (into or f"run{len(list(folder.iterdir()))}")
        values = {"model_id": TINY, "num_workers": "0", "features_dir": str(folder / "features"), "max_steps": "2"}
        values |= {"train_jsonl": ",".join(small[f"{task}.train"] for task in ("asr", "sqa", "tqa")), "lr": "1e-2"}
        values |= {"per_device_bsz": "2", "grad_accum": "1", "rows_per_shard": "8", "output_dir": str(out), **more}
        argv = [word for key, value in values.items() for word in (f"--{key}", value)]
        command.run_training(parse_only(name, [*argv, *flags]))
        return out

    return run


@pytest.fixture(scope="module")
def first_stage(run: Callable[..., Path]) -> Path:
    return run("train_text", *SAME_LORA, into="first")


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def part(weights: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights.items() if module in name}


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir, "train")]


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]


# one stage


def test_defaults_of_the_stages_are_the_published_ones() -> None:
    required = ["--train_jsonl", "t.jsonl", "--output_dir", "o"]
    text, adapter = parse_only("train_text", required), parse_only("train_asr_adapter", required)
    names = ("lora_r", "lora_alpha", "lr", "epochs")
    assert [getattr(text, name) for name in names] == [16, 32, 2e-4, 3]
    assert [getattr(adapter, name) for name in names] == [8, 16, 1e-4, 2]
    assert (adapter.per_device_bsz, adapter.grad_accum) == (8, 4)
    assert not {"freeze_whisper", "task_weights", "variants", "freq_masks"} & set(TextSettings.model_fields)
    assert not {"freeze_whisper", "task_weights"} & set(AsrAdapterSettings.model_fields)
    assert set(AsrAdapterSettings.model_fields) < set(MultitaskSettings.model_fields)


@pytest.mark.parametrize("name", ROLE)
def test_a_stage_trains_its_role_on_its_task(name: str, run: Callable[..., Path], small: dict[str, str]) -> None:
    held_out = ",".join(small[f"{task}.val"] for task in ("asr", "tqa"))
    out = run(name, "--eval_max_new_tokens", "4", "--lora_r", "4", val_jsonl=held_out)
    counts = json.loads((out / "parameters.json").read_text())
    assert {role for role, entry in counts.items() if entry["trainable"]} == {ROLE[name]}
    module = {"llm": "language_model", "projector": "multi_modal_projector"}[ROLE[name]]
    weights = tensors(out)
    assert weights and all(module in key for key in weights)
    assert any(tensor.abs().sum() > 0 for key, tensor in weights.items() if "lora_B" in key)
    records = read_metrics(out, "train")
    assert {key for record in records for key in record if key.startswith("loss/")} == {f"loss/{TASK[name]}"}
    groups = {key.partition("/")[0] for key in read_metrics(out, "validation")[-1] if "/" in key}
    assert groups == {TASK[name], "overall"}
    lost = ledger(out)
    assert {line["reason"] for line in lost} == {"other_task"} and len(lost) == 2 * 12 + 4
    assert all(f"trains on {TASK[name]}" in line["message"] for line in lost)
    assert f"left out: {len(lost)} rows of other tasks" in (out / "train.log").read_text()


@pytest.mark.parametrize("name", ROLE)
def test_manifests_without_rows_of_the_task_are_refused(
    name: str, run: Callable[..., Path], small: dict[str, str]
) -> None:
    keys = {
        "train_text": "tqa: instruction, output; text_chat: messages",
        "train_asr_adapter": "asr: audio_path, transcript",
    }[name]
    with pytest.raises(RunError, match=rf"^--train_jsonl: holds no row of the task .*\({keys}\)$"):
        run(name, train_jsonl=small["sqa.train"])
    with pytest.raises(RunError, match="no row is within --max_len 2 tokens"):
        run(name, "--max_len", "2")


@pytest.mark.parametrize("name", ROLE)
def test_flags_reach_the_recipe(name: str, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their effect is the same code for all recipes, which test_training_flags.py tests."""
    received: list[Any] = []

    def fake_train(run: Any, data: Any) -> dict[str, Any]:
        received.append(run.settings)
        return {"steps": 2, "finished": True}

    monkeypatch.setattr(command, "train", fake_train)
    flags = "--lora_dropout 0.3 --weight_decay 0.1 --eval_steps 7 --seed 3 --debug --grad_ckpt --store pcm16"
    out = run(name, *flags.split())
    (settings,) = received
    assert (settings.lora_dropout, settings.weight_decay, settings.eval_steps, settings.seed) == (0.3, 0.1, 7, 3)
    assert settings.debug and settings.grad_ckpt and settings.store == "pcm16"
    assert json.loads((out / "settings.json").read_text()) == json.loads(settings.model_dump_json())
    unpickled = pickle.loads(pickle.dumps(settings))
    assert type(unpickled) is SETTINGS[name] and unpickled == settings, "as sent to Ray Train's workers"


def test_stored_encoder_outputs_give_the_same_losses(run: Callable[..., Path]) -> None:
    mel = run("train_asr_adapter")
    stored = run("train_asr_adapter", "--store", "encoder", "--cache_dtype", "float32")
    assert losses(mel) == losses(stored)
    with pytest.raises(SystemExit):
        run("train_asr_adapter", "--store", "encoder", "--time_masks", "1")
    masked = run("train_asr_adapter", "--time_masks", "2", "--time_mask_share", "0.5")
    assert losses(masked) != losses(mel)
    assert "encoder" not in json.loads((stored / "parameters.json").read_text()), "its weights are not loaded"


def test_a_frozen_language_model_is_recomputed_in_eval_mode(
    run: Callable[..., Path], small: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients pass through it to the projector, so --grad_ckpt saves its activations. Its dropout stays off."""
    calls, modes, fit = [0], [], run_stage.fit

    def recording_fit(state: Any, *args: Any) -> int:
        named = dict(state.model.named_modules())
        layer = next(named[name] for name in named if name.endswith("language_model.layers.0.self_attn"))

        def count(*_: Any) -> None:
            calls[0] += torch.is_grad_enabled()

        with layer.register_forward_pre_hook(count):
            step = fit(state, *args)
        modes.append({name: module.training for name, module in named.items()})
        return step

    monkeypatch.setattr(run_stage, "fit", recording_fit)
    args = ("train_asr_adapter", "--eval_max_new_tokens", "2", "--eval_max_rows", "1")
    plain = run(*args, val_jsonl=small["asr.val"])
    plain_calls, calls[0] = calls[0], 0
    recomputed = run(*args, "--grad_ckpt", val_jsonl=small["asr.val"])
    assert calls[0] == 2 * plain_calls > 0
    assert losses(plain) == losses(recomputed)
    for of_run in modes:
        layers = [name for name in of_run if "language_model" in name and name.endswith(("_proj", "self_attn"))]
        assert layers and not any(of_run[name] for name in layers), "also after a validation"
        assert all(training for name, training in of_run.items() if "multi_modal_projector" in name)


def test_a_manifest_of_an_old_cache_is_refused(run: Callable[..., Path], tmp_path: Path) -> None:
    row = {"input_features": "cache/000.pt", "labels": "cache/000.labels.pt", "transcript": "x"}
    with pytest.raises(RunError, match=r"train_data\.cached\.jsonl.*jobs/featurize\.py --manifest"):
        run("train_asr_adapter", train_jsonl=write_rows(tmp_path / "train_data.cached.jsonl", [row]))


# from stage to stage


def test_init_adapter_is_loaded_frozen_and_recorded(run: Callable[..., Path], first_stage: Path) -> None:
    """The result has the tensors of the earlier stage, bit for bit, and the new ones, all on the plain base."""
    out = run("train_asr_adapter", *SAME_LORA, "--lora_dropout", "0.3", init_adapter=str(first_stage))
    before, after = tensors(first_stage), tensors(out)
    assert set(part(after, "language_model")) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    trained = part(after, "multi_modal_projector")
    assert len(trained) == len(after) - len(before) == 4
    assert any(tensor.abs().sum() > 0 for name, tensor in trained.items() if "lora_B" in name)
    counts = json.loads((out / "parameters.json").read_text())
    assert counts["llm"]["trainable"] == 0 < counts["projector"]["trainable"]
    recorded = json.loads((out / "provenance.json").read_text())["init_adapter"]
    assert (recorded["folder"], recorded["roles"], recorded["base"]) == (str(first_stage / "adapter"), ["llm"], TINY)
    assert len(recorded["sha256"]) == 64
    log = (out / "train.log").read_text()
    assert f"starts from {first_stage / 'adapter'}: {len(before)} tensors of llm; frozen: llm" in log
    assert losses(out)[0] != losses(run("train_asr_adapter", *SAME_LORA))[0]


def test_init_adapter_continues_to_train(run: Callable[..., Path], first_stage: Path) -> None:
    """With steps too small to change a float32, the result equals the initial adapter."""
    out = run("train_text", *SAME_LORA, init_adapter=str(first_stage / "checkpoints" / "step-000002"), lr="1e-30")
    before, after = tensors(first_stage), tensors(out)
    assert set(before) == set(after) and all(torch.equal(after[name], before[name]) for name in before)
    trained = tensors(run("train_text", *SAME_LORA, init_adapter=str(first_stage)))
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def test_resuming_a_run_with_init_adapter_is_exact(run: Callable[..., Path], first_stage: Path) -> None:
    flags = (*SAME_LORA, "--lora_dropout", "0.2", "--lr_schedule", "constant", "--init_adapter", str(first_stage))
    straight = run("train_multitask", *flags, max_steps="4")
    run("train_multitask", *flags, into="resumed", max_steps="2")
    resumed = run("train_multitask", *flags, into="resumed", max_steps="4")
    assert losses(resumed) == losses(straight) and len(losses(resumed)) == 4
    expected, weights = tensors(straight), tensors(resumed)
    assert set(weights) == set(expected) and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_init_adapters_that_do_not_fit_are_refused(
    run: Callable[..., Path], first_stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = r"has rank 4 and alpha 8, this run --lora_r 8 and --lora_alpha 16; give --lora_r 4 --lora_alpha 8"
    with pytest.raises(SettingsError, match=rank):
        run("train_asr_adapter", init_adapter=str(first_stage))
    with pytest.raises(RunError, match=r"--init_adapter .*nowhere: no adapter here"):
        run("train_text", init_adapter=str(tmp_path / "nowhere"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("[")
    with pytest.raises(RunError, match="cannot read the adapter's configuration"):
        run("train_text", init_adapter=str(tmp_path))
    config = json.loads((first_stage / "adapter" / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    (adapter / "adapter_model.safetensors").write_bytes(
        (first_stage / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(RunError, match="the adapter has use_rslora True, not False"):
        run("train_text", *SAME_LORA, init_adapter=str(tmp_path))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "bias": "lora_only"}))
    with monkeypatch.context() as patch:  # what follows is refused before features are computed
        patch.setattr(command, "training_data", lambda *args, **options: pytest.fail("computes features"))
        with pytest.raises(SettingsError, match="was trained with bias lora_only, and voxray trains no biases"):
            run("train_text", *SAME_LORA, init_adapter=str(tmp_path))
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        q_layers = part(tensors(first_stage), "q_proj")
        save_file(q_layers, adapter / "adapter_model.safetensors")
        with pytest.raises(SettingsError, match="has LoRA on q_proj of the llm, this run on down_proj, gate"):
            run("train_text", *SAME_LORA, init_adapter=str(tmp_path))
        with pytest.raises(SettingsError, match="--init_adapter: holds LoRA weights, which --tuning full does not"):
            run("train_text", "--tuning", "full", init_adapter=str(first_stage))
    (adapter / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match="cannot read the adapter"):
        run("train_text", *SAME_LORA, init_adapter=str(tmp_path))
    with_encoder = run("train_multitask", *SAME_LORA, "--no_freeze_whisper")
    with pytest.raises(SettingsError, match=r"--store encoder: --init_adapter .* changes the encoder"):
        run("train_asr_adapter", *SAME_LORA, "--store", "encoder", init_adapter=str(with_encoder))


@pytest.mark.slow
def test_the_three_stages_in_a_row(
    run: Callable[..., Path],
    first_stage: Path,
    small: dict[str, str],
    tmp_path: Path,
    evaluation_here: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """train_text -> train_asr_adapter -> train_multitask -> evaluate -> infer, each with its job."""
    second = run("train_asr_adapter", *SAME_LORA, init_adapter=str(first_stage))
    third = run("train_multitask", *SAME_LORA, init_adapter=str(second))
    assert set(tensors(third)) == set(tensors(second)) > set(tensors(first_stage))
    monkeypatch.chdir(tmp_path)
    held_out = ",".join(small[f"{task}.val"] for task in ("asr", "tqa"))
    flags = ["--lora_dir", str(third), "--val_jsonl", held_out, "--gen_max_new_tokens", "8", "--output_dir", "e"]
    load_job("evaluate").main(flags)
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert metrics["asr"]["cer"]["n"] == metrics["tqa"]["rouge_l"]["n"] == 4 and "sqa" not in metrics
    capsys.readouterr()
    load_job("infer").main(["--lora_dir", str(third), "--jsonl", small["tqa.val"], "--max_new_tokens", "4"])
    output = capsys.readouterr()
    assert f" {len(tensors(third))} tensors" in output.err and len(output.out.splitlines()) >= 4


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", ROLE)
def test_a_stage_runs_in_two_processes(local_ray: None, name: str, run: Callable[..., Path]) -> None:
    """Losses do not depend on how a step is divided, so one process gives the same losses."""
    two = run(name, num_workers="2", lora_dropout="0", per_device_bsz="1")
    one = run(name, lora_dropout="0")
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
