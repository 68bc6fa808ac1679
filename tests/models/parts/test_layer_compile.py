"""--compile: the same losses, gradients and names, and one compilation for all layers and lengths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch._dynamo.utils import counters

from voxray.batches.collate import collate_packed, collate_prompts, collate_training
from voxray.core.errors import RunError
from voxray.features.reader import Features
from voxray.models.adapters.lora import add_lora, save_adapter, trainable_parameters
from voxray.models.registry import get_family
from voxray.training.loop import answer_loss

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY = get_family(TINY)
CPU = torch.device("cpu")


def make_model(*, grad_ckpt: bool = False, quantize: str = "none") -> Any:
    torch.manual_seed(0)
    base = FAMILY.load_model(TINY, dtype=torch.float32, device=CPU, quantize=quantize)
    model = add_lora(base, FAMILY, ("projector", "llm"), model_id=TINY, r=4, alpha=8, dropout=0.1)
    for name, parameter in trainable_parameters(model):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if grad_ckpt:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def loss(model: Any, batch: dict[str, torch.Tensor], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    losses = answer_loss(model, FAMILY, batch, 0.0)
    losses.sum().backward()
    grads = [parameter.grad.flatten() for _, parameter in trainable_parameters(model) if parameter.grad is not None]
    return losses.detach(), torch.cat(grads)


def compare(small: dict[str, str], make_features: Any, folder: Path, layout: str, **options: Any) -> None:
    """Compare compiled and eager on batches of several shapes with dropout, then as saved, then in generation."""
    features = Features(make_features(*(small[f"{task}.train"] for task in ("asr", "sqa", "tqa"))))
    front_end, collate = FAMILY.front_end(TINY), {"packed": collate_packed, "padded": collate_training}[layout]
    eager, compiled = make_model(**options), make_model(**options)
    before = list(compiled.state_dict())
    FAMILY.compile_layers(compiled)
    num_graphs = []
    for seed, rows in enumerate([(0, 13, 30), (1, 2, 14, 15, 31), (3, 16, 32, 33), (4, 17, 5, 18, 6, 19, 34, 35)]):
        stored = [features.row(number) for number in rows]
        expected, expected_grads = loss(eager, collate(stored, front_end), seed)
        losses, grads = loss(compiled, collate(stored, front_end), seed)
        assert (losses - expected).abs().max() / sum(len(row.target_ids) for row in stored) < 1e-5
        assert (grads - expected_grads).abs().max() < 1e-4 * expected_grads.abs().max()
        num_graphs.append(counters["stats"]["unique_graphs"])
    assert num_graphs[0] >= 2, "the layers are compiled, not just the probe"
    assert num_graphs == num_graphs[:1] * 4, "another shape does not compile again"
    assert list(compiled.state_dict()) == before
    for name, model in (("a", eager), ("b", compiled)):
        save_adapter(model, folder / name)
    stored = [(folder / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert stored[0] == stored[1]
    prompts = collate_prompts([features.row(number) for number in (0, 13, 30)], front_end)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": front_end.pad_id}
    answers = [FAMILY.generate(model.eval(), prompts, **options).tolist() for model in (eager, compiled)]
    assert answers[0] == answers[1] and counters["stats"]["unique_graphs"] == num_graphs[-1], (
        "generation compiles nothing"
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_layers_are_captured_once(fresh, without_inductor, small, make_features, tmp_path, layout):
    compare(small, make_features, tmp_path, layout, grad_ckpt=layout == "packed")


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "4bit"])
@pytest.mark.parametrize("grad_ckpt", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compiled_layers_give_the_same_losses(fresh, small, make_features, tmp_path, layout, grad_ckpt, quantize):
    compare(small, make_features, tmp_path, layout, grad_ckpt=grad_ckpt, quantize=quantize)


def test_a_missing_compiler_is_reported_in_one_line(fresh):
    import torch._inductor.config as inductor

    base = FAMILY.load_model(TINY, dtype=torch.float32, device=CPU)
    raises = pytest.raises(RunError, match="--compile: nothing can be compiled on this machine: ")
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), raises as error:
        FAMILY.compile_layers(base)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
