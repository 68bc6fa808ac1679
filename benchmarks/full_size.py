"""Run the jobs on a model of full size with random weights, and measure time and memory.

Voxtral-Mini has 4.7 billion weights, 9.4 GB in bfloat16. A machine with 24 GiB and no GPU can train and export
it. Each job takes two steps or answers two rows. Prints the seconds of each job, and the largest memory of all its
processes that is mapped from no file. The base is written once and stays in the folder.

    python benchmarks/full_size.py --folder runs/full-size
    python benchmarks/full_size.py --folder runs/full-size --only train_text,export
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import VoxtralConfig, VoxtralForConditionalGeneration

from voxray.models.adapters.lora import adapter_tensors, add_lora, save_adapter
from voxray.models.registry import get_family
from voxray.models.safetensors_files import LazyTensor, write_weights
from voxray.models.voxtral.tiny import AUDIO_TOKEN_ID

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "tests/assets"
GIB = 1 << 30
BLOCK = 1 << 24


def write_base(folder: Path) -> str:
    """Write Voxtral-Mini's shape with random bfloat16 weights, tensor by tensor; returns its folder."""
    config: Any = VoxtralConfig(audio_token_id=AUDIO_TOKEN_ID)
    with torch.device("meta"):
        model = VoxtralForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def random(shape: torch.Size, is_norm: bool) -> torch.Tensor:
        if is_norm:
            return torch.ones(shape, dtype=torch.bfloat16)
        values = block.repeat(-(-shape.numel() // BLOCK))[: shape.numel()] * 0.02
        return values.view(shape)

    folder.mkdir(parents=True)
    state = model.state_dict()
    tensors = [
        LazyTensor(name, tuple(each.shape), torch.bfloat16, partial(random, each.shape, "norm" in name))
        for name, each in state.items()
    ]
    write_weights(folder, tensors)
    model.config.dtype, model.config.architectures = torch.bfloat16, [type(model).__name__]
    model.config.save_pretrained(folder)
    for name in ("tekken.json", "preprocessor_config.json"):
        shutil.copyfile(ASSETS / "voxtral-tiny" / name, folder / name)
    return str(folder)


def write_adapter(folder: Path, base: str) -> None:
    """Write LoRA with random weights on all layers of projector and language model."""
    family = get_family(base)
    model = add_lora(
        family.build_on_meta(base, dtype=torch.bfloat16),
        family,
        ("projector", "llm"),
        model_id=base,
        r=16,
        alpha=32,
        dropout=0.0,
    )
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: 0.01 * torch.randn(each.shape, generator=generator) for name, each in adapter_tensors(model).items()
    }
    save_adapter(model, folder, tensors)


def write_rows(folder: Path) -> dict[str, str]:
    """Two rows of each task; returns {task: manifest}."""
    manifests = {}
    for task in ("asr", "sqa", "tqa"):
        lines = (ASSETS / "speech" / f"{task}.train.jsonl").read_text().splitlines()[:2]
        rows = [json.loads(line) for line in lines]
        for row in rows:
            if row.get("audio_path"):
                row["audio_path"] = str(ASSETS / "speech" / row["audio_path"])
        path = folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        manifests[task] = str(path)
    return manifests


def private_bytes(root: int) -> int:
    """Memory of a process and its descendants that is mapped from no file."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Anonymous:"))
    return total


def measure(command: list[str], log: Path) -> dict[str, float]:
    """Run a job; returns its exit status, seconds and the peak of its private memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    start, peak, done = time.perf_counter(), 0, threading.Event()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.3):
                peak = max(peak, private_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        done.set()
        watcher.join()
    return {"status": status, "sec": time.perf_counter() - start, "private": peak}


def steps(folder: Path, base: str, rows: dict[str, str]) -> dict[str, Callable[[], list[str]]]:
    """{name: command}, in the order in which they depend on each other."""

    def job(name: str, line: str) -> Callable[[], list[str]]:
        return lambda: [sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--model_id", base, *line.split()]

    usual = f"--features_dir {folder}/features --bf16 --grad_ckpt --per_device_bsz 2 --grad_accum 1 --save_steps 1"
    tasks = ",".join(rows.values())
    multitask = f"--train_jsonl {tasks} --output_dir {folder}/multitask {usual} --batching packed"
    sharded = f"--train_jsonl {tasks} --output_dir {folder}/sharded {usual} --num_workers 2 --strategy fsdp"
    answers = f"--bf16 --lora_dir {folder}/adapter"
    return {
        "train_text": job(
            "train_text",
            f"--train_jsonl {rows['tqa']} --output_dir {folder}/text {usual} --num_workers 0 --max_steps 2",
        ),
        "train_asr_adapter": job(
            "train_asr_adapter",
            f"--train_jsonl {rows['asr']} --output_dir {folder}/asr {usual} --num_workers 0 --max_steps 2",
        ),
        "train_multitask": job("train_multitask", f"{multitask} --num_workers 1 --max_steps 2"),
        "resume": job("train_multitask", f"{multitask} --num_workers 1 --max_steps 3"),
        "4bit": job(
            "train_text",
            f"--train_jsonl {rows['tqa']} --output_dir {folder}/4bit {usual} --num_workers 0 --max_steps 2 "
            "--quantize 4bit",
        ),
        "fsdp": job("train_multitask", f"{sharded} --max_steps 2"),
        "infer": job("infer", f"{answers} --jsonl {rows['asr']} --max_new_tokens 8"),
        "evaluate": job(
            "evaluate", f"{answers} --val_jsonl {rows['asr']} --output_dir {folder}/answers --gen_max_new_tokens 8"
        ),
        "preflight": job("preflight", f"--train_jsonl {tasks} --output_dir {folder}/unused --bf16 --grad_ckpt"),
        "export": job("export", f"--lora_dir {folder}/adapter --output_dir {folder}/exported"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    if not (folder / "base" / "config.json").is_file():
        write_base(folder / "base")
    if not (folder / "adapter").is_dir():
        write_adapter(folder / "adapter", str(folder / "base"))
    rows = write_rows(folder)
    chosen = arguments.only.split(",") if arguments.only else []
    table = {}
    for name, command in steps(folder, str(folder / "base"), rows).items():
        if chosen and name not in chosen:
            continue
        shutil.rmtree(folder / "exported", ignore_errors=True)
        table[name] = measure(command(), folder / f"{name}.log")
        figures = table[name]
        status = "" if figures["status"] == 0 else f"  failed: see {folder / f'{name}.log'}"
        print(f"{name:20} {figures['sec']:7.0f} s {figures['private'] / GIB:7.2f} GiB{status}", flush=True)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
