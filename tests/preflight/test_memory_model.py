"""The memory model compared with PyTorch's allocator, bitsandbytes' layers, and the published size of Voxtral Mini."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, WHISPER

from voxray.config.salmonn import SalmonnSettings
from voxray.config.train import AsrAdapterSettings, MultitaskSettings, TextSettings, TrainSettings, WhisperSettings
from voxray.models.adapters.lora import add_lora, count_parameters, quantized_layers, train_fully
from voxray.models.hf_files import build_on_meta
from voxray.models.registry import get_family
from voxray.models.voxtral.family import Voxtral
from voxray.models.weight_sizes import weight_bytes
from voxray.preflight.allocations import measure_allocations
from voxray.preflight.findings import Findings
from voxray.preflight.fit_settings import SettingsFitter
from voxray.preflight.memory import MemoryModel, Training
from voxray.preflight.meta_model import build_meta_model
from voxray.preflight.pack_sizes import current_size
from voxray.preflight.rows import read_rows
from voxray.preflight.shapes import ComputeConfig, PackShape
from voxray.preflight.trial_steps import TrialRunner, stored_tensors
from voxray.recipes.run_context import RunContext

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 0.2
SLOW = pytest.mark.slow
AUDIO = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TEXT = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 30, "num_attention_heads": 32}


class Positions:
    """The attributes of Voxtral Mini's front end that the memory model uses."""

    encoder_positions, encoder_dim, cross_attention_positions = 1500, 1280, 0


@pytest.fixture(scope="session")
def middle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Voxtral of 15 million parameters, wider and deeper than the tiny one, with random weights."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    config = VoxtralConfig.from_pretrained(TINY).to_dict()
    config["audio_config"] |= {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    config["text_config"] |= {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, **heads}
    folder = tmp_path_factory.mktemp("middle")
    VoxtralForConditionalGeneration(VoxtralConfig.from_dict(config)).save_pretrained(folder)
    for name in ("tekken.json", "preprocessor_config.json"):
        shutil.copy(Path(TINY) / name, folder / name)
    return str(folder)


@pytest.fixture(scope="module")
def compared(small: dict[str, str]) -> Callable[..., tuple[float, float]]:
    """Predicted and measured bytes of the largest planned pack."""

    def compare(kind: type[TrainSettings], model_id: str, **values: Any) -> tuple[float, float]:
        tasks = values.pop("tasks", ("asr", "tqa"))
        manifests = tuple(small[f"{task}.train"] for task in tasks)
        settings = kind(train_jsonl=manifests, output_dir="unused", model_id=model_id, **values)
        findings = Findings()
        run = RunContext.create(settings)
        rows = read_rows(run, findings)
        assert rows is not None, findings.to_fix
        meta_model = build_meta_model(run)
        fitter = SettingsFitter(rows, meta_model, 1, findings, memory_gib=1.0, tunes=False)
        pack = fitter.planned(current_size(settings))
        cost = TrialRunner(rows, settings, torch.device("cpu")).try_pack(pack.rows, times=0)
        assert cost is not None
        return pack.need.allocated_bytes, cost.peak_bytes

    return compare


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (MultitaskSettings, {"per_device_bsz": 8, "tasks": ("asr",)}),
        pytest.param(MultitaskSettings, {"per_device_bsz": 8, "grad_ckpt": True, "bf16": True}, marks=SLOW),
        (MultitaskSettings, {"batching": "packed", "pack_tokens": 600, "quantize": "4bit", "lora_dropout": 0.0}),
        (MultitaskSettings, {"per_device_bsz": 4, "tuning": "full", "freeze_whisper": False}),
        pytest.param(MultitaskSettings, {"per_device_bsz": 8, "tuning": "dora", "label_smoothing": 0.1}, marks=SLOW),
        pytest.param(TextSettings, {"per_device_bsz": 8, "quantize": "8bit", "tasks": ("tqa",)}, marks=SLOW),
        pytest.param(AsrAdapterSettings, {"per_device_bsz": 8, "store": "encoder", "tasks": ("asr",)}, marks=SLOW),
    ],
)
def test_tiny_voxtral_needs_what_is_predicted(
    compared: Callable[..., tuple[float, float]], kind: type[TrainSettings], values: dict[str, Any]
) -> None:
    predicted, measured = compared(kind, TINY, **values)
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(
    "values",
    [
        {},
        pytest.param({"grad_ckpt": True, "tuning": "full"}, marks=SLOW),
        pytest.param({"freeze_encoder": True}, marks=SLOW),
    ],
)
def test_whisper_needs_what_is_predicted(compared: Callable[..., tuple[float, float]], values: dict[str, Any]) -> None:
    predicted, measured = compared(WhisperSettings, WHISPER, tasks=("asr",), per_device_bsz=6, **values)
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


