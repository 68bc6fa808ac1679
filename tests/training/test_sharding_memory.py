"""Private memory of two workers with a base of 1 GB: sharded, and in a type that it is not stored in."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY
from helpers.private_memory import Peak, private_bytes
from helpers.processes import STRATEGIES

from voxray.batches.rank import Worker
from voxray.config.train import MultitaskSettings
from voxray.models.interface import apply_layer
from voxray.models.parts.layer_units import find_units
from voxray.models.registry import get_family
from voxray.models.shared_conversion import load_shared
from voxray.recipes.build_model import build_model
from voxray.recipes.run_context import RunContext
from voxray.recipes.run_stage import build_engine

MIB = 1 << 20


def write_base(folder: Path) -> tuple[str, int]:
    """A Voxtral with 32 layers of 33 MB in bfloat16; returns its folder and the bytes of its weights."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    config: Any = VoxtralConfig.from_pretrained(TINY)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 32, "head_dim": 64}
    for name, size in {**sizes, "num_attention_heads": 16, "num_key_value_heads": 16}.items():
        setattr(config.text_config, name, size)
    torch.manual_seed(0)
    model = VoxtralForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="400MB")
    for name in ("tekken.json", "preprocessor_config.json"):
        (folder / name).write_bytes((Path(TINY) / name).read_bytes())
    return str(folder), sum(parameter.numel() for parameter in model.parameters()) * 2


def measure(rank: int, folder: Path, base: str, flags: dict[str, Any]) -> None:
    """Load, shard and train two steps in one of two processes; writes the memory of each phase."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    values = {"train_jsonl": "unused", "model_id": base, "num_workers": 0, "bf16": True, "lora_r": 4, "grad_ckpt": True}
    settings = MultitaskSettings.model_validate({**values, "output_dir": str(folder), **flags})
    run = RunContext.create(settings, run_dir=folder, worker=Worker(rank, 2))
    if flags.get("strategy") == "deepspeed":
        import deepspeed  # noqa: F401  # its modules are no weights
    gc.collect()
    before = private_bytes()
    with Peak() as loading:
        model, _ = build_model(run)
        largest = max(sum(each.nbytes for each in unit.parameters) for unit in find_units(model))
        engine = build_engine(run, model, {}, with_audio=False)
    gc.collect()
    loaded = private_bytes()
    ids_BL = torch.arange(4)[None] + 30
    batch, last_two = {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)}, torch.tensor([2, 3])
    with Peak() as steps:
        for _ in range(2):
            logits_NV = engine.run_pass(batch, last_two, apply_layer)
            engine.backward(logits_NV.float().logsumexp(-1).sum(), last=True)
            engine.reduce(torch.zeros(1), scale=1.0, max_norm=1.0)
            engine.apply(1e-3)
            del logits_NV
    figures = {"loaded": loaded, "loading": loading.num_bytes, "steps": steps.num_bytes}
    figures = {name: num_bytes - before for name, num_bytes in figures.items()} | {"largest": largest}
    (folder / f"{rank}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("strategy", "share", "modules"), [("fsdp", 1.1, 6), ("zero3", 1.25, 10)])
def test_a_worker_holds_half_of_the_base(
    tmp_path: Path, strategy: str, share: float, modules: int, base_of_1_gb: tuple[str, int]
) -> None:
    """After loading, half and a tenth; DeepSpeed itself takes 70 MB more. Later also some modules at a time."""
    base, num_bytes = base_of_1_gb
    mp.start_processes(measure, args=(tmp_path, base, STRATEGIES[strategy]), nprocs=2, start_method="spawn")
    for rank in (0, 1):
        figures = json.loads((tmp_path / f"{rank}.json").read_text())
        print(strategy, rank, {name: f"{value / MIB:.0f} MiB" for name, value in figures.items()})
        half, largest = num_bytes / 2, figures["largest"]
        assert figures["loaded"] < share * half
        assert figures["loading"] < share * half + 3 * largest
        assert figures["steps"] < share * half + modules * largest


@pytest.fixture(scope="module")
def base_of_1_gb(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    return write_base(tmp_path_factory.mktemp("base"))


def convert(rank: int, folder: Path, base: str) -> None:
    """Load a base in float32, as one of two processes; writes its private memory and what the weights sum up to."""
    torch.set_num_threads(1)
    family, before = get_family(base), private_bytes()
    model = load_shared(family, base, dtype=torch.float32, device=torch.device("cpu"), num_processes=2)
    gc.collect()
    figures = {"loaded": private_bytes() - before, "sum": sum(float(each.sum()) for each in model.parameters())}
    (folder / f"{rank}.json").write_text(json.dumps(figures))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_share_converted_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_of_1_gb: tuple[str, int]
) -> None:
    """In float32 the base takes 2 GB of each process by itself, and no private memory where two convert it once."""
    base, num_bytes = base_of_1_gb
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    mp.start_processes(convert, args=(tmp_path, base), nprocs=2, start_method="spawn")
    model = get_family(base).load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    total = sum(float(each.sum()) for each in model.parameters())
    for rank in (0, 1):
        figures = json.loads((tmp_path / f"{rank}.json").read_text())
        print(rank, f"{figures['loaded'] / MIB:.0f} MiB of {2 * num_bytes / MIB:.0f} MiB")
        assert figures["loaded"] < 0.1 * 2 * num_bytes
        assert figures["sum"] == total
