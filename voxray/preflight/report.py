"""Output of a preflight: the findings, the memory table, the launch file, and the command to start the run."""

import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from voxray.config.flags import flag_metadata
from voxray.config.train import TrainSettings
from voxray.core.console import console
from voxray.core.project_files import job_script
from voxray.core.storage import write_atomically
from voxray.core.units import MIB
from voxray.preflight.findings import Findings
from voxray.preflight.memory import MemoryNeed
from voxray.runs.run_folder import resolve_output_dir

MARKS = {"ok": "ok", "warning": "warning", "unchecked": "not checked"}


def show_findings(findings: Findings) -> None:
    """Print the findings, one line each, but for those to fix, which follow as errors."""
    for finding in findings.all:
        if finding.level == "fix":
            continue
        console.print(f"{MARKS[finding.level]:>13}  {finding.about}: {finding.message}", markup=False)


def memory_table(need: MemoryNeed) -> Table:
    """A table of the memory that is always in use, the entries of the peak phase, and the totals of other phases."""
    table = Table(title="memory of one worker, predicted", title_justify="left")
    for name in ("when", "cause", "MiB"):
        table.add_column(name, justify="right" if name == "MiB" else "left")
    for at in ("", need.peak_moment):
        for entry in need.entries:
            if entry.at == at:
                table.add_row(at or "always", entry.cause, f"{entry.num_bytes / MIB:,.1f}")
    table.add_row(need.peak_moment, "in all, the peak", f"{need.peak_bytes / MIB:,.1f}", end_section=True)
    for moment, num_bytes in need.moments.items():
        if moment != need.peak_moment:
            table.add_row(moment, "in all", f"{num_bytes / MIB:,.1f}")
    return table


def launch_values(settings: TrainSettings, changed: set[str]) -> dict[str, Any]:
    """Values for a YAML file that starts the same run: the user's settings and the changed ones, with absolute outputs.

    Args:
        changed: Fields that the preflight changed.
    """
    fields = settings.model_fields_set | changed
    values = {name: value for name, value in settings.model_dump(mode="json").items() if name in fields}
    for name, value in values.items():
        is_output = flag_metadata(type(settings).model_fields[name]).path == "output"
        if is_output and value and "://" not in value and not value.startswith("~"):
            values[name] = str(resolve_output_dir(value, settings.storage_path, flag=f"--{name}"))
    return values


def write_launch_file(path: Path, job: str, values: dict[str, Any], changes: list[str]) -> None:
    """Write the settings as a file for the job's --config, with a comment for every change."""
    comments = "".join(f"# {line}\n" for line in (f"made by preflight, for {job} --config", *changes))
    write_atomically(path, (comments + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)).encode())


def launch_command(job: str, config: Path) -> list[str]:
    """The command that starts the training run."""
    script = job_script(job)
    return [sys.executable, *([str(script)] if script.is_file() else ["-m", job]), "--config", str(config)]


def format_command(command: list[str]) -> str:
    """The command as typed in a shell."""
    return shlex.join(command)