def test_salmonn_needs_what_is_predicted(compared: Callable[..., tuple[float, float]], salmonn: str) -> None:
    predicted, measured = compared(SalmonnSettings, salmonn, tasks=("asr",), per_device_bsz=8)
    assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(
    "values", [{}, pytest.param({"grad_ckpt": True, "bf16": True, "quantize": "4bit"}, marks=SLOW)]
)
def test_a_middle_sized_model_needs_what_is_predicted(
    compared: Callable[..., tuple[float, float]], middle: str, values: dict[str, Any]
) -> None:
    """The error shrinks with the size of the model."""
    predicted, measured = compared(MultitaskSettings, middle, tasks=("asr",), per_device_bsz=2, **values)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("model_id", [TINY, WHISPER])
@pytest.mark.parametrize("quantize", ["none", "8bit", "4bit"])
def test_weights_are_counted_to_the_byte(model_id: str, quantize: str) -> None:
    family = get_family(model_id)
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    real = family.load_model(model_id, device=torch.device("cpu"), quantize=quantize, **options)
    stored = {id(tensor): tensor.numel() * tensor.element_size() for tensor in list(stored_tensors(real))}
    meta_model = family.build_on_meta(model_id, **options)
    assert sum(weight_bytes(meta_model, family, quantize).values()) == sum(stored.values())
    assert all(parameter.is_meta for parameter in meta_model.parameters())


