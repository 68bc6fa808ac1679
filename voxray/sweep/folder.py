"""Prepares the folder of a sweep, for a new sweep or for one that resumes."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from voxray.core.console import console
from voxray.core.errors import SettingsError
from voxray.core.storage import write_json
from voxray.runs.inputs import refuse_changed_inputs, write_inputs
from voxray.runs.run_folder import CHANGEABLE_SETTINGS, make_folder, provenance, record_tasks, refuse_other_tasks
from voxray.sweep.trials import FOLDER

HAS_BFLOAT16 = "gpus_have_bfloat16"
"""Key of settings.json beside the settings."""
BEST, TABLE, REPORT = "best.yaml", "results.csv", "report.html"
RESUMABLE_CHANGES = {
    *("num_trials", "max_concurrent_trials", "top_k", "seeds", "resume", "overwrite"),
    *(CHANGEABLE_SETTINGS - {"num_workers", "max_steps", "epochs", "val_jsonl", "eval_steps", "eval_max_rows", "fp32"}),
}
"""Settings that may change when a sweep resumes, because its trials can still be compared."""


def open_sweep(output_dir: Path, settings: Any, inputs: Mapping[str, str], has_bfloat16: bool) -> bool:
    """Prepare the sweep's folder and write settings.json, inputs.json and provenance.json.

    Args:
        inputs: Result of ``runs.inputs.input_hashes``.
        has_bfloat16: Whether the GPUs compute in bfloat16.
    Returns:
        The same for the GPUs with which the sweep was started, because all trials have to compute in the same type.
    Raises:
        SettingsError: The folder holds another run or sweep, or this sweep and neither ``--resume`` nor ``--overwrite``
            is set.
    """
    make_folder(output_dir)
    path, current = output_dir / "settings.json", settings.model_dump(mode="json")
    previous = _read_settings(path)
    if previous and "recipe" not in previous:
        raise SettingsError(f"--output_dir {output_dir}: holds another run; give the sweep a folder of its own")
    if settings.overwrite:
        _clear(output_dir)
    elif any((output_dir / FOLDER).glob("*")):
        if not settings.resume:
            advice = "--resume finishes it, --overwrite starts it afresh"
            raise SettingsError(f"--output_dir {output_dir}: holds a sweep; {advice}")
        _refuse_other_sweep(output_dir, previous, current)
        refuse_changed_inputs(output_dir, inputs, "a sweep")
        refuse_other_tasks(output_dir, "a sweep", "use --overwrite or another --output_dir")
        has_bfloat16 = bool(previous.get(HAS_BFLOAT16, has_bfloat16))
    write_inputs(output_dir, inputs)
    write_json(path, {**current, HAS_BFLOAT16: has_bfloat16})
    write_json(output_dir / "provenance.json", provenance())
    record_tasks(output_dir)
    return has_bfloat16


def _read_settings(path: Path) -> dict[str, Any]:
    """Content of a settings file; {} if it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _refuse_other_sweep(output_dir: Path, previous: dict[str, Any], current: dict[str, Any]) -> None:
    advice = "use --overwrite or another --output_dir"
    if not previous:
        path = output_dir / "settings.json"
        raise SettingsError(f"{path}: damaged, so this sweep cannot be told from others; {advice}")
    changes = [
        f"--{name} (was {previous[name]}, now {value})"
        for name, value in current.items()
        if name not in RESUMABLE_CHANGES and previous.get(name, value) != value
    ]
    if changes:
        raise SettingsError(f"{output_dir} holds a sweep with other settings: {', '.join(changes)}; {advice}")


def _clear(output_dir: Path) -> None:
    """Delete the files of an earlier sweep, but not feature shards."""
    for name in (FOLDER, "ray"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    for name in (BEST, TABLE, REPORT):
        (output_dir / name).unlink(missing_ok=True)


def warn_of_few_validations(settings: Any) -> None:
    """Warn if the scheduler can never stop a trial: it decides at validations, and the last one ends the trial."""
    if settings.scheduler == "none" or bool(settings.eval_steps) != bool(settings.max_steps):
        return  # in the second case the number of steps per epoch is not known yet
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
