"""What only a GPU executes (`make gpu`), each compared with the same computation on the CPU."""

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, WHISPER
from helpers.training import train

from voxray.batches.collate import collate_prompts, collate_training, to_device
from voxray.batches.rank import CPU, Worker
from voxray.config.train import MultitaskSettings
from voxray.features.reader import Features
from voxray.generation.continuous_batching import generate_greedy
from voxray.models.interface import IGNORED
from voxray.models.parts import static_kv_cache
from voxray.models.parts.arithmetic import set_tf32
from voxray.models.registry import get_family
from voxray.recipes.training_data import TrainingData
from voxray.training import loop
from voxray.training.engine import init_single_process_group
from voxray.training.gpu_stats import SECONDS_BETWEEN_READINGS, GpuStats
from voxray.training.loop import answer_loss
from voxray.training.records import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("_needs_gpu")]
GPU = torch.device("cuda", 0)


@pytest.fixture
def _needs_gpu() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU that torch can use")
    yield
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def folders(small: dict[str, str], make_features: Callable[..., tuple[Path, ...]]) -> tuple[Path, ...]:
    return make_features(small["asr.train"], small["tqa.train"])


def mean_loss(model: Any, folders: tuple[Path, ...], device: torch.device) -> torch.Tensor:
    features, family = Features(folders), get_family(TINY)
    batch = collate_training([features.row(number) for number in (0, 5, 14, 20)], family.front_end(TINY))
    loss = answer_loss(model, family, to_device(batch, device), 0.0).sum()
    return loss / (batch["labels"] != IGNORED).sum()


def test_4_bits(folders: tuple[Path, ...]) -> None:
    """A base in NF4 gives the loss that it has on the CPU, and a gradient for its input."""
    pytest.importorskip("bitsandbytes")
    family, options = get_family(TINY), {"dtype": torch.bfloat16, "quantize": "4bit"}
    losses = [mean_loss(family.load_model(TINY, device=device, **options), folders, device) for device in (CPU, GPU)]
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=0.02)


def test_8_bits_of_whisper_in_float16(make_features: Callable[..., tuple[Path, ...]], small: dict[str, str]) -> None:
    pytest.importorskip("bitsandbytes")
    family, features = get_family(WHISPER), Features(make_features(small["asr.val"], model_id=WHISPER))
    front_end, rows = family.front_end(WHISPER), [features.row(number) for number in range(4)]
    logits = {}
    for kind, dtype, device in (("none", torch.float32, CPU), ("8bit", torch.float16, GPU)):
        model = family.load_model(WHISPER, dtype=dtype, device=device, quantize=kind)
        batch = to_device(collate_training(rows, front_end), device)
        with torch.inference_mode():
            logits[kind] = family.answer_logits(model, batch, batch["answer_positions"]).float().cpu()
    difference = (logits["8bit"] - logits["none"]).abs().max() / logits["none"].abs().max()
    assert difference < 0.1


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_is_used_only_where_it_is_asked_for(enabled: bool) -> None:
    """TF32 keeps 10 bits of a factor: an error of 1e-3 instead of 1e-6."""
    if torch.cuda.get_device_capability(GPU) < (8, 0):
        pytest.skip("this GPU has no TF32")
    set_tf32(enabled)
    left, right = torch.randn(1024, 1024, device=GPU), torch.randn(1024, 1024, device=GPU)
    exact = left.double() @ right.double()
    error = ((left @ right).double() - exact).abs().max() / exact.abs().max()
    assert (float(error) > 1e-5) == enabled


def test_readings_of_nvml() -> None:
    pytest.importorskip("pynvml")
    stats = GpuStats(GPU)
    block = torch.ones(1 << 28, dtype=torch.uint8, device=GPU)
    values = stats.read()
    assert values["peak_memory_gib"] >= 0.25
    assert values["gpu_memory_gib"] >= 0.25
    assert 0 <= values["gpu_util_percent"] <= 100
    assert values["gpu_power_w"] > 0
    del block
    time.sleep(SECONDS_BETWEEN_READINGS)
    assert stats.read()["gpu_memory_gib"] > 0


def test_nccl_starts() -> None:
    init_single_process_group(Worker(device=GPU))
    try:
        assert dist.get_backend() == "nccl"
        value = torch.ones(4, device=GPU)
        dist.all_reduce(value)
        assert value.tolist() == [1.0] * 4
    finally:
        dist.destroy_process_group()


def test_tensorrt(tmp_path: Path) -> None:
    pytest.importorskip("torch_tensorrt")
    from voxray.commands.compile import run_compile
    from voxray.config.compile import CompileSettings

    values = {"model_id": TINY, "output_dir": str(tmp_path / "compiled"), "backend": "tensorrt", "windows": [1]}
    report = run_compile(CompileSettings.model_validate(values))
    assert report["windows"]["1"]["difference"] < 0.01


@pytest.mark.parametrize("batching", ["fixed", "packed"])
def test_a_training_equals_that_on_the_cpu_and_waits_once_per_step(
    folders: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    """Waits are counted by torch; those of AdamW, of records and of checkpoints are outside of the counted pass."""
    losses: dict[str, list[float]] = {}
    waits: list[int] = []
    train_step = loop.train_step

    def watched(*args: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return train_step(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits.append(sum("synchroniz" in str(each.message) for each in caught))

    for device in (CPU, GPU):
        run_dir = tmp_path / device.type
        run_dir.mkdir()
        values = {"train_jsonl": "unused", "model_id": TINY, "output_dir": str(run_dir), "num_workers": 0}
        values |= {"batching": batching, "pack_tokens": 200, "grad_accum": 2, "max_steps": 4, "fp32": True}
        if device is GPU:
            monkeypatch.setattr(loop, "train_step", watched)
        settings = MultitaskSettings.model_validate(values)
        train(settings, run_dir, TrainingData(folders, ()), Worker(device=device))
        losses[device.type] = [record["loss"] for record in read_metrics(run_dir, "train")]
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=1e-4)
    assert max(waits[1:]) <= 1


def test_a_captured_step_gives_the_same_answers(folders: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows join and leave, and the cache grows."""
    monkeypatch.setattr(static_kv_cache, "PAGE", 16)
    family, features = get_family(TINY), Features(folders)
    set_tf32(False)
    model = family.load_model(TINY, dtype=torch.float32, device=GPU)
    rows = [features.row(number) for number in range(20)]

    def answers(**options: bool) -> list[list[int]]:
        options |= {"batch_size": 4, "limits": [20] * len(rows)}
        completions = generate_greedy(model, family, family.front_end(TINY), rows, **options)
        return [completion.ids for completion in sorted(completions, key=lambda each: each.index)]

    expected = answers()
    assert answers(static_cache=True) == expected
    assert answers(static_cache=True) == expected, "the graph is used again"


def test_answers_equal_those_on_the_cpu(folders: tuple[Path, ...]) -> None:
    family, features = get_family(TINY), Features(folders)
    front_end = family.front_end(TINY)
    prompts = collate_prompts([features.row(number) for number in range(6)], front_end)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": front_end.pad_id}
    set_tf32(False)
    answers = []
    for device in (CPU, GPU):
        model = family.load_model(TINY, dtype=torch.float32, device=device)
        with torch.inference_mode():
            answers.append(family.generate(model, to_device(prompts, device), **options).cpu())
    assert torch.equal(*answers)
