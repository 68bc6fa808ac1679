"""Adapters that other programs wrote load as PEFT itself loads them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import VoxtralForConditionalGeneration

from voxray.core.content_hash import write_checksums
from voxray.core.errors import RunError
from voxray.models.adapters.lora import CONFIG, OLD_PREFIXES, WEIGHTS, load_adapter, tensor_names

IDS = torch.tensor([[1, 3, 5, 7, 11]])


def base() -> Any:
    return VoxtralForConditionalGeneration.from_pretrained(TINY).eval()


def write(folder: Path, **options: Any) -> None:
    """An adapter with random weights, as plain PEFT writes it."""
    torch.manual_seed(0)
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "original_module" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def rename_as_in_transformers_4(folder: Path) -> None:
    def old(name: str) -> str:
        for before, now in OLD_PREFIXES:
            if name.startswith(f"base_model.model.{now}"):
                return name.replace(now, before, 1)
        return name

    tensors = load_file(folder / WEIGHTS)
    assert any(old(name) != name for name in tensors)
    save_file({old(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, None),
        ({"modules_to_save": ["linear_1", "linear_2"]}, None),
        ({"modules_to_save": ["lm_head"]}, None),
        ({"modules_to_save": ["norm"], "exclude_modules": ".*audio_tower.*"}, None),
        ({}, rename_as_in_transformers_4),
        ({"exclude_modules": ".*audio_tower.*"}, rename_as_in_transformers_4),
        ({}, pickle_weights),
    ],
    ids=["plain", "projector_saved", "lm_head_saved", "norm_saved", "old_names", "old_names_excluded", "pickled"],
)
def test_logits_are_pefts(tmp_path: Path, options: dict[str, Any], change: Callable[[Path], None] | None) -> None:
    write(tmp_path, **options)
    expected = logits(PeftModel.from_pretrained(base(), str(tmp_path)).eval())
    assert not torch.equal(expected, logits(base()))
    if change:
        change(tmp_path)
    model, num_tensors = load_adapter(base(), tmp_path)
    assert torch.equal(logits(model), expected)
    assert num_tensors == len(tensor_names(tmp_path))


def test_a_damaged_bit_is_one_line(tmp_path: Path) -> None:
    write(tmp_path)
    write_checksums(tmp_path)
    load_adapter(base(), tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(RunError, match=f"{tmp_path / WEIGHTS}: damaged"):
        load_adapter(base(), tmp_path)


def test_a_configuration_alone_is_no_adapter(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(RunError, match=f"{tmp_path / WEIGHTS}: is missing"):
        load_adapter(base(), tmp_path)


@pytest.mark.parametrize("values", [{"target_modules": ["nothing"]}, {"r": -1}, {"target_modules": 3}, {"r": "x"}])
def test_a_configuration_that_does_not_fit_is_one_line(tmp_path: Path, values: dict[str, Any]) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **values}))
    with pytest.raises(RunError, match=str(tmp_path)):
        load_adapter(base(), tmp_path)
