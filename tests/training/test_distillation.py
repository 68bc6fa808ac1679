"""--distill_weight: the divergence of the model from its base on the answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, WHISPER
from helpers.adapters import random_adapter
from helpers.training import train

from voxray.audio.augment import SpecAugment
from voxray.batches.collate import collate_packed, collate_training
from voxray.batches.loader import Loader, Masking
from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings, WhisperSettings
from voxray.core.errors import SettingsError
from voxray.features.reader import Features
from voxray.models.adapters.lora import load_adapter
from voxray.models.adapters.lora_scale import check_base_is_there, scale_lora, without_lora
from voxray.models.interface import IGNORED
from voxray.models.parts import losses
from voxray.models.registry import get_family
from voxray.recipes.run_stage import build_plan
from voxray.recipes.stages import multitask_stage
from voxray.recipes.training_data import TrainingData
from voxray.training.engine import DataParallel
from voxray.training.loop import pass_losses
from voxray.training.records import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILY, CPU = get_family(TINY), torch.device("cpu")


@pytest.fixture(scope="module")
def data(small, make_features) -> TrainingData:
    return TrainingData(make_features(*(small[f"{task}.train"] for task in ("asr", "sqa", "tqa"))), ())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return random_adapter(tmp_path_factory.mktemp("adapter"), std=0.1)


def load(adapter: Path | None = None) -> Any:
    model = FAMILY.load_model(TINY, dtype=torch.float32, device=CPU)
    return load_adapter(model, adapter)[0] if adapter else model


def settings(output_dir: Path, **changes: Any) -> MultitaskSettings:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "output_dir": str(output_dir), "lr": 1e-2}
    values |= {"max_steps": 6, "per_device_bsz": 4, "grad_accum": 2, "lora_dropout": 0.1, "distill_weight": 0.5}
    return MultitaskSettings.model_validate({**values, **changes})


def records(run_dir: Path) -> list[dict[str, float]]:
    return list(read_metrics(run_dir, "train"))


@pytest.mark.parametrize("collate", [collate_training, collate_packed])
@pytest.mark.parametrize("max_logits", [losses.MAX_LOGITS, 5000])
def test_the_divergence_is_that_of_the_definition(data, adapter, tmp_path, collate, max_logits, monkeypatch):
    """Sum of p log(p / q) over the whole vocabulary, from logits of transformers, and its gradient."""
    monkeypatch.setattr(losses, "MAX_LOGITS", max_logits)
    features, front_end, model = Features(data.train), FAMILY.front_end(TINY), load(adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    rows = [features.row(number) for number in range(0, len(features), 7)]
    engine = DataParallel(model, FAMILY, Worker(), lr=0.1, weight_decay=0.0)
    loss_T, divergence = pass_losses(engine, model, collate(rows, front_end), settings(tmp_path))
    padded = collate_training(rows, front_end)
    inputs = {name: padded[name] for name in ("input_ids", "attention_mask", "input_features") if name in padded}
    is_answer = (padded["labels"] != IGNORED).roll(-1, 1)
    tuned_NV = model(**inputs).logits[is_answer].log_softmax(-1)
    with torch.no_grad():
        base_NV = load()(**inputs).logits[is_answer].log_softmax(-1)
    expected = (base_NV.exp() * (base_NV - tuned_NV)).sum()
    torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-4)
    labels_N = padded["labels"][padded["labels"] != IGNORED]
    cross_entropy = torch.nn.functional.nll_loss(tuned_NV, labels_N, reduction="sum")
    torch.testing.assert_close(loss_T.sum(), cross_entropy, rtol=1e-4, atol=1e-4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(divergence, trained), torch.autograd.grad(expected, trained), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-5


@pytest.mark.parametrize("batching", ["fixed", "packed"])
def test_only_replayed_rows_are_distilled(small, make_features, adapter, tmp_path, batching):
    """The batches of the loader: the divergence is that of their replayed rows alone."""
    new, replayed = make_features(small["asr.train"], small["tqa.train"])
    features, front_end, model = Features((new, replayed), num_replay_sets=1), FAMILY.front_end(TINY), load(adapter)
    run_settings = settings(tmp_path, batching=batching, replay_jsonl=["x"], replay_share=0.4, pack_tokens=600)
    rows = np.arange(len(features))
    plan = build_plan(multitask_stage(run_settings), run_settings, features, rows, 2)
    loader = Loader(features, front_end, plan, Worker(), 0, Masking(SpecAugment(), 0), pin_memory=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    engine = DataParallel(model, FAMILY, Worker(), lr=0.1, weight_decay=0.0)
    num_replayed = 0
    for _, microbatches in loader.steps(0, 3):
        for microbatch, batch in microbatches:
            expected, numbers = torch.zeros(()), [row for row in microbatch.rows if row >= features.first_replay]
            if numbers:
                alone = collate_training([features.row(int(row)) for row in numbers], front_end)
                expected = pass_losses(engine, model, alone, run_settings)[1]
            _, divergence = pass_losses(engine, model, batch, run_settings)
            torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-4)
            num_replayed += len(numbers)
    assert num_replayed


def test_a_larger_weight_stays_closer_to_the_base(data, tmp_path):
    divergences = {}
    for weight in (0.01, 10.0):
        run_dir = tmp_path / str(weight)
        run_dir.mkdir()
        train(settings(run_dir, distill_weight=weight, max_steps=12), run_dir, data)
        values = [record["distill_kl"] for record in records(run_dir)]
        assert abs(values[0]) < 1e-6, "LoRA begins as the base"
        divergences[weight] = np.mean(values[-4:])
    assert divergences[10.0] < 0.3 * divergences[0.01]


def test_without_the_flag_nothing_changes(data, tmp_path):
    """The loss is the same number with a weight so small that it rounds away."""
    values = []
    for weight in (0.0, 1e-30):
        run_dir = tmp_path / str(weight)
        run_dir.mkdir()
        train(settings(run_dir, distill_weight=weight), run_dir, data)
        values.append([record["loss"] for record in records(run_dir)])
    assert values[0] == values[1]


def test_a_run_resumes_exactly(data, tmp_path):
    weights = []
    for name, ends in (("whole", [6]), ("parts", [3, 6])):
        run_dir = tmp_path / name
        run_dir.mkdir()
        for end in ends:
            train(settings(run_dir, max_steps=end, lr_schedule="constant"), run_dir, data)
        weights.append((run_dir / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_model_is_as_before_after_a_pass_of_its_base(adapter):
    """Also LoRA that this run keeps frozen."""
    model = load(adapter).train()
    model.base_model.model.model.audio_tower.eval()
    modes = [(module.training, getattr(module, "disable_adapters", None)) for module in model.modules()]
    with without_lora(model):
        assert not any(module.training for module in model.modules())
    assert [(module.training, getattr(module, "disable_adapters", None)) for module in model.modules()] == modes
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
def test_scaled_lora_adds_a_share(adapter, scale):
    """PEFT's weights, scaled by hand."""
    model, plain = load(adapter), load(adapter)
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    layer, reference = model.get_submodule(name), plain.get_submodule(name)
    states = torch.randn(3, layer.in_features)
    expected = reference.base_layer(states) + scale * (reference(states) - reference.base_layer(states))
    scale_lora(model, adapter, "--scale", scale)
    torch.testing.assert_close(layer(states), expected)


def test_whisper_is_distilled_too(small, make_features, tmp_path):
    features = make_features(small["asr.train"], model_id=WHISPER)
    values = {"train_jsonl": "unused", "model_id": WHISPER, "output_dir": str(tmp_path), "num_workers": 0}
    values |= {"max_steps": 8, "lr": 1e-2, "per_device_bsz": 4, "distill_weight": 0.5}
    train(WhisperSettings.model_validate(values), tmp_path, TrainingData(features, ()))
    divergences = [record["distill_kl"] for record in records(tmp_path)]
    assert abs(divergences[0]) < 1e-6 < max(divergences)


def test_modules_that_train_as_a_whole_leave_no_base(adapter):
    """As SALMONN's Q-Former does beside LoRA."""
    model = load(adapter)
    check_base_is_there(model, "--distill_weight 1")
    model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(SettingsError, match=r"--distill_weight 1: .*lm_head.weight trains as a whole"):
        check_base_is_there(model, "--distill_weight 1")


def test_full_tuning_has_no_base(tmp_path):
    with pytest.raises(ValueError, match="--distill_weight: --tuning full leaves no base"):
        settings(tmp_path, tuning="full")
