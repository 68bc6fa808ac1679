"""The run folder: path of a job's output, and provenance of a run."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from voxray.config.input_files import TEMPORARY_COPY
from voxray.config.own_tasks import RECORD, recorded_tasks
from voxray.config.parse import SUBMITTED_JOB_VARIABLE, Settings
from voxray.core.errors import RunError, SettingsError
from voxray.core.project_files import IN_WHEEL, PROJECT_FILES
from voxray.core.storage import AnyPath, write_json
from voxray.core.tasks import own_definitions
from voxray.core.version import __version__
from voxray.runs.inputs import refuse_changed_inputs, write_inputs

PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "mistral-common",
    "pyarrow",
    "numpy",
    "soundfile",
    "soxr",
    "tokenizers",
)
SETTINGS = "settings.json"
CHANGEABLE_SETTINGS = {
    *(
        "num_workers",
        "worker_timeout_sec",
        "loader_workers",
        "num_actors",
        "pin_memory",
        "output_dir",
        "storage_path",
        "features_dir",
    ),
    *("save_steps", "eval_steps", "eval_max_rows", "log_steps", "max_steps", "epochs", "strict", "rows_per_shard"),
    *("overwrite", "eval_max_new_tokens", "val_jsonl", "tf32", "cuda_visible_devices"),
    *("cache_budget_gib", "features_cache_dir", "features_cache_gib", "max_bad_steps", "preview_rows"),
    *("save_total_limit", "metric_for_best_model", "load_best_model_at_end"),
    *("early_stopping_patience", "early_stopping_threshold", "strategy", "zero_stage"),
    *("offload_optimizer", "report_to", "fp32"),  # bf16 and fp16 tell the type
    "tasks_file",  # its contents may not
}
"""Settings that may change when a run is resumed: they alter neither the model nor the order of the data."""

ADAPTER_SETTINGS = {"model_id", "tuning", "lora_r", "lora_alpha", "lora_targets", "freeze_encoder", "freeze_whisper"}
"""Settings with other values of which a run may not be able to start from an earlier run's adapter."""

STOP_FILE = "STOP"
"""If this file exists in the run folder, the run saves itself and ends after the current step."""
GROW_FILE = "GROW"
"""The same, but to restart with more workers, because the cluster has free resources."""
WORKING_COPIES = ".cache/voxray/runs"
"""Below the home folder."""


def resolve_output_dir(path: str, storage_path: str, *, flag: str = "--output_dir", is_mirrored: bool = False) -> Path:
    """Absolute path of an output folder.

    A submitted job runs in a temporary copy of its working directory, so a relative folder needs ``storage_path``
    there.

    Args:
        is_mirrored: Whether the job can write to a URL (see ``remote_sync``). Then the result is the working copy.
    Raises:
        SettingsError: A relative folder in a submitted job without ``storage_path``, or a relative ``storage_path``.
    """
    folder = Path(os.path.expanduser(path))
    if url := output_url(path, storage_path):
        if not is_mirrored:
            raise SettingsError(f"{flag} {path}: this job writes to mounted folders only, not to {url}")
        return working_copy(url)
    if storage_path and not Path(storage_path).is_absolute():
        raise SettingsError(f"--storage_path {storage_path}: must be absolute")
    if folder.is_absolute():
        return folder
    if storage_path:
        return Path(storage_path) / folder
    if is_submitted_job():
        raise SettingsError(f"{flag} {path}: {TEMPORARY_COPY}")
    return folder.absolute()


def check_output_files(outputs: Mapping[str, Path], inputs: Iterable[str]) -> None:
    """Refuse output files that would overwrite an input or each other, before anything is read.

    Args:
        outputs: {flag: file}.
        inputs: Files that the job reads. Folders are ignored.
    Raises:
        SettingsError: An output is an input under any name, another output, or a folder.
    """
    first: dict[str, str] = {}
    for flag, path in outputs.items():
        if path.is_dir():
            raise SettingsError(f"{flag} {path}: a folder; name a file")
        real = os.path.realpath(path)
        for name in inputs:
            is_input = os.path.isfile(name) and (real == os.path.realpath(name) or _same_file(path, name))
            if is_input:
                raise SettingsError(f"{flag} {path}: that is an input; give another file")
        if other := first.get(real):
            raise SettingsError(f"{flag} {path}: that is the file of {other} too; give another one")
        first[real] = flag


