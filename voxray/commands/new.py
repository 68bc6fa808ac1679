"""The new job: one's own data to a project folder with manifests, settings that fit, and the commands to run."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from voxray.commands.next_steps import flags_to_repeat, has_rows
from voxray.commands.preflight import report_preflight
from voxray.commands.prepare import run_prepare_job
from voxray.config.new import NewSettings
from voxray.config.parse import settings_from
from voxray.config.preflight import preflight_settings
from voxray.core.console import console
from voxray.core.errors import RunError, SettingsError
from voxray.core.project_files import typed_command
from voxray.core.storage import write_atomically
from voxray.models.registry import get_family
from voxray.preflight.check_run import Preflight
from voxray.preflight.report import launch_values, write_launch_file
from voxray.runs.run_folder import holds_run, make_folder, resolve_output_dir

SETTINGS_FILE = "train.yaml"
OWN = {"data", "run", SETTINGS_FILE}
"""What an earlier call with the same folder left, which this one replaces."""


def run_new(settings: NewSettings) -> list[str]:
    """Prepare the data, check the machine, and write ``train.yaml`` into the new folder.

    Returns:
        The commands that train, evaluate base and adapter, compare the two and transcribe.
    Raises:
        RunError: The base cannot be read, or the data has no usable row or leaks between training and validation.
        SettingsError: The folder holds a run, or files of something else.
    """
    family = get_family(settings.model_id)  # before all clips are read
    folder = resolve_output_dir(settings.project, settings.storage_path, flag="--project")
    is_new = folder.is_dir() and {path.name for path in folder.iterdir()} <= OWN and not holds_run(folder / "run")
    if folder.exists() and not is_new:
        raise SettingsError(f"--project {settings.project}: holds a run or other files; name a new folder")
    make_folder(folder, "--project")
    try:
        run_prepare_job(settings, trains_next=True)
    except RunError:
        if not any(path.is_file() for path in folder.rglob("*")):
            shutil.rmtree(folder)  # so that the corrected command can be given
        raise
    train, val, test = (
        resolve_output_dir(path, settings.storage_path)
        for path in (settings.train_output, settings.val_output, settings.test_output)
    )
    if test.is_file() and not has_rows(test):
        test.unlink()  # the corpus has no test split
    languages = _languages(train)
    values: dict[str, Any] = {"train_jsonl": str(train), "output_dir": str(folder / "run")}
    if has_rows(val):
        values |= {"val_jsonl": str(val), "load_best_model_at_end": True}
    job = _write_settings(settings, folder, values)
    shown = Path(settings.project)
    run, before, after = (str(shown / name) for name in ("run", "evaluation-base", "evaluation"))
    same = flags_to_repeat(yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding="utf-8")))
    held_out = next(filter(has_rows, (test, val)), None)  # training has looked at the validation rows
    rows = _as_typed(held_out, folder, shown) if held_out else "YOUR-TEST-ROWS.jsonl"
    commands = [
        typed_command(job, "--config", str(shown / SETTINGS_FILE)),
        typed_command("evaluate", "--model_id", settings.model_id, "--val_jsonl", rows, "--output_dir", before, *same),
        typed_command("evaluate", "--lora_dir", run, "--val_jsonl", rows, "--output_dir", after, *same),
        typed_command("compare", before, after, "--output_dir", str(shown / "comparison")),
        typed_command("infer", "--lora_dir", run, "--audio_path", "clip.wav", *same, *_language(languages)),
    ]
    file = folder / SETTINGS_FILE
    write_atomically(file, "".join(f"# {line}\n" for line in commands).encode() + file.read_bytes())
    console.print(f"made {shown / SETTINGS_FILE}; next:", markup=False)
    for line in commands:
        console.print(f"  {line}", markup=False)
    num_unknown = languages.count("")
    if num_unknown and family.front_end(settings.model_id).needs_language:
        console.print(
            f"{num_unknown} of {len(languages)} training rows name no language, without which {settings.model_id} "
            "cannot train on them: give this command again with --language, such as --language ko",
            markup=False,
        )
    return commands


def _as_typed(path: Path, folder: Path, shown: Path) -> str:
    """The path as one types it: below the new folder, which the user named ``shown``, if it is in it."""
    return str(shown / path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _languages(manifest: Path) -> list[str]:
    """The language that each row names, "" for none."""
    with open(manifest, encoding="utf-8") as file:
        return [json.loads(line).get("language") or "" for line in file]


def _language(languages: list[str]) -> list[str]:
    """The flag for the language of the rows, if their first one names it."""
    return ["--language", languages[0]] if languages[0] else []


def _write_settings(settings: NewSettings, folder: Path, values: dict[str, Any]) -> str:
    """Write the training settings that a preflight fits to this machine; returns the training job.

    If something has to be fixed first, the settings are those that the user would give.
    """
    values = {"model_id": settings.model_id, **values}
    kind, why = preflight_settings([word for name, value in values.items() for word in (f"--{name}", str(value))])
    preflight = Preflight(settings_from(kind, {**values, "memory_gib": settings.memory_gib}))
    if why:
        preflight.findings.add("ok", "recipe", why)
    preflight.check()
    num_steps = preflight.time.num_steps if preflight.time else 0
    if preflight.settings.warmup_steps > num_steps // 5 > 0:  # the default is for longer runs
        preflight.settings = preflight.settings.model_copy(update={"warmup_steps": max(1, num_steps // 10)})
    try:
        report_preflight(preflight, show_command=False)
        shutil.copy(folder / "run" / "preflight" / f"{preflight.job}.yaml", folder / SETTINGS_FILE)
    except RunError as error:
        console.print(f"{error}; the settings in {SETTINGS_FILE} are not fitted to a machine", markup=False)
        launched = launch_values(preflight.settings, set())
        write_launch_file(folder / SETTINGS_FILE, preflight.job, launched, ["not checked: see preflight"])
    return preflight.job
