"""The folder of a sweep: made ready for a new one, or for one that goes on."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from voxray.core.console import console
from voxray.core.errors import SettingsError
from voxray.core.storage import write_json
from voxray.runs.run_folder import MAY_CHANGE, make_folder, provenance
from voxray.sweep.trials import FOLDER

BEST, TABLE, REPORT = "best.yaml", "results.csv", "report.html"
GOES_ON_WITH = {
    *("num_trials", "max_concurrent_trials", "top_k", "seeds", "resume", "overwrite"),
    *(MAY_CHANGE - {"num_workers", "max_steps", "epochs", "val_jsonl", "eval_steps", "eval_max_rows"}),
}
"""Settings that a sweep may go on with changed: its trials can still be compared."""


def open_sweep(output_dir: Path, settings: Any) -> None:
    """Make the sweep's folder ready.

    Raises:
        SettingsError: It holds something else than this sweep, or a sweep without ``--resume`` or ``--overwrite``.
    """
    make_folder(output_dir)
    path, now = output_dir / "settings.json", settings.model_dump(mode="json")
    before = _read_settings(path)
    if before and "recipe" not in before:
        raise SettingsError(f"--output_dir {output_dir}: holds another run; give the sweep a folder of its own")
    if settings.overwrite:
        _clear(output_dir)
    elif any((output_dir / FOLDER).glob("*")):
        if not settings.resume:
            advice = "--resume finishes it, --overwrite starts it afresh"
            raise SettingsError(f"--output_dir {output_dir}: holds a sweep; {advice}")
        _refuse_other_sweep(output_dir, before, now)
    write_json(path, now)
    write_json(output_dir / "provenance.json", provenance())


def _read_settings(path: Path) -> dict[str, Any]:
    """{} if there are none, or they are damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _refuse_other_sweep(output_dir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    if not before:
        advice = "use --overwrite or another --output_dir"
        raise SettingsError(
            f"{output_dir / 'settings.json'}: damaged, so this sweep cannot be told from others; {advice}"
        )
    changed = [name for name in now if name not in GOES_ON_WITH and before.get(name, now[name]) != now[name]]
    if changed:
        shown = ", ".join(f"--{name} (was {before[name]}, now {now[name]})" for name in changed)
        advice = "use --overwrite or another --output_dir"
        raise SettingsError(f"{output_dir} holds a sweep with other settings: {shown}; {advice}")


def _clear(output_dir: Path) -> None:
    """Delete what a sweep wrote, and nothing else; feature shards stay."""
    for name in (FOLDER, "ray"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for name in (BEST, TABLE, REPORT):
        (output_dir / name).unlink(missing_ok=True)


def warn_of_few_validations(settings: Any) -> None:
    """Say so where no trial can ever be stopped: a trial is judged at its validations, the last of which is its end."""
    if settings.scheduler == "none" or bool(settings.eval_steps) != bool(settings.max_steps):
        return  # or the steps of an epoch are not known yet
    if settings.max_steps:
        last = (settings.max_steps - 1) // settings.eval_steps * settings.eval_steps
    else:
        last = math.inf if settings.epochs > 1 else 0
    if last < settings.grace_steps:
        console.print(
            f"warning: --scheduler {settings.scheduler} stops no trial: before its last step there is no validation "
            f"(--eval_steps) from step {settings.grace_steps} (--grace_steps) on",
            markup=False,
        )
