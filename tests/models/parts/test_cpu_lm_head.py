"""The output layer for a few rows, against PyTorch's own product."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from voxray.models.parts import cpu_lm_head as few_rows
from voxray.models.parts.cpu_lm_head import MAX_ROWS, MIN_OUTPUTS, few_rows_linear


@pytest.fixture
def layer() -> torch.nn.Linear:
    return torch.nn.Linear(24, MIN_OUTPUTS).requires_grad_(False)


@torch.inference_mode()
def check(layer: torch.nn.Module, num_rows: int) -> None:
    hidden_BD = torch.randn(num_rows, 24)
    assert torch.allclose(few_rows_linear(layer, hidden_BD), layer(hidden_BD), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 3, 8, MAX_ROWS, MAX_ROWS + 1])
def test_outputs_are_those_of_the_layer(layer, num_rows) -> None:
    check(layer, num_rows)
    assert (layer in few_rows._laid_out) == (num_rows <= MAX_ROWS)


def test_changed_weights_are_seen(layer) -> None:
    check(layer, 2)
    layer.weight.mul_(2)
    check(layer, 2)
    layer.weight = torch.nn.Parameter(torch.randn(MIN_OUTPUTS, 24), requires_grad=False)
    check(layer, 2)


def test_what_is_no_plain_frozen_layer_is_called_as_it_is(layer) -> None:
    """LoRA on it, training, half precision, weights that a hook fetches, a gradient that is asked for."""
    holder = torch.nn.ModuleDict({"lm_head": layer})
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), holder)
    check(adapted["lm_head"], 2)
    check(torch.nn.Linear(24, MIN_OUTPUTS), 2)
    hooked = torch.nn.Linear(24, MIN_OUTPUTS).requires_grad_(False)
    hooked.register_forward_pre_hook(lambda *_: None)
    check(hooked, 2)
    assert not {adapted["lm_head"], hooked, layer} & set(few_rows._laid_out)
    hidden_BD = torch.randn(2, 24, requires_grad=True)
    few_rows_linear(layer, hidden_BD).sum().backward()
    assert hidden_BD.grad is not None
