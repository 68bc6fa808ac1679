"""The command ``voxray``: every job by its name, the version, and the settings of the jobs."""

import importlib.util
import sys
from types import ModuleType
from typing import NoReturn

from voxray.core.errors import print_page
from voxray.core.project_files import job_names, job_script
from voxray.core.version import __version__

ALIASES = {"train": "train_multitask"}
USAGE = """voxray JOB [flags]              run a job; voxray JOB --help explains its flags
voxray JOB                      run the job's small demo
voxray schema JOB               print the JSON schema of the job's settings, for editors
voxray reference JOB            print all flags of the job in Markdown
voxray --version

jobs: """


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: Status 2 for a word that is neither a job nor a command of ``voxray``; otherwise the job's status.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--version", "-V"):
        print(f"voxray {__version__}")
    elif command in ("--help", "-h", "help"):
        print_page(USAGE + ", ".join(job_names()))
    elif command in ("schema", "reference"):
        if len(rest) != 1:
            _refuse(f"{command} takes the name of one job")
        _load(rest[0]).main([f"--{command}"])
    else:
        _load(command).main(rest)


def _load(name: str) -> ModuleType:
    """The script of a job as a module. Dashes in the name count as underscores."""
    job = ALIASES.get(name, name.replace("-", "_"))
    if job not in job_names():
        _refuse(f"{name}: not one of the jobs {', '.join(job_names())}")
    spec = importlib.util.spec_from_file_location(f"voxray_job_{job}", job_script(job))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
