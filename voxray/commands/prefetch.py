"""The prefetch job: fetches a model and a corpus into one folder, with 16 kHz audio, manifests, features, a lock file.

The job has four steps and skips those that the lock file records as done. The lock file records a step's inputs before
the step writes anything, and a file gets its final name only when it is complete. So the job can be killed at any
moment, and the same command resumes it.
"""

import filecmp
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from voxray.cluster.actor_pool import MIN_ACTORS
from voxray.cluster.session import ray_session
from voxray.commands.prepare import run_prepare_job
from voxray.config.featurize import FeaturizeSettings
from voxray.config.flag_groups import ClipLimitFlags, FeatureFlags
from voxray.config.prefetch import PrefetchSettings
from voxray.config.prepare import PrepareSettings
from voxray.config.recipes import recipes
from voxray.core.console import console, progress_bar
from voxray.core.errors import RunError, SettingsError
from voxray.core.project_files import typed_command
from voxray.core.storage import write_atomically
from voxray.corpora.fetch import CorpusSource, download_and_unpack, find_source
from voxray.corpora.hub import is_intact, model_files, open_repository, walk
from voxray.corpora.prepare.fingerprints import short_hash
from voxray.corpora.select import AUDIO_SUFFIXES, RowFilter
from voxray.features.from_settings import make_features
from voxray.models.parts.arithmetic import with_default_dtype
from voxray.models.registry import get_family
from voxray.prefetch.lock_file import LockFile, changed_source, damaged, describe_file, refuse_changes, summarize_files
from voxray.prefetch.plan import refuse_full_disk, show_plan
from voxray.runs.lease import folder_lease
from voxray.runs.run_folder import resolve_output_dir

MODEL_SETTINGS = ("model_id", "model_revision", "hub")
CORPUS_SETTINGS = ("dataset", "dataset_revision", "hub", "language", "splits")
LIMITS = (*ClipLimitFlags.model_fields, "min_sec", "max_sec", "max_chars", "duplicates", "leaks", "val_share", "seed")
MANIFESTS = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
CHECKSUMS = "clips.sha256"
FOLDERS = ("model", "raw", "data", "features")


def run_prefetch(settings: PrefetchSettings) -> dict[str, Any]:
    """Fetch everything that is missing, or with ``dry_run`` print what would be fetched.

    Returns:
        The steps of the lock file; {} for a dry run.
    Raises:
        RunError, SettingsError: The user has to fix an input or a setting.
    """
    folder = resolve_output_dir(settings.output_dir, settings.storage_path)
    lock = LockFile(folder)
    if settings.dry_run:
        show_plan(settings, folder, lock)
        return {}
    if not lock.path.is_file() and (foreign := [name for name in FOLDERS if (folder / name).exists()]):
        raise SettingsError(f"--output_dir {folder}: holds a folder {foreign[0]} that is not of this job; name another")
    with folder_lease(folder):
        _fetch_model(settings, folder, lock)
        if settings.features:
            get_family(str(folder / "model"))  # raises for an unsupported model, before the long steps
            if settings.store == "encoder":
                settings = with_default_dtype(settings, str(folder / "model"), on_ray=True)
        # one Ray session for both steps, and none if both are done
        inputs = _fetch_corpus(settings, folder, lock)
        has_work = bool(inputs) or (settings.features and not _has_features(settings, folder, lock))
        with ray_session(folder / "ray.log", max(MIN_ACTORS, settings.num_actors)) if has_work else nullcontext():
            if inputs:
                _make_data(settings, folder, lock, inputs)
            if settings.features and has_work:
                _make_features(settings, folder, lock)
        if not settings.keep_raw:
            shutil.rmtree(folder / "raw", ignore_errors=True)
        _print_next_command(settings, folder, lock)
        return {name: lock.step(name) for name in ("model", "corpus", "data", "features")}


def _values(settings: PrefetchSettings, names: tuple[str, ...]) -> dict[str, Any]:
    values = settings.model_dump(mode="json")
    return {name: values[name] for name in names}