@pytest.fixture(scope="module")
def mini() -> Any:
    """Voxtral Mini 3B in the shapes of its published configuration, without weights."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    audio = {**AUDIO, "num_mel_bins": 128, "max_source_positions": 1500}
    text = {**TEXT, "model_type": "llama", "vocab_size": 131_072, "num_key_value_heads": 8, "head_dim": 128}
    config = VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=24)
    return build_on_meta(lambda: VoxtralForConditionalGeneration._from_config(config, dtype=torch.bfloat16), "mini")


def test_full_size_voxtral_is_counted_without_its_weights(mini: Any) -> None:
    family = Voxtral()
    counts = {role: entry["total"] for role, entry in count_parameters(mini, family).items()}
    assert sum(counts.values()) == 4_676_271_104
    assert counts["encoder"] == 636_968_960 and counts["projector"] == 25_165_824
    layers = [layer for _, layer in quantized_layers(mini, family)]
    assert len(layers) == 30 * 7, "all Linear layers of the language model, but not its output layer"
    weights = sum(layer.weight.numel() for layer in layers)
    assert weights == 30 * (2 * 3072 * 4096 + 2 * 3072 * 1024 + 3 * 3072 * 8192)
    quantized_bytes = weight_bytes(mini, family, "4bit")["llm", "4bit"]
    # half a byte a weight, a byte for the scale of 64, four bytes for that of 256 scales, a few for each layer
    assert quantized_bytes == pytest.approx(weights * (0.5 + 1 / 64 + 4 / (64 * 256)), rel=1e-3)


def test_full_size_voxtral_needs_what_one_would_think(mini: Any) -> None:
    """LoRA on projector and language model: half the memory with 4 bits, activations gone with --grad_ckpt."""
    family, lora = Voxtral(), {"r": 16, "alpha": 32, "dropout": 0.05}
    with torch.device("meta"):
        model = add_lora(mini, family, ("projector", "llm"), model_id="mini", **lora)
    counts = count_parameters(model, family)
    per_layer = 16 * (2 * (3072 + 4096) + 2 * (3072 + 1024) + 3 * (3072 + 8192))
    assert counts["llm"]["trainable"] == 30 * per_layer
    assert counts["projector"]["trainable"] == 16 * (5120 + 3072 + 2 * 3072)
    model.train()
    shape = PackShape(8, 8 * 450, 450, 8, 8 * 60)

    def peak(**options: Any) -> float:
        computing = ComputeConfig(torch.bfloat16, on_gpu=True, **options)
        return MemoryModel(model, family, Positions(), computing).need(shape).peak_bytes / 2**30  # type: ignore[arg-type]

    plain, in_4_bits = peak(), peak(quantize="4bit")
    assert 2 * 4.703e9 / 2**30 < plain < 60, "weights alone are 8.8 GiB"
    weights = sum(layer.weight.numel() for _, layer in quantized_layers(mini, family))
    assert plain - in_4_bits == pytest.approx(weights * (2 - 0.516) / 2**30, rel=0.02)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert peak() < 0.6 * plain, "most of a step are activations"


@pytest.mark.parametrize(
    ("quantize", "workers", "options", "by_hand"),
    [
        # 24.26e9 weights in bfloat16, a part of them on each worker, and two of the largest modules next to each other
        pytest.param("none", 1, {}, 2 * 24.26e9, marks=pytest.mark.slow),
        ("none", 4, {"weight_shards": 4}, 2 * (24.26e9 / 4 + 0.671e9 + 0.556e9)),
        pytest.param("none", 8, {"weight_shards": 8}, 2 * (24.26e9 / 8 + 1.227e9), marks=pytest.mark.slow),
        # 4 bits apply to the layers of the language model: 22.3e9 of its weights
        pytest.param("4bit", 1, {}, 2 * 1.98e9 + 0.516 * 22.28e9, marks=pytest.mark.slow),
        ("4bit", 4, {"weight_shards": 4}, (2 * 1.98e9 + 0.516 * 22.28e9) / 4 + 2 * 0.671e9 + 0.516 * 0.556e9),
    ],
)
def test_weights_of_the_24b(quantize: str, workers: int, options: dict[str, Any], by_hand: float) -> None:
    """Voxtral-Small: weights of each worker by hand, and LoRA of rank 16, which stays whole with FSDP."""
    family = Voxtral()
    sizes = {"hidden_size": 5120, "intermediate_size": 32_768, "num_hidden_layers": 40, "num_attention_heads": 32}
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    config: Any = VoxtralConfig()
    for name, size in sizes.items():
        setattr(config.text_config, name, size)
    with torch.device("meta"):
        base = VoxtralForConditionalGeneration._from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        lora = {"r": 16, "alpha": 32, "dropout": 0.0}
        model = add_lora(base, family, ("projector", "llm"), model_id="small", **lora)
    computing = ComputeConfig(torch.bfloat16, on_gpu=True, quantize=quantize)
    training = Training(num_workers=workers, **options)
    memory = MemoryModel(model, family, Positions(), computing, training)  # type: ignore[arg-type]
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    always = memory.need(PackShape(1, 100, 100, 0, 10)).always_bytes()
    assert always == pytest.approx(by_hand + 12 * trained, rel=0.02)


def test_full_tuning_shards_its_state(mini: Any) -> None:
    """4.04e9 trained weights: 16 bytes each with gradient and moments, of which one of four workers has a quarter."""
    family = Voxtral()
    model = train_fully(mini, family, ("projector", "llm"))
    computing = ComputeConfig(torch.float32, on_gpu=True)
    model.float()

    def peak(**options: Any) -> float:
        training = Training(**options)
        memory = MemoryModel(model, family, Positions(), computing, training)  # type: ignore[arg-type]
        need = memory.need(PackShape(1, 100, 100, 0, 10))
        return need.moments.get("optimizer step", need.peak_bytes) / 1e9

    whole, four = 4.039e9, {"num_workers": 4, "state_shards": 4, "weight_shards": 4}
    assert peak() == pytest.approx((16 * whole + 4 * 0.637e9 + 8 * 0.403e9) / 1e9, rel=0.02)
    gathered = 4 * (0.403e9 + 0.107e9)  # the embeddings and the layer after them
    assert peak(**four) == pytest.approx((4 * whole + 0.637e9 + gathered + 2 * 0.403e9) / 1e9, rel=0.02)
    assert peak(**four, offloads=True) < 0.5 * peak(**four)


def test_allocations_are_exact() -> None:
    """Two matrices of 4 MB at a time, one of which stays; temporaries inside a product count as well."""
    matrix, outputs = torch.randn(1000, 1000), []

    def work() -> None:
        square = matrix @ matrix
        outputs.append(square @ matrix)

    assert measure_allocations(work, torch.device("cpu")).peak_bytes == 8_000_000


def test_a_frozen_encoder_keeps_nothing_when_activations_are_recomputed(small: dict[str, str]) -> None:
    """transformers makes the first convolution's outputs require gradients, which would save the encoder's."""
    values = {"train_jsonl": (small["asr.train"],), "output_dir": "unused", "model_id": TINY}
    settings = MultitaskSettings(**values, grad_ckpt=True)
    rows = read_rows(RunContext.create(settings), Findings())
    assert rows is not None
    model = TrialRunner(rows, settings, torch.device("cpu")).model
    mel_1FT = torch.zeros(1, 128, rows.front_end.window_frames)
    assert not model.get_base_model().model.audio_tower(mel_1FT).last_hidden_state.requires_grad


def test_lengths_are_those_of_features(small: dict[str, str], make_features: Callable[..., tuple[Path, ...]]) -> None:
    from voxray.features.reader import Features

    manifests = tuple(small[f"{task}.train"] for task in ("asr", "sqa", "tqa"))
    settings = MultitaskSettings(train_jsonl=manifests, output_dir="o", model_id=TINY)
    rows = read_rows(RunContext.create(settings), Findings())
    assert rows is not None
    real = Features(make_features(*manifests))
    for name in ("task", "sample", "num_prompt_tokens", "num_target_tokens", "num_windows", "num_samples"):
        assert np.array_equal(getattr(rows.train, name), getattr(real, name)), name
