"""Base weights in 16, 8 and 4 bits, and training on them, with the tiny Voxtral on the CPU."""

import hashlib
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from helpers import processes

from voxray.batches.collate import collate_training
from voxray.config.train import MultitaskSettings
from voxray.core.errors import RunError
from voxray.features.reader import Features
from voxray.models.adapters.lora import add_lora, load_adapter, trainable_parameters
from voxray.models.interface import IGNORED
from voxray.models.registry import get_family
from voxray.models.voxtral.family import Voxtral
from voxray.recipes.training_data import TrainingData
from voxray.training.loop import answer_loss

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY, CPU = Voxtral(), torch.device("cpu")
QUANTIZED = ("8bit", "4bit")


def load(quantize: str = "none", dtype: torch.dtype = torch.float32) -> Any:
    return FAMILY.load_model(TINY, dtype=dtype, device=CPU, quantize=quantize)


@pytest.fixture(scope="module")
def data(small: dict[str, str], make_features: Callable) -> TrainingData:
    return TrainingData(make_features(small["asr.train"], small["tqa.train"]), make_features(small["tqa.val"]))


@pytest.fixture(scope="module")
def batch(data: TrainingData) -> dict[str, torch.Tensor]:
    features = Features(data.train)
    return collate_training([features.row(number) for number in (0, 5, 14, 20)], get_family(TINY).front_end(TINY))


def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return answer_loss(model, FAMILY, batch, 0.0).sum() / (batch["labels"] != IGNORED).sum()


@pytest.mark.parametrize(("kind", "stored"), [("8bit", torch.int8), ("4bit", torch.uint8)])
def test_only_the_language_models_layers_are_quantized(kind: str, stored: torch.dtype) -> None:
    plain, model = load(), load(kind)
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {name for name in linear if ".language_model." in name}
    assert len(expected) == 2 * 7 and len(linear) > len(expected)
    quantized = {name for name, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes")}
    assert quantized == expected
    kinds = {
        (name.removesuffix(".weight") in expected, parameter.dtype, parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    assert kinds == {(True, stored, False), (False, torch.float32, False)}


def test_4_bits_are_nf4_with_quantized_scales_and_the_requested_compute_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = load("4bit", dtype).model.language_model.layers[0].mlp.up_proj
        assert (layer.weight.quant_type, layer.weight.quant_state.nested) == ("nf4", True)
        assert layer.compute_dtype == dtype


def test_quantized_weights_are_smaller_and_the_loss_is_close(batch: dict[str, torch.Tensor]) -> None:
    def num_bytes(model: Any) -> int:
        layers = model.model.language_model.layers
        return sum(parameter.nbytes for name, parameter in layers.named_parameters() if "norm" not in name)

    exact = float(loss(load(), batch))
    full = num_bytes(load())
    for kind, share in (("8bit", 4), ("4bit", 8)):
        model = load(kind)
        quantized = float(loss(model, batch))
        print(f"{kind}: loss {quantized:.5f}, float32 {exact:.5f}")
        assert num_bytes(model) * share == full
        assert quantized != exact and quantized == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("tuning", ["lora", "dora"])
def test_gradients_flow_to_float32_adapters_under_checkpointing(
    kind: str, tuning: str, batch: dict[str, torch.Tensor]
) -> None:
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        base = load(kind)
        model = add_lora(
            base, FAMILY, ("projector", "llm"), model_id=TINY, r=4, alpha=8, dropout=0.0, tuning=tuning
        ).train()
        if recompute:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss(model, batch).backward()
        trained = dict(trainable_parameters(model))
        assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
        assert all("lora_" in name for name in trained)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
        grads.append(torch.cat([p.grad.flatten() for name, p in trained.items() if "lora_B" in name]))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-7)


def settings(output_dir: Path, **changes: Any) -> MultitaskSettings:
    values = {"train_jsonl": "unused", "model_id": TINY, "num_workers": 0, "lora_dropout": 0.1, "lr": 3e-3}
    values |= {"eval_steps": 2, "eval_max_rows": 1, "eval_max_new_tokens": 2}
    values |= {"max_steps": 6, "save_steps": 3, "per_device_bsz": 3, "output_dir": str(output_dir)}
    return MultitaskSettings.model_validate({**values, **changes})


def sha(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "flags",
    [
        {"quantize": "8bit"},
        {"quantize": "4bit"},
        pytest.param({"quantize": "4bit", "bf16": True, "grad_ckpt": True}, marks=pytest.mark.slow),
        {"fp16": True},
        {"tuning": "dora"},
        {"tuning": "rslora"},
        {"tuning": "full", "lr": 3e-4},
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
def test_runs_resume_exactly_and_learn(data: TrainingData, tmp_path: Path, flags: dict[str, Any]) -> None:
    """3 steps, a restart and 3 more steps equal 6 steps bit for bit, for every kind of base and tuning.

    The validation after step 2 must change nothing: bitsandbytes would repack 4-bit weights at the first inference.
    """
    straight = processes.run(settings(tmp_path / "a", **flags), data)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000006")
    shutil.rmtree(tmp_path / "b" / "adapter")
    resumed = processes.run(settings(tmp_path / "b", **flags), data)
    assert [record["step"] for record in resumed] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in straight] == [record["loss"] for record in resumed]
    assert sha(tmp_path / "a") == sha(tmp_path / "b")
    features, front_end = Features(data.train), get_family(TINY).front_end(TINY)
    batch = collate_training([features.row(number) for number in range(0, 24, 2)], front_end)
    dtype = torch.bfloat16 if flags.get("bf16") else torch.float16 if flags.get("fp16") else torch.float32
    with torch.no_grad():
        before = loss(load(flags.get("quantize", "none"), dtype), batch)
        tuned, num_tensors = load_adapter(load(flags.get("quantize", "none"), dtype), tmp_path / "a" / "adapter")
        after = loss(tuned, batch)
    print(f"{flags}: {float(before):.4f} -> {float(after):.4f}, {num_tensors} tensors")
    assert after < before


def test_missing_bitsandbytes_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match="--quantize 4bit: needs bitsandbytes, which is not installed"):
        load("4bit")
    monkeypatch.undo()
    assert load("none") is not None