def _fetch_model(settings: PrefetchSettings, folder: Path, lock: LockFile) -> None:
    """Fetch the model into ``model``, without the files that are already complete there."""
    requested, target = _values(settings, MODEL_SETTINGS), folder / "model"
    changes = lock.changed("model", requested)
    model_folder = Path(settings.model_id)
    step = lock.step("model")
    if not changes and lock.is_done("model") and model_folder.is_dir() and "sources" in step:
        changes = changed_source(step["sources"], model_folder, verify=settings.verify)
    if changes and settings.overwrite:
        shutil.rmtree(target, ignore_errors=True)
        lock.forget("model", "features")
    else:
        refuse_changes(folder, changes)
    step = {} if lock.is_other("model", requested) else lock.step("model")
    if lock.is_done("model"):
        bad = damaged(step["files"], folder, verify=settings.verify)
        if not bad:
            console.print(f"model: {settings.model_id} is there", markup=False)
            return
        console.print(f"model: {len(bad)} file(s) damaged or gone, {bad[0]} first", markup=False)
        for path in bad:
            (folder / path).unlink(missing_ok=True)
    repository = open_repository(
        settings.model_id, "model", step.get("commit") or settings.model_revision, settings.hub
    )
    files = model_files(repository)
    if lock.is_other("model", requested):
        shutil.rmtree(target, ignore_errors=True)  # files of another model, whose download was interrupted
    lock.begin("model", requested, commit=repository.commit)
    missing = [file for file in files if not _is_fetched(target / file.path, file, repository.folder)]
    missing_bytes = sum(file.num_bytes for file in missing)
    refuse_full_disk(folder, missing_bytes, "the model")
    with progress_bar("model") as bar:
        fetched_bytes = 0

        def on_bytes(num_bytes: int) -> None:
            nonlocal fetched_bytes
            fetched_bytes += num_bytes
            bar.update(fetched_bytes, missing_bytes)

        for file in missing:
            repository.fetch(file, target / file.path, on_bytes)
    facts: dict[str, Any] = {"files": [describe_file(target / file.path, folder) for file in files]}
    if repository.folder:
        facts["sources"] = [describe_file(repository.folder / file.path, repository.folder) for file in files]
    lock.finish("model", **facts)
    total = sum(file.num_bytes for file in files)
    console.print(f"model: {repository.name}, {len(files)} files, {total / 2**20:,.1f} MiB in {target}", markup=False)


def _is_fetched(target: Path, file: Any, source: Path | None) -> bool:
    if not target.is_file() or not is_intact(target, file):
        return False
    return source is None or filecmp.cmp(target, source / file.path, shallow=False)


def _fetch_corpus(settings: PrefetchSettings, folder: Path, lock: LockFile) -> tuple[Path, ...]:
    """Fetch and unpack the corpus.

    Returns:
        Input paths for prepare; () if the manifests made from them are up to date.
    """
    requested = _values(settings, CORPUS_SETTINGS)
    data_requested = {**requested, **_values(settings, ("max_rows", *LIMITS))}
    changes = lock.changed("corpus", requested) or lock.changed("data", data_requested)
    step = lock.step("corpus")
    if not changes and lock.is_done("corpus") and "base" in step:
        changes = changed_source(step["sources"], Path(step["base"]), verify=settings.verify)
    if changes and settings.overwrite:
        if lock.changed("corpus", requested) or not lock.changed("data", data_requested):
            shutil.rmtree(folder / "raw", ignore_errors=True)
            lock.forget("corpus")
        shutil.rmtree(folder / "data", ignore_errors=True)
        lock.forget("data", "features")
    else:
        refuse_changes(folder, changes)
    if lock.is_done("data") and not _damaged_data(folder, lock, verify=settings.verify):
        counts = ", ".join(f"{name} {count:,}" for name, count in lock.step("data")["rows"].items())
        console.print(f"data: {counts} rows are there", markup=False)
        return ()
    step = {} if lock.is_other("corpus", requested) else lock.step("corpus")
    inputs = tuple(folder / path for path in step.get("inputs", ()))
    if lock.is_done("corpus") and inputs and all(path.exists() for path in inputs):
        return inputs
    revision = step.get("commit") or settings.dataset_revision
    source = find_source(settings.dataset, revision, settings.hub, settings.language, settings.splits)
    raw = folder / "raw"
    if lock.is_other("corpus", requested):
        shutil.rmtree(raw, ignore_errors=True)
    lock.begin("corpus", requested, commit=source.commit)
    corpus_bytes = sum(file.num_bytes for file in source.files)
    refuse_full_disk(folder, corpus_bytes * (int(source.base is None) + int(source.is_packed)), "the corpus")
    with progress_bar("corpus") as bar:
        inputs = download_and_unpack(source, raw, settings.language, settings.dataset, bar.update)
    facts = _describe_sources(source, raw)
    lock.finish("corpus", inputs=[_relative(path, folder) for path in inputs], form=source.form, **facts)
    if source.base is None and source.is_packed:
        shutil.rmtree(raw / "hub")  # the archives are unpacked, and their checksums are in the lock file
    return inputs


