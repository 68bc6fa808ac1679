"""An audio path that jobs/compile.py compiled: what a folder says of itself, whether it fits a model, and its use.

Compiled code does as it is told: given another number of windows, other weights than the model's or another processor,
it answers wrongly, or ends the process, without a word. So everything that it was made for is written beside it, and
checked here.

Shape letters: W windows, F mel bins, T mel frames of a window, P rows of the result for each window, D width.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from voxray.core.errors import RunError, one_line
from voxray.core.storage import checksum
from voxray.models.interface import AudioPath, ModelFamily

REPORT = "compiled.json"
FORMAT = 1


class CompiledAudio:
    """Hears any number of windows, with programs that each hear a fixed one.

    Windows are heard in parts of the compiled numbers, the largest first; if the rest is fewer than the smallest of
    them, silence is heard with it and left out of the result. No window knows of the others, so that is exact.

    Args:
        programs: {number of windows: its program}.
        shape: Mel bins and frames of a window.
        dtype: Of the model.
    """

    def __init__(self, programs: Mapping[int, AudioPath], shape: tuple[int, int], dtype: torch.dtype) -> None:
        self._programs, self._shape, self._dtype = dict(programs), shape, dtype

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """What the model's own audio path gives.

        Args:
            inputs: Features of windows, mel_WFT, and the lengths that some models ask for, (W,).
        """
        shape = tuple(inputs[0].shape[1:])
        assert shape == self._shape, f"windows of {shape}, not {self._shape}"
        mel_WFT, lengths = inputs[0].to(self._dtype), inputs[1:]
        found = []
        for start, number, size in split_windows(len(mel_WFT), sorted(self._programs)):
            part = [_filled_up(values[start : start + number], size) for values in (mel_WFT, *lengths)]
            states = self._programs[size](*part)
            found.append(states[: number * (len(states) // size)])
        return found[0] if len(found) == 1 else torch.cat(found)


def _filled_up(values: torch.Tensor, size: int) -> torch.Tensor:
    """Rows of zeros after those that there are."""
    return torch.cat([values, values.new_zeros(size - len(values), *values.shape[1:])])


def split_windows(num_windows: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Divide windows among programs.

    Args:
        sizes: Windows that each program hears, in ascending order.
    Yields:
        (first window, how many of them, windows of the program that hears them).
    """
    start = 0
    while start < num_windows:
        left = num_windows - start
        size = max((size for size in sizes if size <= left), default=sizes[0])
        yield start, min(size, left), size
        start += size


def use_compiled(model: Any, family: ModelFamily, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
    """Let a loaded model, with its adapter, hear through a compiled audio path.

    Raises:
        RunError: The folder cannot be used, or is not of this model; the line says what differs.
    """
    report = read_report(folder)
    path = family.audio_path(model)
    _check(report, folder, {**described(family, dtype, device), "weights": weights_hash(path)})
    if report["backend"] == "tensorrt":
        import_tensorrt("--compiled")
    programs = {}
    for number, entry in report["windows"].items():
        file = folder / entry["file"]
        if not file.is_file() or checksum(file) != entry["sha256"]:
            raise RunError(f"--compiled {folder}: {entry['file']} is missing or damaged; compile it again")
        programs[int(number)] = load_program(file, device)
    bins, frames = report["mel_shape"]
    family.use_audio_path(model, CompiledAudio(programs, (bins, frames), dtype))


def read_report(folder: Path) -> dict[str, Any]:
    """Read what is said of a compiled audio path.

    Raises:
        RunError: The folder holds none, or one of another format.
    """
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        version = report["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError(f"--compiled {folder}: no {REPORT} that can be read; jobs/compile.py writes it") from None
    if version != FORMAT:
        raise RunError(f"--compiled {folder}: written by another version of voxray; compile it again")
    return report


def _check(report: Mapping[str, Any], folder: Path, now: Mapping[str, str]) -> None:
    """Refuse what was made for something else."""
    for name, value in now.items():
        if report[name] == value:
            continue
        if name == "weights":
            made = f"{report['model_id']}{' with ' + report['adapter'] if report['adapter'] else ''}"
            what = f"made of other weights, those of {made}"
        else:
            what = f"made for {name} {report[name]}, and this is {value}"
        raise RunError(f"--compiled {folder}: {what}; compile it again with jobs/compile.py")


def described(family: ModelFamily, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What a compiled program depends on beside the weights."""
    return {
        "family": family.name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "torch": torch.__version__,
    }


def device_name(device: torch.device) -> str:
    """A GPU's name, or that of the processor with the instructions that torch uses of it; programs are made for one."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def weights_hash(path: torch.nn.Module) -> str:
    """Hash of everything that an audio path computes with: its tensors, an adapter's among them, and scales."""
    found = hashlib.sha256()
    for name, tensor in sorted(path.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name, module in path.named_modules():
        if hasattr(module, "scaling"):  # of attention and of LoRA
            found.update(f"{name} {module.scaling}".encode())
    return found.hexdigest()


def load_program(file: Path, device: torch.device) -> AudioPath:
    """A compiled program, ready to run."""
    from torch._inductor import aoti_load_package

    program: Any = aoti_load_package(str(file), device_index=device.index if device.index is not None else -1)
    return program


def import_tensorrt(flag: str) -> Any:
    """The module torch_tensorrt, whose import also lets compiled programs find TensorRT.

    Raises:
        RunError: It is not installed, or cannot be used here.
    """
    try:
        import torch_tensorrt  # type: ignore[import-not-found]
    except ImportError:
        raise RunError(
            f"{flag}: needs torch_tensorrt, which is not installed (pip install 'voxray[tensorrt]')"
        ) from None
    except OSError as error:  # it is there, but the driver or TensorRT's own libraries are not
        raise RunError(f"{flag}: torch_tensorrt cannot be used here: {one_line(error, 200)}") from None
    return torch_tensorrt
