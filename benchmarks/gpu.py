"""Measure training and generation of Voxtral-Mini's shape on one GPU, in under 8 minutes, without Ray and network.

The sections run in the order of their value, and each prints one JSON line. A section that the rest of ``--budget_s``
is too short for is left out. The weights are random. With ``--tiny`` the model is small, and the same sections run on
a CPU too, as a test of the script. The last lines are the table for benchmarks/README.md.

    python benchmarks/gpu.py --folder runs/gpu
    python benchmarks/gpu.py --folder runs/gpu --only train,generate --budget_s 240
    python benchmarks/gpu.py --folder runs/gpu --tiny
"""

import argparse
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "benchmarks")]
NEEDED = {
    **{"torch": "torch", "transformers": "transformers", "peft": "peft", "accelerate": "accelerate"},
    **{"pyarrow": "pyarrow", "mistral_common": "mistral-common", "soundfile": "soundfile", "soxr": "soxr", "av": "av"},
    **{"jiwer": "jiwer", "rapidfuzz": "rapidfuzz", "sacrebleu": "sacrebleu", "rouge_score": "rouge-score"},
    **{"pydantic": "pydantic", "rich": "rich", "yaml": "pyyaml", "fsspec": "fsspec", "tensorboard": "tensorboard"},
}
"""{module: package}."""
missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
if missing:
    lines = [f"missing: {', '.join(missing)}", f"  pip download --no-deps --dest wheels {' '.join(missing)}"]
    lines += ["on a machine with network, and here:", "  pip install --no-index --find-links wheels --no-deps wheels/*"]
    sys.exit("\n".join(lines))

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # torch reads it when it is imported

import torch  # noqa: E402
from evaluate import draw_answer_lengths, generate_plain, generate_voxray  # noqa: E402
from train import make_features, train_strong, whole_pack, write_model, write_rows  # noqa: E402
from transformers import WhisperFeatureExtractor  # noqa: E402

from voxray.batches.rank import Worker  # noqa: E402
from voxray.config.train import MultitaskSettings  # noqa: E402
from voxray.core.units import GIB  # noqa: E402
from voxray.features.reader import Features  # noqa: E402
from voxray.generation import continuous_batching  # noqa: E402
from voxray.models.registry import get_family  # noqa: E402
from voxray.preflight.memory import MemoryModel, Training  # noqa: E402
from voxray.preflight.meta_model import build_meta_model  # noqa: E402
from voxray.preflight.shapes import ComputeConfig  # noqa: E402
from voxray.recipes import run_stage  # noqa: E402
from voxray.recipes.run_context import RunContext  # noqa: E402
from voxray.recipes.training_data import TrainingData  # noqa: E402
from voxray.training import loop  # noqa: E402
from voxray.training.records import read_metrics  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
WARM_UP_STEPS = 2


@dataclass
class Bench:
    """What the sections share.

    Attributes:
        folder: Folder for base, features and runs.
        tiny: Whether the model is small.
        peak_flops: Measured speed of a large matrix product in the type of the training.
        bytes_per_sec: Measured speed of reading and writing memory.
    """

    folder: Path
    tiny: bool
    base: str = ""
    manifests: dict[str, str] = field(default_factory=dict)
    peak_flops: float = 0.0
    bytes_per_sec: float = 0.0
    table: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if DEVICE.type == "cpu" else torch.bfloat16

    def features(self, kind: str, store: str = "mel") -> Features:
        return make_features(self.manifests[kind], self.base, self.folder / "features" / f"{kind}-{store}", store)

    def settings(self, run_dir: Path, store: str, num_steps: int, **changes: Any) -> MultitaskSettings:
        values = {"train_jsonl": "unused", "model_id": self.base, "output_dir": str(run_dir), "max_steps": num_steps}
        values |= {"batching": "packed", "pack_tokens": 1024 if self.tiny else 4096, "grad_accum": 1, "store": store}
        values |= {"bf16": self.dtype is torch.bfloat16, "log_steps": 10**6, "save_steps": 10**6, "num_workers": 0}
        return MultitaskSettings.model_validate({**values, **changes})


