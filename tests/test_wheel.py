"""The wheel has all that the jobs read, and its command works in an empty folder outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.running import ROOT, environment


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables with which Python finds the installed wheel before the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # a copy, because setuptools writes into the folder that it builds
    names = ["voxray", "jobs", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "pyproject.toml", "runtime_env.yaml"]
    copy = folder / "checkout"
    (copy / "tests").mkdir(parents=True)
    for name in [*names, "tests/assets"]:
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy / name)], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(copy)], check=True, timeout=200
    )
    [wheel] = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "voxray/files/jobs/train_text.py" in names and "voxray/files/tests/assets/voxtral-tiny/config.json" in names
    assert not [name for name in names if name.startswith(("tests/", "jobs/")) or "__pycache__" in name]
    assert wheel.stat().st_size < 15 << 20
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, timeout=200
    )
    return {**environment(), "PYTHONPATH": str(folder / "site")}


def voxray(variables: dict[str, str], folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "voxray", *words]
    return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_jobs_run_in_an_empty_folder(installed: dict[str, str], tmp_path: Path) -> None:
    code = "import voxray, sys; print(voxray.__file__); sys.exit(not voxray.__file__.startswith(sys.argv[1]))"
    site = installed["PYTHONPATH"]
    process = subprocess.run([sys.executable, "-c", code, site], env=installed, cwd=tmp_path, capture_output=True)
    assert process.returncode == 0, process.stdout
    process = voxray(installed, tmp_path, "infer")
    assert process.returncode == 0 and process.stdout.count("asr.val.jsonl:") == 4, process.stdout + process.stderr
    process = voxray(installed, tmp_path, "train_text", "--config", "jobs/configs/train_text.yaml", "--check_flags")
    assert process.returncode == 0 and "the flags are valid" in process.stdout, process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["runs"])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_demo_runs_from_the_wheel(installed: dict[str, str], tmp_path: Path) -> None:
    process = voxray(installed, tmp_path, "quickstart")
    assert process.returncode == 0, process.stdout + process.stderr
    assert (tmp_path / "runs" / "demo" / "summary.json").is_file() and "held-out rows" in process.stdout
    provenance = (tmp_path / "runs" / "demo" / "train" / "provenance.json").read_text()
    assert '"git": null' in provenance or '"git":null' in provenance, os.listdir(tmp_path)
