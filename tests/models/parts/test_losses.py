"""Cross entropy of answer tokens, of all logits at a time and in chunks."""

from collections.abc import Iterator

import pytest
import torch
from helpers.device_reads import DeviceReads

from voxray.models.parts import losses
from voxray.models.parts.losses import TokenLosses

POSITIONS, WIDTH, VOCABULARY = 100, 16, 50


@pytest.fixture
def inputs() -> Iterator[tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]]:
    """Output layer, states_ND and labels_N."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    states_ND = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    yield layer, states_ND, torch.randint(VOCABULARY, (POSITIONS,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunks_give_the_losses_and_gradients_of_all_logits(
    inputs: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor], smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, states_ND, labels_N = inputs
    expected = torch.nn.functional.cross_entropy(
        layer(states_ND), labels_N, reduction="none", label_smoothing=smoothing
    )
    weights_N = torch.rand(POSITIONS)
    expected_grads = torch.autograd.grad((expected * weights_N).sum(), (states_ND, layer.weight))
    monkeypatch.setattr(losses, "MAX_LOGITS", 16 * VOCABULARY)
    ours = TokenLosses(labels_N, smoothing)(layer, states_ND)
    assert torch.allclose(ours, expected, atol=1e-6)
    grads = torch.autograd.grad((ours * weights_N).sum(), (states_ND, layer.weight))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.allclose(grad, expected_grad, atol=1e-5)


@pytest.mark.parametrize(
    ("max_logits", "in_chunks", "calls"),
    [(16 * VOCABULARY, True, 7), (100 * VOCABULARY, True, 1), (99 * VOCABULARY, True, 2), (16 * VOCABULARY, False, 1)],
)
def test_the_output_layer_is_called_as_often_as_there_are_chunks(
    inputs: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor],
    max_logits: int,
    in_chunks: bool,
    calls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, states_ND, labels_N = inputs
    sizes: list[int] = []
    layer.register_forward_hook(lambda module, given, output: sizes.append(output.numel()))
    monkeypatch.setattr(losses, "MAX_LOGITS", max_logits)
    with torch.no_grad(), DeviceReads() as counts:
        TokenLosses(labels_N, in_chunks=in_chunks)(layer, states_ND)
    assert len(sizes) == calls and sum(sizes) == POSITIONS * VOCABULARY
    assert not in_chunks or max(sizes) <= max_logits
    assert not counts.reads