def prepare(bench: Bench) -> None:
    """Write the base and the manifests."""
    base = bench.folder / "base"
    if bench.tiny and not base.is_dir():
        write_model(base, 4096)
    elif not (base / "config.json").is_file():
        from full_size import write_base

        write_base(base, "Voxtral-Mini-3B")
    bench.base = str(base)
    rows = bench.folder / "rows"
    rows.mkdir(exist_ok=True)
    lines = Path(write_rows(rows, 48 if bench.tiny else 1024)).read_text(encoding="utf-8").splitlines(keepends=True)
    kinds: dict[str, Callable[[dict[str, Any]], bool]] = {
        "text": lambda row: "audio_path" not in row,
        "asr": lambda row: "transcript" in row,
        "multitask": lambda row: True,
    }
    for kind, belongs in kinds.items():
        path = rows / f"{kind}.jsonl"
        path.write_text("".join(line for line in lines if belongs(json.loads(line))), encoding="utf-8")
        bench.manifests[kind] = str(path)


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The fastest of several runs after one more."""
    results = []
    for _ in range(times + 1):
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        results.append(time.perf_counter() - start)
    return min(results[1:])


def machine(bench: Bench) -> dict[str, Any]:
    """Versions, and the speed of matrix products and of memory."""
    import transformers

    size = 512 if bench.tiny else 8192
    left, right = (torch.randn(size, size, device=DEVICE, dtype=bench.dtype) for _ in range(2))
    bench.peak_flops = 2 * size**3 / seconds(lambda: left @ right)
    block = torch.zeros((1 << 24) if bench.tiny else (1 << 32), dtype=torch.uint8, device=DEVICE)
    copy = torch.empty_like(block)
    bench.bytes_per_sec = 2 * block.numel() / seconds(lambda: copy.copy_(block))
    name = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "CPU"
    speeds = {"tflops": round(bench.peak_flops / 1e12, 2), "gb_per_sec": round(bench.bytes_per_sec / 1e9)}
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__, **speeds}


def run_training(bench: Bench, name: str, features: Features, num_steps: int, **changes: Any) -> tuple[float, Any]:
    """Train; returns the tokens per second after the first steps, and the run."""
    run_dir = bench.folder / "runs" / name
    run_dir.mkdir(parents=True)
    settings = bench.settings(run_dir, features.store, num_steps, **changes)
    run = RunContext.create(settings, run_dir=run_dir, worker=Worker(device=DEVICE))
    run_stage.train(run, TrainingData(features.folders, ()))  # type: ignore[arg-type]
    records = read_metrics(run_dir, "train")[WARM_UP_STEPS:]
    tokens = sum(record["tokens_per_sec"] * record["sec"] for record in records)
    return tokens / sum(record["sec"] for record in records), run


@contextmanager
def each_step(watch: Callable[[int, Callable[[], Any]], Any]) -> Iterator[None]:
    """Within this context ``watch(number, step)`` takes every step of a training."""
    train_step, numbers = loop.train_step, iter(range(10**9))

    def watched(*args: Any) -> Any:
        return watch(next(numbers), lambda: train_step(*args))

    with mock.patch.object(loop, "train_step", watched):
        yield


def prediction(run: Any, features: Features, num_tokens: int) -> tuple[float, float]:
    """(operations of a step on a pack, its peak memory in bytes) as preflight predicts them."""
    settings, share = run.settings, num_tokens / float(features.num_tokens.sum())
    config = ComputeConfig(
        torch.bfloat16 if settings.bf16 else torch.float32,
        on_gpu=DEVICE.type == "cuda",
        grad_ckpt=settings.grad_ckpt,
        quantize=settings.quantize,
    )
    model = MemoryModel(build_meta_model(run), run.family, run.front_end, config, Training())
    shape = whole_pack(features, share)
    return model.step_flops(shape), model.need(shape).allocated_bytes


def train(bench: Bench, quantize: str = "none") -> dict[str, Any]:
    """Tokens per second, share of the matrix speed, and peak memory beside preflight's."""
    figures: dict[str, Any] = {}
    num_steps = 4 if bench.tiny else 12
    for kind, store in (("text", "mel"), ("asr", "mel"), ("multitask", "mel"), ("multitask", "encoder")):
        name = f"{kind}{', stored encoder outputs' if store == 'encoder' else ''}"
        features = bench.features(kind, store)
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats(DEVICE)
        rate, run = run_training(bench, f"{kind}-{store}-{quantize}", features, num_steps, quantize=quantize)
        flops, predicted = prediction(run, features, run.settings.pack_tokens)
        share = rate / run.settings.pack_tokens * flops / bench.peak_flops
        figures[name] = {"tokens_per_sec": round(rate), "share_of_matrix_speed": round(share, 3)}
        if DEVICE.type == "cuda":
            peak = torch.cuda.max_memory_allocated(DEVICE)
            figures[name] |= {"peak_gib": round(peak / GIB, 2), "predicted_gib": round(predicted / GIB, 2)}
        bench.table.append(f"| train {name}, {quantize} | {rate:,.0f} tokens/s | {share:.0%} of the matrix speed |")
    return figures


def steps(bench: Bench) -> dict[str, Any]:
    """Waits for the GPU, launches and idle share of one step on a multitask pack, with both kinds of AdamW."""
    return {optim: watched_step(bench, optim) for optim in ("adamw_torch", "adamw_torch_fused")}


