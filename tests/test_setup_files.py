"""What a fresh clone stands on: tools/setup.py, constraints.txt, pyproject.toml, the Makefile and .ci/run."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("voxray_setup_script", ROOT / "tools" / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match.group()).lower()


# constraints.txt


EXTRAS = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "tensorrt"}


@pytest.mark.parametrize("requirement", PROJECT["dependencies"] + [line for extra in EXTRAS.values() for line in extra])
def test_every_dependency_is_pinned_within_its_range(requirement: str, setup_script: ModuleType) -> None:
    from packaging.requirements import Requirement

    pins = setup_script.read_pins(ROOT / "constraints.txt")
    name = package_name(requirement)
    assert name in pins
    assert Requirement(requirement).specifier.contains(pins[name])


def test_tensorrt_is_that_of_the_pinned_torch(setup_script: ModuleType) -> None:
    """It is numbered after the torch that it is made for, and gigabytes that only a GPU machine has a use for."""
    from packaging.requirements import Requirement

    pins = setup_script.read_pins(ROOT / "constraints.txt")
    (line,) = PROJECT["optional-dependencies"]["tensorrt"]
    assert Requirement(line).specifier.contains(pins["torch"]) and package_name(line) not in pins


def test_constraints_hold_for_every_machine(setup_script: ModuleType) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert len(setup_script.read_pins(ROOT / "constraints.txt")) == len(lines), "one name==version per line, none twice"
    assert not [line for line in lines if "+" in line], "a local version such as +cpu would shut out other machines"


def test_the_installed_versions_are_the_pinned_ones(setup_script: ModuleType) -> None:
    from importlib.metadata import version

    pins = setup_script.read_pins(ROOT / "constraints.txt")
    for name in ("torch", "ray", "transformers", "peft", "pyarrow"):
        assert version(name).split("+")[0] == pins[name]


# tools/setup.py


@pytest.mark.parametrize("version", [(3, 11), (3, 12, 1)])
def test_python_accepted(version: tuple[int, ...], setup_script: ModuleType) -> None:
    setup_script.check_python(version)


@pytest.mark.parametrize("version", [(2, 7), (3, 10, 13), (3, 13, 0)])
def test_python_refused(version: tuple[int, ...], setup_script: ModuleType) -> None:
    with pytest.raises(setup_script.SetupError, match=r"3\.11 or 3\.12 needed"):
        setup_script.check_python(version)


def test_missing_compiler_says_what_to_install(
    setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup_script.SetupError, match=r"apt-get install g\+\+"):
        setup_script.check_compiler()

    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    setup_script.check_compiler()


@pytest.mark.parametrize(("status", "gpu"), [(0, True), (9, False), (None, False)])
def test_gpu_is_what_the_driver_says(
    status: int | None, gpu: bool, setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if status is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_script.has_gpu() is gpu


def test_a_gpu_refuses_cpu_builds_of_torch(setup_script: ModuleType) -> None:
    from packaging.specifiers import SpecifierSet

    def accepts(requirement: str, version: str) -> bool:
        return SpecifierSet(requirement.removeprefix("torch")).contains(version)

    on_cpu = setup_script.torch_requirement("2.13.0", gpu=False, index=None)
    on_gpu = setup_script.torch_requirement("2.13.0", gpu=True, index=None)
    from_index = setup_script.torch_requirement("2.13.0", gpu=True, index="https://example.invalid/cu130")
    assert accepts(on_cpu, "2.13.0+cpu") and accepts(on_cpu, "2.13.0")
    assert accepts(on_gpu, "2.13.0") and not accepts(on_gpu, "2.13.0+cpu")
    assert accepts(from_index, "2.13.0+cu130")


def test_requirements_leave_torch_to_its_own_step(setup_script: ModuleType) -> None:
    names = {package_name(line) for line in setup_script.read_requirements(ROOT / "pyproject.toml", ["dev"])}
    assert {"ray", "transformers", "pytest"} <= names
    assert not names & {"torch", "torchaudio", "gradio"}
    with pytest.raises(setup_script.SetupError, match="nonsense"):
        setup_script.read_requirements(ROOT / "pyproject.toml", ["nonsense"])


def fake_torchaudio(folder: Path, *, works_without_extension: bool = True) -> Path:
    """Make a package that, like the one on PyPI, fails to import while its extension is there."""
    lib = folder / "torchaudio" / "lib"
    lib.mkdir(parents=True)
    (lib / "__init__.py").touch()
    (lib / "_torchaudio.abi3.so").touch()
    (lib / "libtorchaudio.abi3.so").touch()
    condition = "list(Path(__file__).parent.glob('lib/*.so'))" if works_without_extension else "True"
    (lib.parent / "__init__.py").write_text(
        f"from pathlib import Path\nif {condition}:\n    raise OSError('libcudart.so.13: cannot open shared object')\n"
    )
    return lib


def fake_python(folder: Path) -> Path:
    """Make an interpreter whose site-packages is this folder."""
    python = folder / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'case "$2" in *sysconfig*) echo "{folder}" ;; *) PYTHONPATH="{folder}" exec "{sys.executable}" "$@" ;; esac\n'
    )
    python.chmod(0o755)
    return python


def test_torchaudio_extension_is_moved_aside(setup_script: ModuleType, tmp_path: Path) -> None:
    lib = fake_torchaudio(tmp_path)
    setup_script.repair_torchaudio(fake_python(tmp_path))
    assert sorted(path.name for path in (lib / "cuda-linked").iterdir()) == [
        "_torchaudio.abi3.so",
        "libtorchaudio.abi3.so",
    ]
    assert not list(lib.glob("*.so"))
    assert (lib / "__init__.py").exists()
    setup_script.repair_torchaudio(fake_python(tmp_path))  # the second set-up finds nothing to do


def test_torchaudio_that_imports_is_left_alone(setup_script: ModuleType, tmp_path: Path) -> None:
    lib = fake_torchaudio(tmp_path)
    (lib.parent / "__init__.py").write_text("")
    setup_script.repair_torchaudio(fake_python(tmp_path))
    assert len(list(lib.glob("*.so"))) == 2
    assert not (lib / "cuda-linked").exists()


def test_torchaudio_beyond_repair_is_an_error(setup_script: ModuleType, tmp_path: Path) -> None:
    fake_torchaudio(tmp_path, works_without_extension=False)
    with pytest.raises(setup_script.SetupError, match="libcudart"):
        setup_script.repair_torchaudio(fake_python(tmp_path))


def test_pip_failure_is_shown(setup_script: ModuleType, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found for voxray-nonsense'\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(setup_script.SetupError, match="No matching distribution"):
        setup_script.pip_install(python, "nonsense", "voxray-nonsense")


def test_a_failed_setup_leaves_no_stamp(
    setup_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stamp = tmp_path / ".setup-done"
    stamp.touch()

    def fail() -> None:
        raise setup_script.SetupError("no venv today")

    monkeypatch.setattr(setup_script, "STAMP", stamp)
    monkeypatch.setattr(setup_script, "make_venv", fail)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    assert setup_script.main() == 1
    assert "no venv today" in capsys.readouterr().err
    assert not stamp.exists()


# Makefile and .ci/run


def test_make_without_python_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text(encoding="utf-8"))
    for name in ("constraints.txt", "pyproject.toml", "tools/setup.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    result = subprocess.run(["make", "setup", "PYTHON="], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "Python 3.11 or 3.12" in result.stderr.splitlines()[0]


def test_ci_runs_lint_and_ends_with_the_readmes_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    commands = re.findall(r"^make \w+", text, flags=re.MULTILINE)
    assert commands == ["make setup", "make lint", "make test"]
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_script_parses() -> None:
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True, timeout=60)
