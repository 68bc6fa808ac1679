"""The new job: one's own data to a project folder with manifests, settings that fit, and the commands to run."""

import shutil
from pathlib import Path
from typing import Any

from voxray.commands.preflight import report_preflight
from voxray.commands.prepare import run_prepare_job
from voxray.config.new import NewSettings
from voxray.config.parse import settings_from
from voxray.config.preflight import preflight_settings
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError
from voxray.core.project_files import typed_command
from voxray.core.storage import write_atomically
from voxray.preflight.check_run import Preflight
from voxray.preflight.report import launch_values, write_launch_file
from voxray.runs.run_folder import make_folder, resolve_output_dir

SETTINGS_FILE = "train.yaml"


def run_new(settings: NewSettings) -> list[str]:
    """Prepare the data, check the machine, and write ``train.yaml`` into the new folder.

    Returns:
        The commands that train, evaluate and transcribe.
    Raises:
        RunError: The data has no usable row or leaks between training and validation.
        SettingsError: The folder holds files already.
    """
    folder = resolve_output_dir(settings.project, settings.storage_path, flag="--project")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SettingsError(f"--project {settings.project}: holds files already; name a new folder")
    make_folder(folder, "--project")
    try:
        run_prepare_job(settings, show_next=False)
    except RunError:
        if not any(path.is_file() for path in folder.rglob("*")):
            shutil.rmtree(folder)  # so that the corrected command can be given
        raise
    train, val = (
        resolve_output_dir(path, settings.storage_path) for path in (settings.train_output, settings.val_output)
    )
    rows = {"train_jsonl": str(train)} | ({"val_jsonl": str(val)} if val.is_file() and val.stat().st_size else {})
    job = _write_settings(settings, folder, {**rows, "output_dir": str(folder / "run")})
    shown = Path(settings.project)
    rows_to_score = str(shown / val.relative_to(folder)) if "val_jsonl" in rows and val.is_relative_to(folder) else ""
    commands = [
        typed_command(job, "--config", str(shown / SETTINGS_FILE)),
        typed_command("evaluate", "--lora_dir", str(shown / "run"), "--val_jsonl", rows_to_score or "test.jsonl"),
        typed_command("infer", "--lora_dir", str(shown / "run"), "--audio_path", "clip.wav"),
    ]
    file = folder / SETTINGS_FILE
    write_atomically(file, "".join(f"# {line}\n" for line in commands).encode() + file.read_bytes())
    console.print(f"made {shown / SETTINGS_FILE}; next:", markup=False)
    for line in commands:
        console.print(f"  {line}", markup=False)
    return commands


def _write_settings(settings: NewSettings, folder: Path, values: dict[str, Any]) -> str:
    """Write the training settings that a preflight fits to this machine; returns the training job.

    A base that is not on this machine cannot be checked here, so its settings are those that the user would give.
    """
    values = {"model_id": settings.model_id, **values}
    kind, why = preflight_settings([word for name, value in values.items() for word in (f"--{name}", str(value))])
    preflight = Preflight(settings_from(kind, {**values, "memory_gib": settings.memory_gib}))
    if why:
        preflight.findings.add("ok", "recipe", why)
    preflight.check()
    try:
        report_preflight(preflight)
        shutil.copy(folder / "run" / "preflight" / f"{preflight.job}.yaml", folder / SETTINGS_FILE)
    except RunError as error:
        console.print(f"{error}; the settings in {SETTINGS_FILE} are not fitted to a machine", markup=False)
        launched = launch_values(preflight.settings, set())
        write_launch_file(folder / SETTINGS_FILE, preflight.job, launched, ["not checked: see preflight"])
    return preflight.job
