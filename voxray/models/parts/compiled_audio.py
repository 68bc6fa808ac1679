"""Use of audio paths that jobs/compile.py compiled.

Compiled code checks nothing: with another number of windows, other weights or another processor it returns wrong values
or ends the process. So compiled.json records everything that the code was compiled for, and this module checks it.

Shape letters: W windows, F mel bins, T mel frames of a window.
"""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from voxray.core.errors import RunError, one_line
from voxray.core.storage import checksum
from voxray.models.interface import AudioPath, ModelFamily
from voxray.models.parts.audio_encoder import hash_tensors
from voxray.models.parts.cpu_16bit import Float32Products

REPORT = "compiled.json"
FORMAT = 2


class CompiledAudio:
    """An audio path for any number of windows, built from programs for fixed numbers of windows.

    Windows are split into parts of the compiled sizes, the largest first. If fewer remain than the smallest size, they
    are padded with windows of zeros, whose results are dropped. Windows do not influence each other, so the result is
    the same.

    Args:
        programs: {number of windows: program}.
        shape: Mel bins and frames of a window.
        dtype: Of the model.
    """

    def __init__(self, programs: Mapping[int, AudioPath], shape: tuple[int, int], dtype: torch.dtype) -> None:
        self._programs, self._shape, self._dtype = dict(programs), shape, dtype

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Compute what the model's own audio path computes.

        Args:
            inputs: mel_WFT, and for front ends with ``needs_num_samples`` num_samples_W.
        """
        shape = tuple(inputs[0].shape[1:])
        assert shape == self._shape, f"windows of {shape}, not {self._shape}"
        mel_WFT, num_samples = inputs[0].to(self._dtype), inputs[1:]
        results = []
        for start, count, size in split_windows(len(mel_WFT), sorted(self._programs)):
            part = [_pad_rows(values[start : start + count], size) for values in (mel_WFT, *num_samples)]
            states = self._programs[size](*part)
            results.append(states[: count * (len(states) // size)])
        return results[0] if len(results) == 1 else torch.cat(results)


def _pad_rows(values: torch.Tensor, size: int) -> torch.Tensor:
    """Append rows of zeros up to ``size`` rows."""
    return torch.cat([values, values.new_zeros(size - len(values), *values.shape[1:])])


def split_windows(num_windows: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Divide windows among programs.

    Args:
        sizes: Numbers of windows that programs take, in ascending order.
    Yields:
        (index of the first window, number of windows, size of the program).
    """
    start = 0
    while start < num_windows:
        remaining = num_windows - start
        size = max((size for size in sizes if size <= remaining), default=sizes[0])
        yield start, min(size, remaining), size
        start += size


def use_compiled(model: Any, family: ModelFamily, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
    """Make a loaded model use a compiled audio path instead of its own.

    Args:
        model: Base, with the adapter that the audio path was compiled with, if any.
        folder: Output of jobs/compile.py.
    Raises:
        RunError: The folder cannot be used or was compiled for something else; the message says what differs.
    """
    report = read_report(folder)
    path = family.audio_path(model)
    _check(report, folder, {**compile_environment(family, dtype, device), "weights": weights_hash(path)})
    if report["backend"] == "tensorrt":
        import_tensorrt("--compiled")
    programs = {}
    for num_windows, entry in report["windows"].items():
        file = folder / entry["file"]
        if not file.is_file() or checksum(file) != entry["sha256"]:
            raise RunError(f"--compiled {folder}: {entry['file']} is missing or damaged; compile it again")
        programs[int(num_windows)] = load_program(file, device)
    bins, frames = report["mel_shape"]
    family.use_audio_path(model, CompiledAudio(programs, (bins, frames), dtype))


def read_report(folder: Path) -> dict[str, Any]:
    """Read compiled.json.

    Raises:
        RunError: The folder has none, or one of another format.
    """
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        version = report["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"--compiled {folder}: no {REPORT} that can be read; jobs/compile.py writes it") from None
    if version != FORMAT:
        raise RunError(f"--compiled {folder}: written by another version of voxray; compile it again")
    return report


def _check(report: Mapping[str, Any], folder: Path, required: Mapping[str, str]) -> None:
    """Raise RunError if any value of the report differs from the required one."""
    for name, value in required.items():
        if report[name] == value:
            continue
        if name == "weights":
            source = f"{report['model_id']}{' with ' + report['adapter'] if report['adapter'] else ''}"
            reason = f"made of other weights, those of {source}"
        else:
            reason = f"made for {name} {report[name]}, and this is {value}"
        raise RunError(f"--compiled {folder}: {reason}; compile it again with jobs/compile.py")


def compile_environment(family: ModelFamily, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Everything but the weights that a compiled program depends on."""
    return {
        "family": family.name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "torch": torch.__version__,
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the instruction set that torch uses. Programs run on one kind of device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def weights_hash(path: torch.nn.Module) -> str:
    """Hash of everything that an audio path computes with: tensors, including an adapter's, scales and options."""
    digest = hash_tensors(path.state_dict())
    for name, module in path.named_modules():
        # extra_repr has the options of torch's layers. Attention and LoRA keep a scale, attention its heads as well.
        values = [getattr(module, option, None) for option in ("scaling", "num_heads")]
        kind = "Linear" if isinstance(module, Float32Products) else type(module).__name__  # depends on the CPU
        digest.update(f"{name} {kind} {module.extra_repr()} {values}".encode())
    return digest.hexdigest()


def load_program(file: Path, device: torch.device) -> AudioPath:
    """Load a compiled program."""
    from torch._inductor import aoti_load_package

    program: Any = aoti_load_package(str(file), device_index=device.index if device.index is not None else -1)
    return program


def import_tensorrt(flag: str) -> Any:
    """Import torch_tensorrt, which compiled programs need to find TensorRT.

    Raises:
        RunError: It is not installed or cannot be used on this machine.
    """
    try:
        import torch_tensorrt  # type: ignore[import-not-found]
    except ImportError:
        raise RunError(
            f"{flag}: needs torch_tensorrt, which is not installed (pip install 'voxray[tensorrt]')"
        ) from None
    except OSError as error:  # it is installed, but the driver or TensorRT's libraries are missing
        raise RunError(f"{flag}: torch_tensorrt cannot be used here: {one_line(error, 200)}") from None
    return torch_tensorrt