def _relative(path: Path, folder: Path) -> str:
    """The path relative to the folder if it is below it, else unchanged."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _describe_sources(source: CorpusSource, raw: Path) -> dict[str, Any]:
    """Lock file entries of the corpus files: a checksum per file, and one entry for all single-clip audio files."""
    base = source.base or raw / "hub"
    paths = [base / file.path for file in source.files]
    clips = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
    sources = [describe_file(path, base) for path in paths if path.suffix.lower() not in AUDIO_SUFFIXES]
    facts: dict[str, Any] = {"sources": sources} | ({"clips": summarize_files(clips, base)} if clips else {})
    return facts | ({"base": str(base)} if source.base else {})


def _damaged_data(folder: Path, lock: LockFile, *, verify: bool) -> bool:
    """Whether manifests or clips are missing or damaged. Damaged clips are deleted, so that they are written again."""
    bad = damaged(lock.step("data")["files"], folder, verify=verify)
    if not bad and verify:
        lines = (folder / "data" / CHECKSUMS).read_text().splitlines()
        clips = [{"path": line[66:], "sha256": line[:64]} for line in lines]
        sized = [clip | {"bytes": _size(folder / "data" / clip["path"])} for clip in clips]
        bad = damaged(sized, folder / "data", verify=True)
        for path in bad:
            (folder / "data" / path).unlink(missing_ok=True)
    if bad:
        console.print(f"data: {len(bad)} file(s) damaged or gone, {bad[0]} first; made again", markup=False)
    return bool(bad)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _make_data(settings: PrefetchSettings, folder: Path, lock: LockFile, inputs: tuple[Path, ...]) -> None:
    """Run prepare: check the rows, write 16 kHz copies of their clips, and manifests of the copies."""
    data, step = folder / "data", lock.step("corpus")
    requested = _values(settings, (*CORPUS_SETTINGS, "max_rows", *LIMITS))
    key = short_hash(json.dumps([requested, step["sources"], step.get("clips")], sort_keys=True))[:16]
    for old in data.glob(".work-*"):
        if old.name != f".work-{key}":
            shutil.rmtree(old)
    lock.begin("data", requested)
    # The name of a file that --dataset names says no split; the names of files in a corpus do.
    is_root = len(inputs) == 1 and (inputs[0].is_dir() or Path(settings.dataset).expanduser().is_file())
    root = inputs[0] if is_root else Path(step.get("base") or folder / "raw" / "hub")
    select = RowFilter(root, settings.language, settings.splits, settings.max_rows)
    outputs = {"train_output": data / MANIFESTS["train"]}
    outputs |= {"val_output": data / MANIFESTS["validation"]} if "validation" in settings.splits else {}
    outputs |= {"test_output": data / MANIFESTS["test"]} if "test" in settings.splits else {}
    prepare_settings = PrepareSettings(
        input=tuple(map(str, inputs)),
        audio_output=str(data / "audio"),
        num_actors=settings.num_actors,
        **{name: str(path) for name, path in outputs.items()},
        **{name: getattr(settings, name) for name in LIMITS},
    )
    outcome = run_prepare_job(prepare_settings, select=select, work_dir=data / f".work-{key}", trains_next=True)
    if settings.strict and outcome.first_fault:
        raise RunError(f"{outcome.first_fault} (--strict)")
    if select.others:
        counts = ", ".join(f"{name or 'of no split'} {count:,}" for name, count in sorted(select.others.items()))
        console.print(f"data: rows not asked for (--splits, --max_rows): {counts}", markup=False)
    manifests = _delete_empty(list(outputs.values()))
    clips = _write_checksums(data, manifests)
    files = [*manifests, data / "quarantine.jsonl", data / "prepare_summary.json", data / CHECKSUMS]
    rows = {name: _num_lines(data / file) for name, file in MANIFESTS.items() if data / file in manifests}
    lock.finish("data", rows=rows, files=[describe_file(path, folder) for path in files], clips=clips)


def _delete_empty(manifests: list[Path]) -> list[Path]:
    """Delete manifests without rows and return the others; no job can read an empty manifest."""
    empty = [path for path in manifests if not path.stat().st_size]
    for path in empty:
        path.unlink()
        console.print(f"data: {path.name} would have no rows, so it is not written", markup=False)
    return [path for path in manifests if path not in empty]


def _num_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _write_checksums(data: Path, manifests: list[Path]) -> dict[str, Any]:
    """Delete clips that no manifest uses and write the checksums of the others in the format of ``sha256sum -c``.

    Returns:
        Number and total size of the clips, for the lock file.
    """
    names: set[str] = set()
    for manifest in manifests:
        with open(manifest, encoding="utf-8") as lines:
            names.update(json.loads(line)["audio_path"] for line in lines)
    for path in walk(data / "audio"):
        if path.relative_to(data).as_posix() not in names:
            path.unlink()
    clips = [describe_file(data / name, data) for name in sorted(names)]
    lines = "".join(f"{clip['sha256']}  {clip['path']}\n" for clip in clips)
    write_atomically(data / CHECKSUMS, lines.encode())
    return {"files": len(clips), "bytes": sum(clip["bytes"] for clip in clips)}


def _feature_settings(settings: PrefetchSettings) -> dict[str, Any]:
    return _values(settings, ("store", "cache_dtype", "bf16", "rows_per_shard"))


def _manifests(folder: Path, lock: LockFile) -> list[str]:
    return [str(folder / "data" / MANIFESTS[name]) for name in lock.step("data")["rows"]]


def _has_features(settings: PrefetchSettings, folder: Path, lock: LockFile) -> bool:
    """Whether the features are up to date. In a folder that was moved they are not: they name the old manifests."""
    step = lock.step("features")
    if settings.verify or not lock.is_done("features") or step["asked"] != _feature_settings(settings):
        return False
    if [entry["manifest"] for entry in step["sets"]] != _manifests(folder, lock):
        return False
    if damaged(step["files"], folder, verify=False):
        return False
    console.print("features: already up to date", markup=False)
    return True


def _make_features(settings: PrefetchSettings, folder: Path, lock: LockFile) -> None:
    """Compute feature sets of the manifests with the fetched model, and delete sets of other manifests."""
    manifests, model = _manifests(folder, lock), str(folder / "model")
    old_sets = lock.step("features").get("sets", [])
    names = set(FeatureFlags.model_fields) - {"features_cache_dir", "features_cache_gib"}
    values = {name: getattr(settings, name) for name in names}
    feature_settings = FeaturizeSettings(
        model_id=model, manifest=tuple(manifests), bf16=settings.bf16, verify=settings.verify, **values
    )
    lock.begin("features", _feature_settings(settings), sets=old_sets)
    report = make_features(feature_settings, model, manifests, folder / "features", bf16=settings.bf16)
    sets = []
    for manifest, set_folder in zip(manifests, report.folders, strict=True):
        assert isinstance(set_folder, Path)
        content = json.loads((set_folder / "set.json").read_text())
        facts = {name: content[name] for name in ("fingerprint", "store", "content", "samples", "bad", "shards")}
        sets.append({"manifest": manifest, "path": _relative(set_folder, folder), **facts})
    for path in {entry["path"] for entry in old_sets} - {entry["path"] for entry in sets}:
        shutil.rmtree(folder / path, ignore_errors=True)
    # shards.json holds the checksum of every shard
    files = [describe_file(folder / entry["path"] / "shards.json", folder) for entry in sets]
    lock.finish("features", sets=sets, files=files)


def _print_next_command(settings: PrefetchSettings, folder: Path, lock: LockFile) -> None:
    model_type = json.loads((folder / "model" / "config.json").read_text()).get("model_type")
    rows = lock.step("data")["rows"]
    flags = ["--model_id", str(folder / "model"), "--train_jsonl", str(folder / "data" / MANIFESTS["train"])]
    if "validation" in rows:
        flags += ["--val_jsonl", str(folder / "data" / MANIFESTS["validation"])]
    flags += ["--features_dir", str(folder / "features"), "--output_dir", f"runs/{folder.name}"]
    changed = settings.model_fields_set & {"store", "cache_dtype", "rows_per_shard"}
    flags += [word for name in sorted(changed) for word in (f"--{name}", str(getattr(settings, name)))]
    if settings.bf16 or settings.store == "encoder":  # the training has to compute like the stored encoder
        flags.append("--bf16" if settings.bf16 else "--fp32")
    console.print(
        f"all files are in {folder}, and {lock.path.name} lists them; the next command needs no network:", markup=False
    )
    console.print(f"  {typed_command(_transcript_job(str(model_type)), *flags)}", markup=False)


def _transcript_job(model_type: str) -> str:
    """The job that trains a model of this type on transcripts."""
    table = recipes()
    fitting = (recipe for recipe in table.values() if model_type in recipe.model_types and recipe.tasks == ("asr",))
    return next(fitting, table["asr_adapter"]).job
