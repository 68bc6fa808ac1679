"""The compile job: compiles a model's audio path for some batch sizes and compares the programs with the model.

The audio path is Whisper's encoder, Voxtral's encoder and projector, or SALMONN's two encoders and Q-Former, including
an adapter's weights. Its shapes do not depend on the prompt or the answer. The language model is not compiled, as its
shapes change with every token.
"""

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
from voxray.models.adapters.read_files import is_fully_tuned, weights_file
from voxray.models.front_end import FrontEnd
from voxray.models.interface import AudioPath
from voxray.models.parts.arithmetic import with_default_dtype
from voxray.models.parts.compiled_audio import (
    FORMAT,
    REPORT,
    compile_environment,
    import_tensorrt,
    load_program,
    weights_hash,
)
from voxray.models.parts.logmel_windows import padded_windows, samples_by_window
from voxray.models.parts.quantize import base_dtype
from voxray.models.registry import get_family
from voxray.runs.lease import output_lease
from voxray.runs.run_folder import provenance, replaced_on_success, require_replaceable, resolve_output_dir

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest allowed difference as a share of the model's largest output, by data type: the size of its rounding error."""
INDUCTOR = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
"""The wrapper only calls each kernel once. Without optimizing it, compilation takes a third of the time."""
NOISE = 0.1  # standard deviation of the noise clips, as a share of full scale
SHORT = 0.1  # length of the short clips in windows: 3 s of a 30 s window
TIMED_RUNS = 5

Inputs = tuple[torch.Tensor, ...]
"""Inputs of an audio path (see ``models.interface.AudioPath``)."""


def run_compile(settings: CompileSettings) -> dict[str, Any]:
    """Compile the audio path of a model and write the programs if their outputs match the model's.

    Returns:
        The content of compiled.json.
    Raises:
        RunError: The model cannot be loaded or compiled, the output folder is in use, or a program's outputs differ
            from the model's. No output is written then.
        SettingsError: The settings do not fit the model.
    """
    output_dir = resolve_output_dir(settings.output_dir, settings.storage_path)
    require_replaceable(
        output_dir, REPORT, overwrite=settings.overwrite, earlier="an earlier one", other="it holds something else"
    )
    settings = assemble_base(settings, output_dir.parent)
    model_id, adapter = base_and_adapter(settings, settings.lora_dir)
    settings = with_default_dtype(settings, model_id, is_fully_tuned=is_fully_tuned(adapter))
    family = get_family(model_id)
    if settings.quantize != "none" and family.encoder_role in family.quantized:
        raise SettingsError(
            f"--quantize {settings.quantize}: holds the encoder of {family.name} in fewer bits, and such layers "
            "cannot be compiled; leave it out"
        )
    _check_backend(settings)
    warn_about_unused_flags(settings)
    flags = {name: getattr(settings, name) for name in ("bf16", "tf32", "fp16", "quantize")}
    model, _ = load_model(InferenceConfig(model_id, str(adapter or ""), SamplingParams(1), 1, **flags))
    device, dtype = next(model.parameters()).device, base_dtype(bf16=settings.bf16, fp16=settings.fp16)
    front_end, audio_path = family.front_end(model_id), family.audio_path(model).eval()
    report = {"format": FORMAT, "model_id": model_id, "adapter": str(adapter or ""), "adapter_sha256": ""}
    if adapter:
        report["adapter_sha256"] = checksum(weights_file(adapter))
    report |= {**compile_environment(family, dtype, device), "weights": weights_hash(audio_path)}
    report |= {
        "backend": settings.backend,
        "mel_shape": [front_end.num_mel_bins, front_end.window_frames],
        "windows": {},
    }
    with output_lease(output_dir), replaced_on_success(output_dir) as partial:
        for number in settings.windows:
            clips = noise_clips(front_end, number, settings.seed, dtype, device)
            file = partial / f"audio_w{number}.pt2"
            console.print(f"compiling for {number} window(s) ...")
            report["windows"][str(number)] = entry = compile_and_check(audio_path, clips, file, settings)
            console.print(
                f"{number} window(s): compiled in {entry['compile_sec']:.0f} s; differs by {entry['difference']:.1e} "
                f"of the largest number; {entry['eager_sec'] * 1e3:.1f} -> {entry['compiled_sec'] * 1e3:.1f} ms"
            )
        write_json(partial / REPORT, {**report, **provenance()})
    console.print(f"--compiled {output_dir} uses it", markup=False)
    return report


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
    """Inputs of an audio path for ``num_windows`` noise clips of one window each.

    Returns:
        The inputs for full windows. For models that take lengths, also those for short clips.
    """
    rng, window_samples = np.random.default_rng(seed), front_end.window_frames * HOP_SAMPLES
    batches = []
    for share in (1.0, SHORT) if front_end.needs_num_samples else (1.0,):
        [length] = samples_by_window(front_end, round(share * window_samples))
        windows = []
        for _ in range(num_windows):
            features = front_end.features(rng.normal(0, NOISE, length).astype(np.float32))
            windows.append(padded_windows(features.mel_KF, features.fill, features.num_windows, front_end))
        inputs = [torch.from_numpy(np.concatenate(windows)).to(device, dtype)]
        inputs += [torch.full((num_windows,), length, device=device)] if front_end.needs_num_samples else []
        batches.append(tuple(inputs))
    return batches