def watched_step(bench: Bench, optim: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}

    def watch(number: int, step: Callable[[], Any]) -> Any:
        if DEVICE.type == "cpu" or number not in (WARM_UP_STEPS, WARM_UP_STEPS + 1):
            return step()
        if number == WARM_UP_STEPS:
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = step()
            torch.cuda.set_sync_debug_mode("default")
            figures["waits"] = sum("synchroniz" in str(each.message) for each in caught)
            return result
        start = time.perf_counter()
        with torch.profiler.profile() as profile:
            result = step()
            synchronise()
        wall = time.perf_counter() - start
        kernels = [event for event in profile.events() or () if str(event.device_type).endswith("CUDA")]
        busy = sum(event.device_time for event in kernels) / 1e6
        figures.update(launches=len(kernels), idle_share=round(max(0.0, 1 - busy / wall), 3))
        return result

    with each_step(watch):
        run_training(bench, f"watched-{optim}", bench.features("multitask"), WARM_UP_STEPS + 3, optim=optim)
    return figures


def generate(bench: Bench) -> dict[str, Any]:
    """Tokens per second and RTFx beside transformers' generate, and the bound by the speed of memory."""
    family, features = get_family(bench.base), bench.features("asr")
    front_end, extract = family.front_end(bench.base), WhisperFeatureExtractor.from_pretrained(bench.base)
    model = family.load_model(bench.base, dtype=bench.dtype, device=DEVICE)
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "audio" not in n)
    lengths, figures = draw_answer_lengths(features), dict[str, Any]()
    for batch_size in (1, 8) if bench.tiny else (1, 8, 64):
        number = min(len(features), 4 if bench.tiny else 4 * batch_size)
        rows, limits = [features.row(row) for row in range(number)], lengths[:number]
        audio_sec = sum(row.num_samples for row in rows) / 16_000
        arguments = (model, family, front_end, features, limits, batch_size)
        ours = seconds(partial(generate_voxray, *arguments), times=1)
        with mock.patch.object(continuous_batching, "STEPS_PER_READ", 8):
            every_8 = seconds(partial(generate_voxray, *arguments), times=1)
            static = seconds(partial(generate_voxray, *arguments, static_cache=True), times=1)
        theirs = seconds(lambda: generate_plain(model, front_end, rows, limits, batch_size, None, extract), times=1)  # noqa: B023
        rate, rtfx = sum(limits) / ours, audio_sec / ours
        figures[str(batch_size)] = {"tokens_per_sec": round(rate), "rtfx": round(rtfx), "to_generate": theirs / ours}
        figures[str(batch_size)] |= {"read_every_8": ours / every_8, "static_cache_read_every_8": ours / static}
        bench.table.append(f"| generate, batch {batch_size} | {rate:,.0f} tokens/s | RTFx {rtfx:.0f} |")
    return {**figures, "bound_at_batch_1": round(bench.bytes_per_sec / 2 / weights)}


def trainer(bench: Bench) -> dict[str, Any]:
    """transformers' Trainer with PEFT at its best, on the rows of the multitask section."""
    features = bench.features("multitask")
    options: dict[str, Any] = {"max_steps": 4 if bench.tiny else 24}
    if DEVICE.type == "cuda":
        options |= {"use_cpu": False, "bf16": True, "optim": "adamw_torch_fused"}
    sec = train_strong(bench.base, features, bench.folder / "trainer", dtype=bench.dtype, device=DEVICE, **options)
    rows = min(len(features), 8 * options["max_steps"])
    rate = float(features.num_tokens.sum()) / len(features) * rows / sec
    bench.table.append(f"| Trainer, multitask | {rate:,.0f} tokens/s | |")
    return {"tokens_per_sec": round(rate)}


def train_4bit(bench: Bench) -> dict[str, Any]:
    """The sections of training on a base in 4 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"left_out": "bitsandbytes is not installed"}
    return train(bench, "4bit")


SECTIONS: dict[str, tuple[Callable[[Bench], dict[str, Any]], float]] = {
    "machine": (machine, 10),
    "train": (train, 90),
    "steps": (steps, 30),
    "generate": (generate, 90),
    "trainer": (trainer, 60),
    "train_4bit": (train_4bit, 90),
}
"""{name: (section, seconds that it is likely to take on an H200)}, in the order of their value."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--budget_s", type=float, default=460.0)
    parser.add_argument("--only", default="", help="names of sections, separated by commas; machine always runs")
    parser.add_argument("--tiny", action="store_true")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    flags.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(flags.folder.resolve(), flags.tiny)
    prepare(bench)
    for name, (section, likely_sec) in SECTIONS.items():
        if flags.only and name not in ("machine", *flags.only.split(",")):
            continue
        left = flags.budget_s - (time.perf_counter() - start)
        began = time.perf_counter()
        if left < (0 if flags.tiny else likely_sec):
            figures: dict[str, Any] = {"left_out": f"{left:.0f} s left"}
        else:
            try:
                figures = section(bench)
            except Exception as error:  # the other sections are still worth running
                figures = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"section": name, "sec": round(time.perf_counter() - began, 1), **figures}), flush=True)
    print("| what | speed | |", "| --- | --- | --- |", *bench.table, sep="\n")


if __name__ == "__main__":
    main()