def _same_file(path: Path, other: str) -> bool:
    return path.exists() and path.samefile(other)


def output_url(path: str, storage_path: str) -> str:
    """URL of an output folder, "" for a local folder. It is ``path`` itself, or ``path`` below a URL ``storage_path``.

    Options stay at the end: ``runs/a`` under ``s3://bucket/x?region=eu-west-1`` is ``s3://bucket/x/runs/a?region=...``.
    """
    if "://" in path:
        return path
    if "://" not in storage_path or Path(os.path.expanduser(path)).is_absolute():
        return ""
    base, question, options = storage_path.partition("?")
    return f"{base.rstrip('/')}/{path.strip('/')}{question}{options}"


def working_copy(url: str) -> Path:
    """Local folder in which jobs keep their working copy of a URL; always the same for a URL."""
    base = url.partition("?")[0].rstrip("/")
    return Path.home() / WORKING_COPIES / f"{base.rpartition('/')[2]}-{hashlib.sha256(base.encode()).hexdigest()[:8]}"


def is_submitted_job() -> bool:
    """Whether this process was started by ``ray job submit``."""
    return SUBMITTED_JOB_VARIABLE in os.environ


def make_folder(path: Path, flag: str = "--output_dir") -> None:
    """Create an output folder and make sure that it is writable.

    Raises:
        RunError: It is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"{flag} {path}: cannot write there: {error.strerror}") from None


def require_replaceable(output_dir: Path, report: str, *, overwrite: bool, earlier: str, other: str) -> None:
    """Refuse an output folder that is not empty, unless it is an earlier result that may be replaced.

    Args:
        report: File name that marks an earlier result of the job.
        overwrite: Whether an earlier result may be replaced.
        earlier: What the message calls an earlier result.
        other: What the message says of any other folder.
    Raises:
        RunError: The folder may not be replaced.
    """
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    is_earlier = (output_dir / report).is_file()
    if not (overwrite and is_earlier):
        hint = f"--overwrite replaces {earlier}" if is_earlier else other
        raise RunError(f"--output_dir {output_dir}: is not empty; {hint}")


@contextmanager
def replaced_on_success(output_dir: Path) -> Iterator[Path]:
    """An empty folder beside ``output_dir`` to write to.

    It becomes ``output_dir`` if the block ends without an error; otherwise it is deleted and ``output_dir`` stays.

    Raises:
        RunError: The place is not writable.
    """
    partial = output_dir.with_name(f".{output_dir.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        yield partial
        shutil.rmtree(output_dir, ignore_errors=True)
        partial.replace(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_training_folder(folder: Path) -> None:
    """Keep an evaluation from overwriting the settings and metrics of a training run.

    Raises:
        SettingsError: The folder holds a run, a checkpoint or an adapter.
    """
    if any((folder / name).exists() for name in ("checkpoints", "adapter", "metrics.jsonl", "adapter_config.json")):
        raise SettingsError(f"--output_dir {folder}: holds a training run or an adapter; give the evaluation its own")


def open_run_folder(
    run_dir: Path, settings: Settings, *, overwrite: bool, inputs: Mapping[str, str] | None = None
) -> None:
    """Prepare the run folder. A run with the same settings and inputs is resumed; another is refused or overwritten.

    Args:
        inputs: Result of ``inputs.input_hashes``.
    Raises:
        SettingsError: The folder holds a run with other settings or inputs, and ``overwrite`` is off.
    """
    make_folder(run_dir)
    if holds_run(run_dir):
        if overwrite:
            _clear(run_dir)
        else:
            refuse_other_run(run_dir, settings)
            has_lora = getattr(settings, "tuning", "") != "full"
            refuse_other_tasks(run_dir, "a run", other_run_advice(run_dir, has_lora=has_lora))
            refuse_changed_inputs(run_dir, inputs or {}, "a run")
    write_inputs(run_dir, inputs or {})
    for name in (STOP_FILE, GROW_FILE):
        (run_dir / name).unlink(missing_ok=True)
    write_json(run_dir / SETTINGS, json.loads(settings.model_dump_json()))
    write_json(run_dir / "provenance.json", provenance())
    record_tasks(run_dir)


def record_tasks(folder: Path) -> None:
    """Write the definitions of the job's own tasks into the folder of a run or an evaluation."""
    if definitions := own_definitions():
        write_json(folder / RECORD, definitions)
    else:
        (folder / RECORD).unlink(missing_ok=True)


