"""Whether this machine, and the cluster behind it, can run a job: libraries, GPU, disk, shared memory, ports, CPUs."""

import importlib.util
import os
import shutil
import socket
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from voxray.config.flag_groups import as_range
from voxray.config.parse import REPOSITORY
from voxray.config.train import TrainSettings
from voxray.core.units import GIB
from voxray.models.parts.packed_attention import takes_flash
from voxray.models.parts.quantize import base_dtype
from voxray.preflight.findings import Findings

SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_BYTES = GIB
"""What Ray's object store should have in shared memory; with less it goes to the disk, and is slow."""
DASHBOARD_PORT = 8265
MEMINFO, CGROUPS = (
    Path("/proc/meminfo"),
    (
        (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
        (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
    ),
)


def check_libraries(findings: Findings) -> None:
    """Hold what is installed against the ranges of pyproject.toml, which are those that the tests have run with."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, others = [], 0
    for requirement in map(Requirement, project["dependencies"]):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            findings.add("fix", "libraries", f"{requirement.name} is not installed; needed is {requirement}")
            others += 1
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} {installed}")
        else:
            others += 1
            wanted = f"known to work is {requirement.specifier} (pyproject.toml)"
            findings.add("warning", "libraries", f"{requirement.name} {installed}: {wanted}")
    shown = ", ".join(entry for entry in found if entry.split()[0] in ("torch", "transformers", "peft", "ray"))
    findings.add("ok", "libraries", f"{len(found)} of {len(found) + others} as known to work: {shown}")


def check_gpu(settings: TrainSettings, findings: Findings) -> None:
    """GPU, driver and CUDA, and whether they compute what the settings ask for."""
    if not torch.cuda.is_available():
        build = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch has no CUDA"
        findings.add(
            "unchecked", "gpu", f"no GPU in reach of this process ({build}): driver, bf16 and flash attention on a GPU"
        )
        return
    dtype = base_dtype(bf16=settings.bf16, fp16=settings.fp16)
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        properties = torch.cuda.get_device_properties(device)
        major, minor = torch.cuda.get_device_capability(device)
        free, total = torch.cuda.mem_get_info(device)
        flash = takes_flash(device, torch.bfloat16, 128, 0.0)
        told = f"{number}: {properties.name}, compute capability {major}.{minor}, {free / GIB:.1f} of"
        told += f" {total / GIB:.1f} GiB free, CUDA {torch.version.cuda}, driver {_driver()}"
        told += f", flash attention {'yes' if flash else 'no'}"
        findings.add("ok", "gpu", told)
        if dtype is torch.bfloat16 and major < 8:
            findings.add("fix", "gpu", f"--bf16: GPU {number} ({properties.name}) has no bfloat16; take --fp16")
        if settings.tf32 and major < 8:
            findings.add("warning", "gpu", f"--tf32 has no effect: GPU {number} ({properties.name}) has no TF32")
    if dtype is torch.float32 and settings.tuning != "full":
        findings.add("warning", "gpu", "neither --bf16 nor --fp16: weights and activations take twice the memory")


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # NVML's absence has many forms, and costs a word of the report
        return "unknown"


def check_flags_need(settings: TrainSettings, findings: Findings) -> None:
    """Libraries that single flags need."""
    needs = {"bitsandbytes": settings.quantize != "none", "deepspeed": settings.strategy == "deepspeed"}
    flags = {"bitsandbytes": f"--quantize {settings.quantize}", "deepspeed": "--strategy deepspeed"}
    for name, needed in needs.items():
        if needed and importlib.util.find_spec(name) is None:
            findings.add("fix", "libraries", f"{flags[name]}: needs {name}, which is not installed")
    if settings.compile and shutil.which("g++") is None and shutil.which("clang++") is None:
        findings.add("fix", "libraries", "--compile: needs a C++ compiler (g++), and there is none on PATH")


def check_shared_memory(findings: Findings, folder: Path = SHARED_MEMORY) -> None:
    """Room for Ray's object store."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        findings.add("warning", "shared memory", f"{folder}: {error.strerror}; Ray's object store goes to the disk")
        return
    enough = free >= MIN_SHARED_BYTES
    advice = "" if enough else f"; Ray wants {MIN_SHARED_BYTES / GIB:g} (docker run --shm-size)"
    findings.add("ok" if enough else "warning", "shared memory", f"{folder}: {free / GIB:.1f} GiB free{advice}")


def check_ports(findings: Findings) -> None:
    """Whether Ray's processes will find each other: free ports of this machine."""
    try:
        with socket.socket() as free:
            free.bind(("", 0))
    except OSError as error:
        findings.add("fix", "ports", f"no port can be listened at: {error.strerror}")
        return
    with socket.socket() as probe:
        probe.settimeout(1)
        taken = probe.connect_ex(("127.0.0.1", DASHBOARD_PORT)) == 0
    if taken:
        findings.add("ok", "ports", f"{DASHBOARD_PORT} is taken, maybe by another Ray; the next free one will do")
    else:
        findings.add("ok", "ports", "free")


def check_cpus(settings: TrainSettings, resources: dict[str, float] | None, findings: Findings) -> None:
    """CPUs and GPUs for the workers, and one CPU more: Ray Data hangs when training holds every CPU.

    Args:
        resources: Of the cluster that RAY_ADDRESS names; None if the job starts a Ray of its own.
    """
    if settings.num_workers == "auto":
        workers = max(1, torch.cuda.device_count())
    else:
        workers = as_range(settings.num_workers)[0]
    if not workers:
        findings.add("ok", "resources", "--num_workers 0: trains in one process, without Ray")
    elif resources is None:
        cpus, gpus = usable_cpus(), torch.cuda.device_count()
        findings.add("ok", "resources", f"{cpus} CPUs, {gpus} GPUs; Ray is started for this job, with a CPU to spare")
        if workers > cpus and not gpus:
            few = f"--num_workers {settings.num_workers}: {cpus} CPUs, so that workers wait for each other"
            findings.add("warning", "resources", few)
    else:
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        told = f"cluster: {cpus} CPUs, {gpus} GPUs"
        if cpus < workers + 1:
            need = f"--num_workers {settings.num_workers} and one CPU to spare for Ray Data need {workers + 1} CPUs"
            findings.add("fix", "resources", f"{need}; {told}")
        elif gpus and gpus < workers:
            few = f"{told}: so few GPUs for --num_workers {settings.num_workers} that all would train on CPUs"
            findings.add("fix", "resources", few)
        else:
            findings.add("ok", "resources", told)


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def free_memory_bytes() -> int:
    """Memory of this machine that is free, or of the container that this process is in, whichever is less."""
    return min(_free_of_machine(), *_free_of_containers())


def _free_of_machine() -> int:
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _free_of_containers() -> Iterator[int]:
    yield 2**62
    for limit, used in CGROUPS:
        try:
            yield max(0, int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue


def free_disk_bytes(place: Path) -> int:
    """What is free where a folder is or would be."""
    there = next(folder for folder in (place, *place.parents) if folder.is_dir())
    return shutil.disk_usage(there).free
