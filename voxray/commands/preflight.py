"""The preflight job: run the checks, report them, write the launch file, start the training if asked."""

import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from voxray.core.console import console
from voxray.core.errors import RunError
from voxray.core.storage import write_json
from voxray.preflight.check_run import Preflight
from voxray.preflight.fit_settings import FittedSettings
from voxray.preflight.report import (
    format_command,
    launch_command,
    launch_values,
    memory_table,
    show_findings,
    write_launch_file,
)
from voxray.runs.run_folder import provenance
from voxray.training.loop import warmup_warning

CHANGED = ("per_device_bsz", "pack_tokens", "grad_accum", "grad_ckpt", "num_workers", "loader_workers")
"""Settings that a preflight may change."""


def run_preflight(settings: Any, why: str = "") -> None:
    """Run a preflight. With ``--autorun`` the training then replaces this process.

    Args:
        why: Reason for which the recipe was chosen, for the report.
    Raises:
        RunError: Something has to be corrected first. The report names all of it.
    """
    preflight = Preflight(settings)
    if why:
        preflight.findings.add("ok", "recipe", why)
    preflight.check()
    command = report_preflight(preflight)
    if command and settings.autorun:
        console.print("starting it", markup=False)
        sys.stdout.flush()
        os.execv(command[0], command)  # so its exit status is ours, and it receives our signals


def report_preflight(preflight: Preflight, *, show_command: bool = True) -> list[str]:
    """Print the findings and write preflight.json and the launch file.

    Args:
        show_command: Print the command that starts the training.
    Returns:
        The command that starts the training.
    Raises:
        RunError: Something has to be corrected first.
    """
    findings, decision, folder = preflight.findings, preflight.decision, preflight.folder
    show_findings(findings)
    if decision and decision.pack:
        console.print(memory_table(decision.pack.need))
    for line in decision.changes if decision else ():
        console.print(f"changed: {line}", markup=False)
    for line in _time_lines(preflight):
        console.print(line, markup=False)
    to_fix, command = findings.to_fix, list[str]()
    if folder:
        if not to_fix and decision:
            command = _write_launch_file(preflight, decision, folder)
        write_json(folder / "preflight.json", figures(preflight, command))
    if to_fix:
        for finding in to_fix:
            print(f"error: {finding.about}: {finding.message}", file=sys.stderr, flush=True)
        where = f"; all that was found is in {folder / 'preflight.json'}" if folder else ""
        raise RunError(f"{len(to_fix)} thing(s) must be fixed first{where}")
    if not show_command:
        return command
    console.print(f"preflight.json and {preflight.job}.yaml in {folder}", markup=False)
    console.print(f"start it with: {format_command(command)}", markup=False)
    return command


def _write_launch_file(preflight: Preflight, decision: FittedSettings, folder: Path) -> list[str]:
    """Write the user's settings with the changes of the preflight; returns the command that uses the file."""
    before, after = preflight.settings, decision.settings
    changed = {name for name in CHANGED if getattr(before, name) != getattr(after, name)}
    launched = before.model_copy(update={name: getattr(after, name) for name in changed})
    path = folder / f"{preflight.job}.yaml"
    write_launch_file(path, preflight.job, launch_values(launched, changed), decision.changes)
    return launch_command(preflight.job, path)


def _time_lines(preflight: Preflight) -> list[str]:
    """Lines on the estimated duration and cost of the run."""
    time = preflight.time
    if time is None:
        return []
    if time.training_sec is None:
        return [f"time: {time.num_steps} steps; how long one takes was not measured"]
    line = f"time: {time.num_steps} steps in about {_clock(time.training_sec)}"
    if time.num_validations:
        each = "not measured" if time.validation_sec is None else f"about {_clock(time.validation_sec)}"
        line += f", {time.num_validations} validation(s) in {each}"
    price = preflight.price()
    warning = warmup_warning(preflight.settings, time.num_steps)
    return [
        line,
        *([warning] if warning else []),
        *([f"cost: about {price:.2f} at {preflight.flags.price_per_hour:g} an hour"] if price else []),
    ]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(1, round(seconds))))


def figures(preflight: Preflight, command: list[str]) -> dict[str, Any]:
    """The content of preflight.json."""
    decision, memory = preflight.decision, dict[str, Any]()
    if decision and decision.pack:
        need, budget = decision.pack.need, decision.budget
        memory["memory"] = {
            "entries": [asdict(entry) for entry in need.entries],
            "moments": need.moments,
            "predicted_bytes": need.peak_bytes,
            "measured_bytes": decision.largest.peak_bytes + need.waste_bytes if decision.largest else None,
            "budget": asdict(budget) if budget else None,
            "fits": decision.fits,
            "largest_pack": asdict(decision.pack.shape),
        }
        memory["changes"] = decision.changes
        memory["average_step"] = asdict(decision.average) if decision.average else None
        memory["answering"] = asdict(decision.answering) if decision.answering else None
    return {
        "job": preflight.job,
        "ready": not preflight.findings.to_fix,
        "findings": [asdict(finding) for finding in preflight.findings.all],
        "parameters": preflight.roles,
        **memory,
        "time": asdict(preflight.time) if preflight.time else None,
        "cost": preflight.price(),
        "command": command,
        "provenance": provenance(),
    }