@torch.no_grad()
def compile_and_check(
    audio_path: torch.nn.Module, clips: Sequence[Inputs], file: Path, settings: CompileSettings
) -> dict[str, Any]:
    """Compile for one number of windows, load the program from disk and compare its outputs with the model's.

    Args:
        clips: Inputs for the comparison; the first one is also used for compiling and timing.
    Returns:
        file, sha256, compile_sec; the largest difference from the model, as difference (a share of the model's largest
        output) and difference_absolute; eager_sec and compiled_sec, medians of a few runs.
    Raises:
        RunError: The audio path cannot be compiled, or the outputs differ.
    """
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecation warnings
            exported = torch.export.export(audio_path, clips[0])
            if settings.backend == "tensorrt":
                _write_tensorrt(exported, clips[0], file, settings.optimization_level)
            else:
                torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(file), inductor_configs=dict(INDUCTOR)
                )
    except Exception as error:  # compilers' errors have no common type
        reason = one_line(error, 300)
        raise RunError(f"--backend {settings.backend}: cannot compile this on this machine: {reason}") from None
    compile_sec = time.perf_counter() - start
    device = clips[0][0].device
    program = load_program(file, device)
    difference, absolute = 0.0, 0.0
    for inputs in clips:
        batch_absolute, batch_difference = _difference(program(*inputs), audio_path(*inputs))
        if not batch_difference <= TOLERANCE[inputs[0].dtype]:  # also true for NaN
            raise RunError(f"compile: the program's outputs differ from the model's by {batch_difference:.1e}")
        difference, absolute = max(difference, batch_difference), max(absolute, batch_absolute)
    return {
        "file": file.name,
        "sha256": checksum(file),
        "compile_sec": compile_sec,
        "difference": difference,
        "difference_absolute": absolute,
        "eager_sec": _median_sec(audio_path, clips[0]),
        "compiled_sec": _median_sec(program, clips[0]),
    }


def _difference(output: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Largest absolute difference, and the same as a share of the largest expected value; infinite for other shapes."""
    if output.shape != expected.shape:
        return float("inf"), float("inf")
    absolute = float((output.float() - expected.float()).abs().max())
    return absolute, absolute / float(expected.float().abs().max())


def _write_tensorrt(exported: Any, inputs: Inputs, file: Path, optimization_level: int) -> None:
    """Write one package: TensorRT engines for the operators it supports, AOTInductor code for the rest."""
    tensorrt = import_tensorrt("--backend tensorrt")
    engine = tensorrt.dynamo.compile(
        exported, arg_inputs=list(inputs), optimization_level=optimization_level, min_block_size=1
    )
    tensorrt.save(engine, str(file), output_format="aot_inductor", arg_inputs=list(inputs), retrace=True)


def _median_sec(audio_path: AudioPath, inputs: Inputs) -> float:
    seconds, device = [], inputs[0].device
    for _ in range(TIMED_RUNS + 1):  # the first run is a warm-up
        synchronise(device)
        start = time.perf_counter()
        audio_path(*inputs)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work; returns at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
