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
from voxray.preflight.report import launch_command, launch_values, memory_table, show_findings, shown, write_launch_file
from voxray.runs.run_folder import provenance

CHANGED = ("per_device_bsz", "pack_tokens", "grad_accum", "grad_ckpt", "num_workers", "loader_workers")
"""Settings that a preflight may change."""


def run_preflight(settings: Any, why: str = "") -> None:
    """Run a preflight from checked settings; with --autorun the training takes this process' place at the end.

    Args:
        why: Why the recipe was chosen, for people.
    Raises:
        RunError: Something has to be put right first; all of it has been said.
    """
    flight = Preflight(settings)
    if why:
        flight.findings.add("ok", "recipe", why)
    flight.look()
    command = report_preflight(flight)
    if command and settings.autorun:
        console.print("starting it", markup=False)
        sys.stdout.flush()
        os.execv(command[0], command)  # its exit status is ours, and signals go to it


def report_preflight(flight: Preflight) -> list[str]:
    """Show and write what was found.

    Returns:
        The command that starts the training.
    Raises:
        RunError: Something has to be put right first.
    """
    findings, decision = flight.findings, flight.decision
    show_findings(findings)
    if decision and decision.pack:
        console.print(memory_table(decision.pack.need))
    for line in decision.changes if decision else ():
        console.print(f"changed: {line}", markup=False)
    for line in _told_time(flight):
        console.print(line, markup=False)
    to_fix, command = findings.to_fix, list[str]()
    if flight.folder:
        if not to_fix and decision:
            command = _write_launch(flight, decision, flight.folder)
        write_json(flight.folder / "preflight.json", figures(flight, command))
    if to_fix:
        for finding in to_fix:
            print(f"error: {finding.about}: {finding.message}", file=sys.stderr, flush=True)
        where = f"; all that was found is in {flight.folder / 'preflight.json'}" if flight.folder else ""
        raise RunError(f"{len(to_fix)} thing(s) must be fixed first{where}")
    console.print(f"preflight.json and {flight.job}.yaml in {flight.folder}", markup=False)
    console.print(f"start it with: {shown(command)}", markup=False)
    return command


def _write_launch(flight: Preflight, decision: FittedSettings, folder: Path) -> list[str]:
    """Write the settings to launch: those asked for, with the changes."""
    before, after = flight.asked, decision.settings
    changed = {name for name in CHANGED if getattr(before, name) != getattr(after, name)}
    launched = before.model_copy(update={name: getattr(after, name) for name in changed})
    path = folder / f"{flight.job}.yaml"
    write_launch_file(path, flight.job, launch_values(launched, changed), decision.changes)
    return launch_command(flight.job, path)


def _told_time(flight: Preflight) -> list[str]:
    """Lines on how long the run will take, and what it will cost."""
    time = flight.time
    if time is None:
        return []
    if time.training_sec is None:
        return [f"time: {time.num_steps} steps; how long one takes was not measured"]
    told = f"time: {time.num_steps} steps in about {_clock(time.training_sec)}"
    if time.num_validations:
        each = "not measured" if time.validation_sec is None else f"about {_clock(time.validation_sec)}"
        told += f", {time.num_validations} validation(s) in {each}"
    price = flight.price()
    return [told, *([f"cost: about {price:.2f} at {flight.flags.price_per_hour:g} an hour"] if price else [])]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(1, round(seconds))))


def figures(flight: Preflight, command: list[str]) -> dict[str, Any]:
    """Everything found, as it stands in preflight.json."""
    decision, found = flight.decision, dict[str, Any]()
    if decision and decision.pack:
        need, budget = decision.pack.need, decision.budget
        found["memory"] = {
            "entries": [asdict(entry) for entry in need.entries],
            "moments": need.moments,
            "predicted_bytes": need.peak_bytes,
            "measured_bytes": decision.largest.peak_bytes if decision.largest else None,
            "budget": asdict(budget) if budget else None,
            "fits": decision.fits,
            "largest_pack": asdict(decision.pack.shape),
        }
        found["changes"] = decision.changes
        found["average_step"] = asdict(decision.average) if decision.average else None
        found["answering"] = asdict(decision.answering) if decision.answering else None
    return {
        "job": flight.job,
        "ready": not flight.findings.to_fix,
        "findings": [asdict(finding) for finding in flight.findings.all],
        "parameters": flight.roles,
        **found,
        "time": asdict(flight.time) if flight.time else None,
        "cost": flight.price(),
        "command": command,
        "provenance": provenance(),
    }
