"""Run the jobs on models of full size with random weights, and measure time and memory.

Voxtral-Mini has 4.7 billion weights, 9.4 GB in bfloat16, and SALMONN-7B takes 15.0 GB. A machine with 24 GiB and no
GPU can train and export them. Each job takes one or two steps, or answers two rows. Prints for each job its seconds,
those of its steps, the largest memory of all its processes, and what preflight predicts for one worker of a training.
The bases are written once and stay in the folder.

    python benchmarks/full_size.py --folder runs/full-size
    python benchmarks/full_size.py --folder runs/full-size --only train_text,export
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import WhisperFeatureExtractor

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from helpers.head import start_head  # noqa: E402
from helpers.running import processes_of  # noqa: E402
from memory_table import MODELS, released_config  # noqa: E402

from voxray.core.units import GIB  # noqa: E402
from voxray.models.adapters.lora import adapter_tensors, add_lora, save_adapter  # noqa: E402
from voxray.models.registry import get_family  # noqa: E402
from voxray.models.safetensors_files import LazyTensor, write_weights  # noqa: E402
from voxray.models.salmonn.loading import load_tokenizer  # noqa: E402
from voxray.models.salmonn.model import SalmonnForConditionalGeneration  # noqa: E402
from voxray.models.voxtral.tiny import AUDIO_TOKEN_ID  # noqa: E402

ASSETS = ROOT / "tests/assets"
BLOCK = 1 << 24
MARK = "VOXRAY_BENCHMARK"
"""Environment variable that all processes of a job inherit."""


@dataclass(frozen=True)
class Job:
    """A job to measure.

    Attributes:
        model: The base, of ``memory_table.MODELS``.
        script: Name of the job's script.
        flags: Its flags, without --model_id.
        submitted: Submit it to a head node instead of running it here.
        killed_at: File whose appearance ends the job by SIGKILL.
    """

    model: str
    script: str
    flags: str
    submitted: bool = False
    killed_at: Path | None = None


def write_base(folder: Path, name: str) -> None:
    """Write a model of full size with random bfloat16 weights, tensor by tensor."""
    import transformers

    folder.mkdir(parents=True)
    config: Any = released_config(name)
    config.dtype, num_mel_bins = torch.bfloat16, 128
    if name == "SALMONN-7B":
        model_class, num_mel_bins = SalmonnForConditionalGeneration, config.speech_config.num_mel_bins
        load_tokenizer(ASSETS / "salmonn-reference" / "llama_fast").save_pretrained(folder)
    elif name == "whisper-large-v3":
        model_class, tiny = transformers.WhisperForConditionalGeneration, ASSETS / "whisper-tiny"
        tokens = json.loads((tiny / "config.json").read_text())
        config.update({key: value for key, value in tokens.items() if key.endswith(("token_id", "suppress_tokens"))})
        for path in tiny.iterdir():
            if path.name not in (
                "config.json",
                "preprocessor_config.json",
                "processor_config.json",
                "model.safetensors",
            ):
                shutil.copyfile(path, folder / path.name)
    else:
        model_class, config.audio_token_id = transformers.VoxtralForConditionalGeneration, AUDIO_TOKEN_ID
        shutil.copyfile(ASSETS / "voxtral-tiny" / "tekken.json", folder / "tekken.json")
    with torch.device("meta"):
        model: Any = model_class._from_config(config, dtype=torch.bfloat16)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    num_texts = json.loads((ASSETS / "voxtral-tiny" / "tekken.json").read_text())["config"]["num_vocab_tokens"]

    def random(shape: torch.Size, weight: str) -> torch.Tensor:
        if "norm" in weight:
            return torch.ones(shape, dtype=torch.bfloat16)
        values = block.repeat(-(-shape.numel() // BLOCK))[: shape.numel()].view(shape) * 0.02
        if weight == "lm_head.weight" and model_class is transformers.VoxtralForConditionalGeneration:
            values[num_texts:] = 0  # the tokenizer is the tiny one, and has no text for the other tokens
        return values

    tensors = [
        LazyTensor(name, tuple(each.shape), torch.bfloat16, partial(random, each.shape, name))
        for name, each in model.state_dict().items()
        if name != "proj_out.weight"  # Whisper's output layer is its embedding
    ]
    write_weights(folder, tensors)
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=num_mel_bins).save_pretrained(folder)


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


def jobs(folder: Path, rows: dict[str, str]) -> dict[str, Job]:
    """{name: job}, in the order in which they depend on each other."""
    usual = f"--features_dir {folder}/features --grad_ckpt --per_device_bsz 2 --grad_accum 1 --save_steps 1"
    alone, tasks = f"{usual} --num_workers 0", ",".join(rows.values())
    text = f"--train_jsonl {rows['tqa']} {alone} --bf16"
    multitask = f"--train_jsonl {tasks} {usual} --bf16 --batching packed --trim_audio_tokens --max_steps 2"
    asr = f"--train_jsonl {rows['asr']} {alone}"
    one_row = f"{asr.replace('--per_device_bsz 2', '--per_device_bsz 1')} --max_steps 1"
    answers = f"--bf16 --lora_dir {folder}/adapter"
    mini, whisper, first_checkpoint = "Voxtral-Mini-3B", "whisper-large-v3", folder / "again/checkpoints/step-000001"
    return {
        "train_text": Job(mini, "train_text", f"{text} --output_dir {folder}/text --max_steps 2"),
        "killed after step 1": Job(
            mini, "train_text", f"{text} --output_dir {folder}/again --max_steps 2", killed_at=first_checkpoint
        ),
        "resumed": Job(mini, "train_text", f"{text} --output_dir {folder}/again --max_steps 2"),
        "4bit": Job(mini, "train_text", f"{text} --output_dir {folder}/4bit --quantize 4bit --max_steps 2"),
        "train_asr_adapter": Job(
            mini, "train_asr_adapter", f"{asr} --output_dir {folder}/asr --bf16 --max_steps 2 --trim_audio_tokens"
        ),
        "train_multitask": Job(
            mini, "train_multitask", f"{multitask} --output_dir {folder}/multitask --num_workers 1", submitted=True
        ),
        "fsdp": Job(
            mini, "train_multitask", f"{multitask} --output_dir {folder}/sharded --num_workers 2 --strategy fsdp"
        ),
        "infer": Job(mini, "infer", f"{answers} --jsonl {rows['asr']} --max_new_tokens 8"),
        "evaluate": Job(
            mini,
            "evaluate",
            f"{answers} --val_jsonl {rows['asr']} --output_dir {folder}/answers --gen_max_new_tokens 8",
        ),
        "export": Job(mini, "export", f"--lora_dir {folder}/adapter --output_dir {folder}/exported"),
        "SALMONN-7B": Job("SALMONN-7B", "train_salmonn", f"{one_row} --output_dir {folder}/salmonn --bf16"),
        "whisper bf16": Job(
            "whisper-large-v3", "train_whisper", f"{one_row} --output_dir {folder}/whisper-bf16 --bf16"
        ),
        "whisper fp32": Job(whisper, "train_whisper", f"{one_row} --output_dir {folder}/whisper-fp32"),
    }


def memory(mark: str) -> tuple[int, int]:
    """Bytes of all processes with this mark, shared pages counted once: (mapped from no file, all)."""
    anonymous = total = 0
    for process in processes_of(mark):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        anonymous += sizes.get("Pss_Anon", 0)
        total += sizes.get("Pss", 0)
    return anonymous, total


def run(job: Job, base: str, log: Path, variables: dict[str, str]) -> int:
    """Run a job to its end, or until it is killed; returns its exit status."""
    flags = ["--model_id", base, *job.flags.split()]
    if job.submitted:
        with start_head(RAY_AUTH_MODE="disabled", **variables) as head:
            details = head.wait(head.submit("full-size", job.script, flags), timeout_sec=3600)
        log.write_text(details["logs"])
        return int(details["driver_exit_code"])
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "jobs" / f"{job.script}.py"), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        while job.killed_at is not None and process.poll() is None:
            if job.killed_at.is_dir():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return 0
            time.sleep(0.1)
        return process.wait()


def measure(job: Job, base: str, log: Path) -> dict[str, Any]:
    """Run a job; returns its exit status, seconds and the peaks of its memory."""
    mark, peaks, done = uuid.uuid4().hex, [0, 0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            peaks[:] = map(max, peaks, memory(mark))

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        status = run(job, base, log, {MARK: mark})
    finally:
        done.set()
        watcher.join()
    return {"status": status, "sec": time.perf_counter() - start, "private": peaks[0], "all": peaks[1]}


def flag(job: Job, name: str) -> str:
    """Value of a flag of a job; "" without it."""
    words = job.flags.split()
    return words[words.index(name) + 1] if name in words else ""


def step_seconds(run_dir: str) -> list[float]:
    """Seconds of every step of a training."""
    path = Path(run_dir) / "metrics.jsonl"
    records = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return [record["sec"] for record in records if record["kind"] == "train"]


def predicted(job: Job, base: str, folder: Path) -> int:
    """Memory of one worker of a training job, in bytes, as preflight predicts it."""
    recipe = job.script.removeprefix("train_")
    output = flag(job, "--output_dir")
    flags = (
        f"--recipe {recipe} --no_tune {job.flags.replace(f'--output_dir {output}', f'--output_dir {folder}/unused')}"
    )
    assert run(Job(job.model, "preflight", flags), base, folder / "preflight.log", {}) in (0, 1)
    return json.loads((folder / "unused/preflight/preflight.json").read_text())["memory"]["predicted_bytes"]


def same_results(folder: Path) -> bool:
    """Whether the run that was killed and resumed has the adapter of the run that was not."""
    files = [folder / name / "adapter/adapter_model.safetensors" for name in ("text", "again")]
    return files[0].read_bytes() == files[1].read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", default="", help="names of jobs, separated by commas")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    @cache
    def base_of(name: str) -> str:
        assert name in MODELS
        path = folder / name
        if not (path / "config.json").is_file():
            write_base(path, name)
        return str(path)

    rows, table = write_rows(folder), dict[str, dict[str, Any]]()
    chosen = arguments.only.split(",") if arguments.only else []
    print(f"{'job':20} {'s':>6} {'private':>8} {'all':>8} {'predicted':>9} GiB, seconds of the steps")
    for name, job in jobs(folder, rows).items():
        if chosen and name not in chosen:
            continue
        base, output, is_resumed = base_of(job.model), flag(job, "--output_dir"), name == "resumed"
        if "/adapter" in job.flags and not (folder / "adapter").is_dir():
            write_adapter(folder / "adapter", base)
        if output and not is_resumed:
            shutil.rmtree(output, ignore_errors=True)
        figures = table[name] = measure(job, base, folder / f"{name}.log")
        if job.script.startswith("train_"):
            figures["steps"] = step_seconds(output)
        if "steps" in figures and figures["status"] == 0 and not (is_resumed or job.killed_at):
            figures["predicted"] = predicted(job, base, folder)
        sizes = [f"{figures[key] / GIB:8.2f}" if key in figures else " " * 8 for key in ("private", "all", "predicted")]
        notes = [f"{sec:.0f}" for sec in figures.get("steps", ())]
        if is_resumed and (folder / "text").is_dir():
            notes.append("same adapter" if same_results(folder) else "ANOTHER adapter than without the kill")
        if figures["status"] != 0:
            notes.append(f"failed: see {folder / f'{name}.log'}")
        print(f"{name:20} {figures['sec']:6.0f} {' '.join(sizes)}  {', '.join(notes)}", flush=True)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
