"""What a preflight shows and writes: the findings, the table of memory, the settings to launch, and the command."""

import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from voxray.config.parse import REPOSITORY, flag_metadata
from voxray.config.train import TrainSettings
from voxray.core.console import console
from voxray.core.storage import write_atomically
from voxray.core.units import MIB
from voxray.preflight.findings import Findings
from voxray.preflight.memory import MemoryNeed
from voxray.runs.run_folder import resolve_output_dir

MARKS = {"ok": "ok", "warning": "warning", "fix": "must be fixed", "unchecked": "not checked"}


def show_findings(findings: Findings) -> None:
    """One line for each, by what was looked at."""
    for finding in findings.all:
        console.print(f"{MARKS[finding.level]:>13}  {finding.about}: {finding.message}", markup=False)


def memory_table(need: MemoryNeed) -> Table:
    """What is there always, what comes to it at the fullest moment, and what the other moments come to in all."""
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
    """What a YAML file has to say for the same run: what was given or changed, outputs as absolute folders.

    Args:
        changed: Fields that the preflight set.
    """
    kept = settings.model_fields_set | changed
    values = {name: value for name, value in settings.model_dump(mode="json").items() if name in kept}
    for name in values:
        kind = flag_metadata(type(settings).model_fields[name]).path
        if kind == "output" and values[name] and "://" not in values[name] and not values[name].startswith("~"):
            values[name] = str(resolve_output_dir(values[name], settings.storage_path, flag=f"--{name}"))
    return values


def write_launch_file(path: Path, job: str, values: dict[str, Any], changes: list[str]) -> None:
    """The settings as a file that the job takes as --config, with a comment for every change."""
    head = "".join(f"# {line}\n" for line in (f"made by preflight, for {job} --config", *changes))
    write_atomically(path, (head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)).encode())


def launch_command(job: str, config: Path) -> list[str]:
    """The command that starts the training."""
    return [sys.executable, str(REPOSITORY / "jobs" / f"{job}.py"), "--config", str(config)]


def shown(command: list[str]) -> str:
    """A command as one types it."""
    return shlex.join(command)