def refuse_other_tasks(folder: Path, what: str, advice: str) -> None:
    """Compare the job's own tasks with those of the run or the sweep in a folder.

    Args:
        what: What the folder holds, for the message.
        advice: End of the message.
    Raises:
        SettingsError: They differ. The message names a task.
    """
    try:
        before, now = recorded_tasks(folder), own_definitions()
    except ValueError as error:
        raise SettingsError(f"{error}; use --overwrite or another --output_dir") from None
    if list(before.items()) != list(now.items()):
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        kind = f"definition of {', '.join(changed)}" if changed else "order of the tasks"
        raise SettingsError(f"--tasks_file: {folder} holds {what} with another {kind}; {advice}")


def holds_run(run_dir: Path) -> bool:
    """Whether a run was started in a folder."""
    return (run_dir / SETTINGS).is_file()


def refuse_other_run(run_dir: Path, settings: Settings) -> None:
    """Compare settings with those of the run in the folder.

    Settings that did not exist when the run was started count as their present default.

    Raises:
        SettingsError: They differ in a setting that changes the result.
    """
    path, current = run_dir / SETTINGS, json.loads(settings.model_dump_json())
    advice = "use --overwrite or another --output_dir"
    try:
        stored = json.loads(path.read_text())
    except ValueError:
        raise SettingsError(f"{path}: damaged, so this run cannot be told from others; {advice}") from None
    defaults = {name: field.default for name, field in type(settings).model_fields.items() if not field.is_required()}
    previous = {**json.loads(json.dumps(defaults)), **stored}
    fixed = [name for name in current if name in previous and name not in CHANGEABLE_SETTINGS]
    changed = [name for name in fixed if previous[name] != current[name]]
    if changed:
        shown = ", ".join(f"--{name} (was {previous[name]}, now {current[name]})" for name in changed)
        has_lora = current.get("tuning") != "full" and not ADAPTER_SETTINGS & set(changed)
        advice = other_run_advice(run_dir, has_lora=has_lora)
        raise SettingsError(f"{path.parent} holds a run with other settings: {shown}; {advice}")


def other_run_advice(run_dir: Path, *, has_lora: bool) -> str:
    """What to do if a folder holds another run.

    Args:
        has_lora: Whether the new run can start from the LoRA weights of the run in the folder.
    """
    start = f" and --init_adapter {run_dir}, to start from its weights" if has_lora else ""
    return f"give another --output_dir{start}; --overwrite deletes the run in the folder"


def _clear(run_dir: Path) -> None:
    """Delete the files of a run and nothing else. Feature shards stay, since their fingerprint is checked anyway."""
    for name in ("checkpoints", "adapter", "tensorboard"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    files = ("metrics.jsonl", "previews.jsonl", "previews.yaml", "train.log", "result.json")
    for name in (*files, "quarantine.jsonl", "parameters.json", "trained_rows.json"):
        (run_dir / name).unlink(missing_ok=True)


def add_data_provenance(run_dir: Path, feature_sets: Iterable[AnyPath]) -> None:
    """Add the descriptions of the run's feature sets to provenance.json."""
    sets = [json.loads((folder / "set.json").read_text()) for folder in dict.fromkeys(feature_sets)]
    add_provenance(run_dir, data=sets)


def add_provenance(run_dir: Path, **facts: Any) -> None:
    """Add facts to provenance.json that became known after the run was opened."""
    path = run_dir / "provenance.json"
    write_json(path, {**json.loads(path.read_text()), **facts})


def provenance() -> dict[str, Any]:
    """Versions, git commit and the command of this process."""
    versions = {"voxray": __version__, "python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"versions": versions, "git": _git_state(PROJECT_FILES), "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}


@cache
def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout and whether it had changes when this process first asked, since its code was read then.

    None outside a checkout, as in a submitted job's copy.
    """
    if folder == IN_WHEEL:
        return None  # the environment may be inside a checkout of something else
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
