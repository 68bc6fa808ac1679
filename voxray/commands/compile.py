"""The compile job: a model's audio path -> programs for given numbers of windows, held against the model itself.

What is compiled is all that hears the audio: Whisper's encoder, Voxtral's encoder and projector, SALMONN's two encoders
and Q-Former, with what an adapter adds to them. It is the part of a model whose shapes do not depend on what is asked
and answered. Language models stay as they are: their shapes change with every token.
"""

import hashlib
import shutil
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxray.audio.logmel import HOP_SAMPLES
from voxray.config.compile import CompileSettings
from voxray.config.unused_flags import warn_about_unused_flags
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError, one_line
from voxray.core.storage import checksum, write_json
from voxray.generation.generate import SamplingParams
from voxray.generation.model import InferenceConfig, base_and_adapter, load_model
from voxray.generation.salmonn_base import assemble_base
from voxray.models.adapters.lora import WEIGHTS
from voxray.models.interface import AudioPath, FrontEnd
from voxray.models.parts.compiled_audio import FORMAT, REPORT, described, import_tensorrt, load_program, weights_hash
from voxray.models.parts.logmel_windows import padded_windows
from voxray.models.parts.quantize import base_dtype
from voxray.models.registry import get_family
from voxray.runs.run_folder import make_folder, provenance, resolve_output_dir

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference allowed, as a share of the largest number; that of the type is what rounding gives."""
INDUCTOR = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
"""What is left out only calls the kernels, once each; compiling takes a third of the time without it."""
NOISE = 0.1  # of the clips that both are asked about, as a share of full scale
SHORT = 0.1  # of a window: a clip of 3 s, where a window has 30
TIMED_RUNS = 5

Inputs = tuple[torch.Tensor, ...]
"""Of an audio path (see ``models.family.AudioPath``)."""


def run_compile(settings: CompileSettings) -> dict[str, Any]:
    """Compile the audio path of a model, and write the programs if they compute what the model does.

    Returns:
        What stands in compiled.json.
    Raises:
        RunError: The model cannot be loaded or compiled, the folder is taken, or a program computes something else
            (nothing is left behind then).
        SettingsError: The settings do not fit the model.
    """
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    _refuse_taken_folder(output_dir, overwrite=settings.overwrite)
    settings = assemble_base(settings, output_dir.parent)
    model_id, adapter = base_and_adapter(settings, settings.lora_dir)
    family = get_family(model_id)
    if settings.quantize != "none" and "encoder" in family.quantized:
        raise SettingsError(
            f"--quantize {settings.quantize}: holds the encoder of {family.name} in fewer bits, and such layers "
            "cannot be compiled; leave it out"
        )
    _check_backend(settings)
    warn_about_unused_flags(settings)
    flags = {name: getattr(settings, name) for name in ("bf16", "tf32", "fp16", "quantize")}
    model, _ = load_model(InferenceConfig(model_id, str(adapter or ""), SamplingParams(1), 1, **flags))
    device, dtype = next(model.parameters()).device, base_dtype(bf16=settings.bf16, fp16=settings.fp16)
    front_end, path = family.front_end(model_id), family.audio_path(model).eval()
    report = {"format": FORMAT, "model_id": model_id, "adapter": str(adapter or ""), "adapter_sha256": ""}
    if adapter:
        report["adapter_sha256"] = hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()
    report |= {**described(family, dtype, device), "weights": weights_hash(path), "backend": settings.backend}
    report |= {"mel_shape": [front_end.num_mel_bins, front_end.window_frames], "windows": {}}
    partial = output_dir.with_name(f".{output_dir.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        for number in settings.windows:
            clips = noise_clips(front_end, number, settings.seed, dtype, device)
            file = partial / f"audio_w{number}.pt2"
            console.print(f"compiling for {number} window(s) ...")
            report["windows"][str(number)] = entry = compiled(path, clips, file, settings)
            console.print(
                f"{number} window(s): compiled in {entry['compile_sec']:.0f} s; differs by {entry['difference']:.1e} "
                f"of the largest number; {entry['eager_sec'] * 1e3:.1f} -> {entry['compiled_sec'] * 1e3:.1f} ms"
            )
        write_json(partial / REPORT, {**report, **provenance()})
        shutil.rmtree(output_dir, ignore_errors=True)
        partial.replace(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"--compiled {output_dir} uses it", markup=False)
    return report


def _refuse_taken_folder(output_dir: Path, *, overwrite: bool) -> None:
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    if not (overwrite and (output_dir / REPORT).is_file()):
        kind = "--overwrite replaces an earlier one" if (output_dir / REPORT).is_file() else "it holds something else"
        raise RunError(f"--output_dir {output_dir}: is not empty; {kind}")


def _check_backend(settings: CompileSettings) -> None:
    if settings.backend == "aotinductor":
        if "optimization_level" in settings.model_fields_set:
            console.print("warning: --optimization_level has no effect: it is for --backend tensorrt")
        return
    import_tensorrt("--backend tensorrt")
    if not torch.cuda.is_available():
        raise RunError("--backend tensorrt: needs a GPU, and there is none on this machine")


def noise_clips(
    front_end: FrontEnd, num_windows: int, seed: int, dtype: torch.dtype, device: torch.device
) -> list[Inputs]:
    """What an audio path is given for clips of one window each, of seeded noise: whole windows first, and short ones
    for models that ask for lengths.
    """
    draw, window_samples = np.random.default_rng(seed), front_end.window_frames * HOP_SAMPLES
    found = []
    for share in (1.0, SHORT) if front_end.counts_samples else (1.0,):
        lengths = [round(share * window_samples)] * num_windows
        windows = []
        for length in lengths:
            features = front_end.features(draw.normal(0, NOISE, length).astype(np.float32))
            windows.append(padded_windows(features.mel_KF, features.fill, features.num_windows, front_end))
        inputs = [torch.from_numpy(np.concatenate(windows)).to(device, dtype)]
        inputs += [torch.tensor(lengths, device=device)] if front_end.counts_samples else []
        found.append(tuple(inputs))
    return found


@torch.no_grad()
def compiled(path: torch.nn.Module, clips: Sequence[Inputs], file: Path, settings: CompileSettings) -> dict[str, Any]:
    """Compile for one number of windows, and hold the program that is on disk against the model.

    Args:
        clips: What both are given; the first is what is compiled for, and what the times are of.
    Returns:
        file, sha256, compile_sec; difference (largest, as a share of the model's largest number) and
        difference_absolute from the model; eager_sec and compiled_sec, medians of a few runs.
    Raises:
        RunError: It cannot be compiled, or it computes something else.
    """
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own parts about each other
            exported = torch.export.export(path, clips[0])
            if settings.backend == "tensorrt":
                _write_tensorrt(exported, clips[0], file, settings.optimization_level)
            else:
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(file), inductor_configs=dict(INDUCTOR)
                )
    except Exception as error:  # compilers' errors have no common type
        reason = one_line(error, 300)
        raise RunError(f"--backend {settings.backend}: cannot compile this on this machine: {reason}") from None
    compile_sec = time.perf_counter() - began
    device = clips[0][0].device
    program = load_program(file, device)
    difference, absolute = 0.0, 0.0
    for inputs in clips:
        off, share = _difference(program(*inputs), path(*inputs))
        if not share <= TOLERANCE[inputs[0].dtype]:
            raise RunError(f"compile: the program computes something else than the model: they differ by {share:.1e}")
        difference, absolute = max(difference, share), max(absolute, off)
    return {
        "file": file.name,
        "sha256": checksum(file),
        "compile_sec": compile_sec,
        "difference": difference,
        "difference_absolute": absolute,
        "eager_sec": _median_sec(path, clips[0]),
        "compiled_sec": _median_sec(program, clips[0]),
    }


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Largest difference, and as a share of the largest number wanted; infinite where the shapes differ."""
    if found.shape != wanted.shape:
        return float("inf"), float("inf")
    absolute = float((found.float() - wanted.float()).abs().max())
    return absolute, absolute / float(wanted.float().abs().max())


def _write_tensorrt(exported: Any, inputs: Inputs, file: Path, optimization_level: int) -> None:
    """Parts that TensorRT knows as engines, the rest by AOTInductor, in one package."""
    tensorrt = import_tensorrt("--backend tensorrt")
    engine = tensorrt.dynamo.compile(
        exported, arg_inputs=list(inputs), optimization_level=optimization_level, min_block_size=1
    )
    tensorrt.save(engine, str(file), output_format="aot_inductor", arg_inputs=list(inputs), retrace=True)


def _median_sec(run: AudioPath, inputs: Inputs) -> float:
    seconds, device = [], inputs[0].device
    for _ in range(TIMED_RUNS + 1):  # the first is not counted
        synchronise(device)
        began = time.perf_counter()
        run(*inputs)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked for; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
