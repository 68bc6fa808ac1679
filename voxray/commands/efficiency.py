"""The efficiency job: measures a model's speed and memory and writes efficiency.json and a plot."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from rich.table import Table

from voxray.audio.decode import decode
from voxray.config.efficiency import EfficiencySettings
from voxray.config.unused_flags import warn_about_unused_flags
from voxray.core.console import console, progress_bar
from voxray.core.errors import BadRow, RunError, SettingsError
from voxray.core.manifest import Sample
from voxray.core.project_files import job_script
from voxray.core.storage import write_atomically, write_json
from voxray.core.tasks import TASKS
from voxray.efficiency.measure import LoadedModel, measure, prompt_row
from voxray.efficiency.peak_memory import PeakMemory
from voxray.efficiency.plot import plot
from voxray.generation.generate import SamplingParams
from voxray.generation.model import InferenceConfig, base_and_adapter, load_model, resolve_settings
from voxray.generation.salmonn_base import assemble_base
from voxray.models.front_end import FrontEnd
from voxray.models.interface import ModelFamily
from voxray.models.parts.compiled_audio import device_name, read_report
from voxray.models.registry import get_family, require_language
from voxray.runs.lease import folder_lease
from voxray.runs.run_folder import make_folder, provenance, refuse_training_folder, resolve_output_dir

REPORT, PICTURE, CLIP = "efficiency.json", "efficiency.png", "clip.wav"
CLIP_RATE_HZ = 16_000
NOISE = 0.1  # standard deviation of the noise clip, as a share of full scale
VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {"compiled": ""},
    "compiled": {},
    "8bit": {"compiled": "", "quantize": "8bit"},
    "4bit": {"compiled": "", "quantize": "4bit"},
}
"""The settings that each variant of ``--compare`` changes."""


def run_efficiency(settings: EfficiencySettings) -> dict[str, Any]:
    """Measure a model, or several variants of it, each in its own process.

    Returns:
        The content of efficiency.json.
    Raises:
        RunError, SettingsError: The user has to fix an input or a setting.
    """
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    refuse_training_folder(output_dir)
    with folder_lease(output_dir):
        if settings.compare:
            variants = {name: _measure_in_subprocess(name, settings, output_dir) for name in settings.compare}
            report = {"variants": variants, **provenance()}
        else:
            warn_about_unused_flags(settings)
            report = {**_measure(settings, output_dir), **provenance()}
            variants = {variant_name(report): report}
        write_json(output_dir / REPORT, report)
        write_atomically(output_dir / PICTURE, plot(variants))
        console.print(_table(variants))
        for name, variant in variants.items():
            for line in old_lines(variant):
                console.print(f"{name}: {line}", markup=False)
        console.print(f"{REPORT} and {PICTURE} in {output_dir}", markup=False)
        return report


def variant_name(report: Mapping[str, Any]) -> str:
    """Short name of the variant that was measured, such as "8bit compiled"."""
    words = [report["quantize"]] if report["quantize"] != "none" else []
    words += ["compiled"] if report["compiled"] else []
    return " ".join(words) or "eager"


def _measure_in_subprocess(name: str, settings: EfficiencySettings, output_dir: Path) -> dict[str, Any]:
    """Measure one variant in its own process; its output is discarded unless it fails."""
    folder = output_dir / name
    make_folder(folder)
    values = settings.model_dump(mode="json", include=settings.model_fields_set - {"compare", "storage_path"})
    values |= {"output_dir": str(folder), **VARIANTS[name]}
    write_atomically(folder / "settings.yaml", yaml.safe_dump(values, allow_unicode=True).encode())
    console.print(f"measuring {name} ...")
    command = [sys.executable, str(job_script("efficiency")), "--config", str(folder / "settings.yaml")]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        messages = [line for line in lines if line.startswith("error:")] or lines[-1:] or ["no error message"]
        raise RunError(f"--compare {name}: {messages[0].removeprefix('error: ')} (exit status {process.returncode})")
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def _measure(settings: EfficiencySettings, output_dir: Path) -> dict[str, Any]:
    """Load the model and measure it with every batch size."""
    settings = assemble_base(settings, output_dir)
    model_id, adapter = base_and_adapter(settings, settings.lora_dir)
    settings = resolve_settings(settings, model_id, adapter)
    family = get_family(model_id)
    front_end = family.front_end(model_id, trim_audio=settings.trim_audio_tokens)
    if "language" not in settings.model_fields_set and front_end.languages == {"en"}:
        settings = settings.model_copy(update={"language": "en"})
    require_language(front_end, settings.language, model_id)
    sample = _sample(settings, output_dir)
    num_windows = _count_windows(settings, family, front_end, sample)
    _check_compiled_windows(settings, num_windows)
    flags = {name: getattr(settings, name) for name in ("bf16", "tf32", "fp16", "quantize", "compiled")}
    start = time.perf_counter()
    model, _ = load_model(
        InferenceConfig(model_id, str(adapter or ""), SamplingParams(settings.new_tokens), 1, **flags)
    )
    device = next(model.parameters()).device
    loaded = LoadedModel(model, family, front_end, device)
    loaded.synchronise()
    report: dict[str, Any] = {
        "model_id": model_id,
        "adapter": str(adapter or ""),
        "family": family.name,
        "device": device_name(device),
        "num_threads": torch.get_num_threads(),
        "dtype": "bfloat16" if settings.bf16 else "float16" if settings.fp16 else "float32",
        **{name: getattr(settings, name) for name in ("quantize", "compiled", "task", "language", "trim_audio_tokens")},
        **{name: getattr(settings, name) for name in ("new_tokens", "warmup", "repeats")},
        "clip": sample.audio_path,
        "load_sec": time.perf_counter() - start,
    }
    results, old = [], None
    # the old evaluator reports torch's peak from the start of the process to the end of its one batch, so with loading
    load_peak_gib = PeakMemory(device).peak_gib() if device.type == "cuda" else None
    for batch_size in settings.batch_sizes:
        with progress_bar(f"batch of {batch_size}") as bar:
            options = {name: getattr(settings, name) for name in ("new_tokens", "warmup", "repeats")}
            result, as_old = measure(loaded, sample, batch_size=batch_size, on_progress=bar.update, **options)
        results.append(result)
        if batch_size == 1:
            memory = {"memory_gib": None if load_peak_gib is None else max(load_peak_gib, result["peak_memory_gib"])}
            old = {**as_old, **memory, "clip_sec": result["clip_sec"]}
    return {**report, "results": results, "old_evaluator": old}


def _sample(settings: EfficiencySettings, output_dir: Path) -> Sample:
    """The row to answer. Noise is written to a file, so that its decoding is measured like that of a recording."""
    task, path = TASKS[settings.task], settings.audio_path
    if not path:
        noise = np.random.default_rng(settings.seed).normal(0, NOISE, round(settings.clip_sec * CLIP_RATE_HZ))
        path = str(output_dir / CLIP)
        soundfile.write(path, noise.clip(-1, 1).astype(np.float32), CLIP_RATE_HZ)
    elif not Path(path).is_file():
        raise RunError(f"--audio_path {path}: no such file")
    prompt = task.prompt({"question": settings.question})
    return Sample("clip", task, prompt, "", path, settings.language, "--audio_path")


def _count_windows(settings: EfficiencySettings, family: ModelFamily, front_end: FrontEnd, sample: Sample) -> int:
    """Number of windows of the clip.

    Raises:
        RunError: The clip cannot be read.
        SettingsError: The clip is too long to be measured, or prompt and answer exceed the model's context.
    """
    flag = "--audio_path" if settings.audio_path else "--clip_sec"
    try:
        clip = decode(sample.audio_path, front_end.sample_rate_hz, max_sec=front_end.max_audio_sec)
        row = prompt_row(front_end, sample, clip)
    except BadRow as error:
        raise RunError(f"{flag}: {error}") from None
    window_sec = front_end.window_frames / 100  # a frame is 10 ms
    if front_end.needs_sequential_generate(row.prompt_ids, row.num_windows):
        raise SettingsError(
            f"{flag}: {family.name} hears a clip of over {window_sec:g} s window by window, which is not measured here"
        )
    longest = len(row.prompt_ids) + settings.new_tokens
    if longest > front_end.max_positions:
        raise SettingsError(
            f"--new_tokens {settings.new_tokens}: {longest} tokens with the prompt, and the model takes "
            f"{front_end.max_positions}"
        )
    return row.num_windows


def _check_compiled_windows(settings: EfficiencySettings, num_windows: int) -> None:
    """Check that every batch fits a compiled program; a batch that is split says nothing about the speed of a program.

    Raises:
        SettingsError: There is no program for the number of windows of a batch.
    """
    if not settings.compiled:
        return
    compiled_for = sorted(int(number) for number in read_report(Path(settings.compiled))["windows"])
    for batch_size in settings.batch_sizes:
        if batch_size * num_windows not in compiled_for:
            raise SettingsError(
                f"--batch_sizes {batch_size}: has {batch_size * num_windows} window(s), and {settings.compiled} is "
                f"compiled for {', '.join(map(str, compiled_for))}; jobs/compile.py --windows sets the numbers"
            )


def _table(variants: Mapping[str, Mapping[str, Any]]) -> Table:
    """Medians of every batch, with quartiles for TTFT and TPOT."""
    first = next(iter(variants.values()))
    clip_sec = first["results"][0]["clip_sec"]
    about = (
        f"{Path(first['model_id']).name}, {first['dtype']}, a clip of {clip_sec:.1f} s, {first['new_tokens']} tokens"
    )
    table = Table(
        title=f"{about}; medians and quartiles of {first['repeats']}, {first['device']}", title_justify="left"
    )
    names = ("variant", "batch", "TTFT ms", "TPOT ms", "data ms", "RTFx", "tokens/s", "peak GiB")
    for name in names:
        table.add_column(name, justify="left" if name == "variant" else "right", no_wrap=name.endswith("ms"))
    for variant, report in variants.items():
        for result in report["results"]:
            data_sec = result["decode_sec"]["median"] + result["features_sec"]["median"]
            rates = [f"{result[name]['median']:.1f}" for name in ("rtfx", "tokens_per_sec")]
            cells = [_milliseconds(result[name]) for name in ("ttft_sec", "tpot_sec")]
            cells += [f"{data_sec * 1e3:.1f}", *rates, f"{result['peak_memory_gib']:.3f}"]
            table.add_row(variant, str(result["batch_size"]), *cells)
    return table


def _milliseconds(statistics: Mapping[str, float]) -> str:
    """Median and quartiles, given in seconds, as text in milliseconds."""
    median, low, high = (statistics[name] * 1e3 for name in ("median", "low", "high"))
    return f"{median:.1f}\n{low:.1f}-{high:.1f}"


def old_lines(report: Mapping[str, Any]) -> Sequence[str]:
    """The figures that SALMONN's older efficiency script printed, as that script defined them."""
    old = report["old_evaluator"]
    if old is None:
        return ["no figures of the older evaluator, which measured one clip at a time: add 1 to --batch_sizes"]
    memory = "none: it counted GPU memory" if old["memory_gib"] is None else f"{old['memory_gib']:.4f} GiB"
    return [
        f"as the older evaluator counted (means of {old['num_runs']} runs, one clip of {old['clip_sec']:.1f} s, clock "
        "stopped when the device was asked, not when it was done):",
        f"  memory since the process began, loading included: {memory}",
        f"  TTFT {old['ttft_sec']:.4f} s; TPOT, of one single step, {old['tpot_sec']:.4f} s; inference time, their "
        f"sum, {old['inference_sec']:.4f} s",
    ]
