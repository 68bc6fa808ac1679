"""Products of 16-bit layers in float32, against PyTorch's own and against float64."""

import pytest
import torch
from conftest import TINY

from voxray.config.train import MultitaskSettings
from voxray.core.manifest import samples_at
from voxray.features.extract import Extractor, FeatureSpec
from voxray.generation.generate import SamplingParams
from voxray.generation.model import InferenceConfig, load_model
from voxray.models.parts import cpu_16bit
from voxray.models.parts.cpu_16bit import Float32Products, has_arithmetic, use_float32_products
from voxray.models.voxtral.family import Voxtral
from voxray.recipes.build_model import build_model
from voxray.recipes.run_context import RunContext

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def old_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_16bit, "has_arithmetic", lambda dtype: dtype not in DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(40,), (3, 20), (2, 5)])
@pytest.mark.parametrize("at_a_time", [1 << 24, 200])
def test_results_and_gradients(
    monkeypatch: pytest.MonkeyPatch, old_cpu: None, dtype: torch.dtype, rows: tuple[int, ...], at_a_time: int
) -> None:
    """Nearer to float64 than PyTorch's kernel or as near, in slices of the weights or in one piece."""
    monkeypatch.setattr(cpu_16bit, "WEIGHTS_AT_A_TIME", at_a_time)
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 30).to(dtype).requires_grad_(False)
    input, upstream = torch.randn(*rows, 48).to(dtype), torch.randn(*rows, 30).to(dtype)
    exact_input = input.double().requires_grad_()
    exact = torch.nn.functional.linear(exact_input, layer.weight.double(), layer.bias.double())
    exact.backward(upstream.double())
    errors = {}
    for name in ("own", "float32"):
        if name == "float32":
            use_float32_products(layer)
            assert type(layer) is Float32Products
        given = input.clone().requires_grad_()
        output = layer(given)
        output.backward(upstream)
        assert output.dtype == given.grad.dtype == dtype and torch.equal(output, layer(input)), "with and without grad"
        errors[name] = [(output - exact).abs().max(), (given.grad - exact_input.grad).abs().max()]
    assert all(new <= old * 1.01 + 1e-9 for new, old in zip(errors["float32"], errors["own"], strict=True))


def test_which_layers(old_cpu: None) -> None:
    model = Voxtral().load_model(TINY, dtype=torch.bfloat16, device=torch.device("cpu"))
    trained = model.model.language_model.layers[0].self_attn.q_proj
    trained.weight.requires_grad_(True)
    use_float32_products(model)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert {type(module) for module in linears if module is not trained} == {Float32Products}
    assert type(trained) is torch.nn.Linear
    full = Voxtral().load_model(TINY, dtype=torch.float32, device=torch.device("cpu"))
    use_float32_products(full)
    assert not any(isinstance(module, Float32Products) for module in full.modules())


def test_jobs_use_them(old_cpu: None, small: dict[str, str]) -> None:
    """Training, answering and the stored outputs of the encoder, which have to be equal to those in training."""
    settings = MultitaskSettings(model_id=TINY, train_jsonl=(small["asr.train"],), output_dir="unused", bf16=True)
    trained, _ = build_model(RunContext.create(settings))
    answering, _ = load_model(InferenceConfig(TINY, "", SamplingParams(1), 1, bf16=True))
    extractor = Extractor(TINY, FeatureSpec(store="encoder", bf16=True))
    [sample] = samples_at({f"{small['asr.train']}:1": [0]})
    extractor.encode(extractor.sample_rows(sample)[0])
    for model in (trained, answering, extractor._encoder):
        frozen = [
            each for each in model.modules() if isinstance(each, torch.nn.Linear) and not each.weight.requires_grad
        ]
        assert {type(each) for each in frozen} == {Float32Products}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64"}, True),
        ({}, True),
    ],
)
def test_what_the_cpu_says(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_arithmetic(torch.bfloat16) is expected and has_arithmetic(torch.float32)
