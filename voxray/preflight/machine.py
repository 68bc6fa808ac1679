"""Checks of this machine and its cluster: libraries, GPU, disk, shared memory, ports, CPUs."""

import importlib.util
import os
import shutil
import socket
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from voxray.config.flag_groups import as_range
from voxray.config.train import TrainSettings
from voxray.core.project_files import PROJECT_FILES
from voxray.core.units import GIB
from voxray.models.parts.packed_attention import takes_flash
from voxray.models.parts.quantize import base_dtype
from voxray.preflight.budget import GPUS
from voxray.preflight.findings import Findings

SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_BYTES = GIB
"""Recommended shared memory for Ray's object store; with less Ray uses the disk, which is slow."""
DASHBOARD_PORT = 8265


def check_libraries(findings: Findings) -> None:
    """Compare the installed versions with the ranges in pyproject.toml, which are those that the tests run with."""
    project = tomllib.loads((PROJECT_FILES / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    good, num_others = [], 0
    for requirement in map(Requirement, project["dependencies"]):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            findings.add("fix", "libraries", f"{requirement.name} is not installed; {requirement} is required")
            num_others += 1
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            good.append(f"{requirement.name} {installed}")
        else:
            num_others += 1
            expected = f"tested with {requirement.specifier} (pyproject.toml)"
            findings.add("warning", "libraries", f"{requirement.name} {installed}: {expected}")
    main = ", ".join(entry for entry in good if entry.split()[0] in ("torch", "transformers", "peft", "ray"))
    findings.add("ok", "libraries", f"{len(good)} of {len(good) + num_others} as tested: {main}")


def check_gpu(settings: TrainSettings, findings: Findings, gpu: str = "") -> None:
    """Report GPUs, driver and CUDA, and whether the GPUs support the precision of the settings.

    Args:
        gpu: Value of --gpu, of which only the precision is checked.
    """
    dtype = base_dtype(bf16=settings.bf16, fp16=settings.fp16)
    if gpu:
        has_bfloat16 = GPUS[gpu].has_bfloat16
        if dtype is torch.bfloat16 and not has_bfloat16:
            findings.add("fix", "gpu", f"--bf16: --gpu {gpu} has no bfloat16; take --fp16")
        elif settings.tf32 and not has_bfloat16:
            findings.add("warning", "gpu", f"--tf32 has no effect: --gpu {gpu} has no TF32")
        else:
            findings.add("unchecked", "gpu", f"--gpu {gpu}: its driver and its flash attention")
        _warn_of_float32(settings, findings)
        return
    if not torch.cuda.is_available():
        build = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch has no CUDA"
        findings.add(
            "unchecked", "gpu", f"this process sees no GPU ({build}): driver, bf16 and flash attention on a GPU"
        )
        return
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        properties = torch.cuda.get_device_properties(device)
        major, minor = torch.cuda.get_device_capability(device)
        free, total = torch.cuda.mem_get_info(device)
        flash = takes_flash(device, torch.bfloat16, 128, 0.0)
        message = f"{number}: {properties.name}, compute capability {major}.{minor}, {free / GIB:.1f} of"
        message += f" {total / GIB:.1f} GiB free, CUDA {torch.version.cuda}, driver {_driver()}"
        message += f", flash attention {'yes' if flash else 'no'}"
        findings.add("ok", "gpu", message)
        if dtype is torch.bfloat16 and major < 8:
            findings.add("fix", "gpu", f"--bf16: GPU {number} ({properties.name}) has no bfloat16; take --fp16")
        if settings.tf32 and major < 8:
            findings.add("warning", "gpu", f"--tf32 has no effect: GPU {number} ({properties.name}) has no TF32")
    _warn_of_float32(settings, findings)


def _warn_of_float32(settings: TrainSettings, findings: Findings) -> None:
    if not (settings.bf16 or settings.fp16) and settings.tuning != "full":
        findings.add("warning", "gpu", "float32: with --bf16 or --fp16 weights and activations take half the memory")


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # NVML fails in many ways, and the driver version is only information
        return "unknown"


def check_flags_need(settings: TrainSettings, findings: Findings) -> None:
    """Check the libraries and compilers that single flags need."""
    needs = {"bitsandbytes": settings.quantize != "none", "deepspeed": settings.strategy == "deepspeed"}
    flags = {"bitsandbytes": f"--quantize {settings.quantize}", "deepspeed": "--strategy deepspeed"}
    for name in settings.report_to:
        needs[name], flags[name] = True, f"--report_to {name}"
    for name, needed in needs.items():
        if needed and importlib.util.find_spec(name) is None:
            findings.add("fix", "libraries", f"{flags[name]}: needs {name}, which is not installed")
    if settings.compile and shutil.which("g++") is None and shutil.which("clang++") is None:
        findings.add("fix", "libraries", "--compile: needs a C++ compiler (g++), and there is none on PATH")


def check_shared_memory(findings: Findings, folder: Path = SHARED_MEMORY) -> None:
    """Check the shared memory for Ray's object store."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        findings.add("warning", "shared memory", f"{folder}: {error.strerror}; Ray's object store goes to the disk")
        return
    is_enough = free >= MIN_SHARED_BYTES
    advice = "" if is_enough else f"; Ray wants {MIN_SHARED_BYTES / GIB:g} (docker run --shm-size)"
    findings.add("ok" if is_enough else "warning", "shared memory", f"{folder}: {free / GIB:.1f} GiB free{advice}")


def check_ports(findings: Findings) -> None:
    """Check that this machine has free ports for Ray's processes."""
    try:
        with socket.socket() as listener:
            listener.bind(("", 0))
    except OSError as error:
        findings.add("fix", "ports", f"no port can be listened at: {error.strerror}")
        return
    with socket.socket() as probe:
        probe.settimeout(1)
        is_taken = probe.connect_ex(("127.0.0.1", DASHBOARD_PORT)) == 0
    if is_taken:
        findings.add("ok", "ports", f"{DASHBOARD_PORT} is taken, maybe by another Ray; the next free one will do")
    else:
        findings.add("ok", "ports", "free")


def check_cpus(settings: TrainSettings, resources: dict[str, int] | None, findings: Findings) -> None:
    """Check for CPUs and GPUs for the workers, and one more CPU: Ray Data hangs if training holds every CPU.

    Args:
        resources: CPUs and GPUs of the cluster at RAY_ADDRESS; None if the job starts Ray itself.
    """
    if settings.num_workers == "auto":
        workers = max(1, resources["GPU"] if resources else torch.cuda.device_count())
    else:
        workers = as_range(settings.num_workers)[0]
    if not workers:
        findings.add("ok", "resources", "--num_workers 0: trains in one process, without Ray")
    elif resources is None:
        cpus, gpus = usable_cpus(), torch.cuda.device_count()
        findings.add("ok", "resources", f"{cpus} CPUs, {gpus} GPUs; Ray is started for this job, with a CPU to spare")
        if workers > cpus and not gpus:
            message = f"--num_workers {settings.num_workers}: {cpus} CPUs, so that workers wait for each other"
            findings.add("warning", "resources", message)
    else:
        cpus, gpus = resources["CPU"], resources["GPU"]
        cluster = f"the cluster has or can start {cpus} CPUs and {gpus} GPUs"
        if not gpus and cpus < workers + 1:
            need = f"--num_workers {settings.num_workers} and one CPU to spare for Ray Data need {workers + 1} CPUs"
            findings.add("fix", "resources", f"{need}; {cluster}")
        elif gpus and gpus < workers:
            findings.add("fix", "resources", f"--num_workers {settings.num_workers} needs {workers} GPUs; {cluster}")
        else:
            findings.add("ok", "resources", cluster)


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
