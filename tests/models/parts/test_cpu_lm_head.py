"""The output layer for a few rows, against PyTorch's own product."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from voxray.models.parts import cpu_lm_head
from voxray.models.parts.cpu_lm_head import MAX_ROWS, MIN_OUTPUTS, few_rows_linear


@pytest.fixture
def layer() -> torch.nn.Linear:
    return torch.nn.Linear(24, MIN_OUTPUTS).requires_grad_(False)


@torch.inference_mode()
def check(layer: torch.nn.Module, num_rows: int) -> None:
    hidden_BD = torch.randn(num_rows, 24)
    assert torch.allclose(few_rows_linear(layer, hidden_BD), layer(hidden_BD), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 3, 8, MAX_ROWS, MAX_ROWS + 1])
def test_outputs_equal_the_layers_outputs(layer, num_rows) -> None:
    check(layer, num_rows)
    assert (layer in cpu_lm_head._reordered_weights) == (num_rows <= MAX_ROWS)


def test_changed_weights_are_noticed(layer) -> None:
    check(layer, 2)
    layer.weight.mul_(2)
    check(layer, 2)
    layer.weight = torch.nn.Parameter(torch.randn(MIN_OUTPUTS, 24), requires_grad=False)
    check(layer, 2)


def test_other_layers_are_called_as_usual(layer) -> None:
    """With LoRA, trainable, with a hook that fetches the weights, or with an input that requires gradients."""
    holder = torch.nn.ModuleDict({"lm_head": layer})
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), holder)
    check(adapted["lm_head"], 2)
    check(torch.nn.Linear(24, MIN_OUTPUTS), 2)
    hooked = torch.nn.Linear(24, MIN_OUTPUTS).requires_grad_(False)
    hooked.register_forward_pre_hook(lambda *_: None)
    check(hooked, 2)
    assert not {adapted["lm_head"], hooked, layer} & set(cpu_lm_head._reordered_weights)
    hidden_BD = torch.randn(2, 24, requires_grad=True)
    few_rows_linear(layer, hidden_BD).sum().backward()
    assert hidden_BD.grad is not None
