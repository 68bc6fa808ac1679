"""Builds the wheel. pyproject.toml has everything else about the package.

In a checkout the jobs, their recipes and the demo's assets are outside the package, where people look for them. The
wheel gets a copy of them, as ``voxray/files/`` (see ``voxray/core/project_files.py``).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FILES = (
    "jobs",
    "tests/assets/speech",
    "tests/assets/voxtral-tiny",
    "tests/assets/whisper-tiny",
    "pyproject.toml",
    "runtime_env.yaml",
)


class BuildWithFiles(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in FILES:
            source, target = ROOT / name, Path(self.build_lib) / "voxray" / "files" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)


setup(cmdclass={"build_py": BuildWithFiles})
